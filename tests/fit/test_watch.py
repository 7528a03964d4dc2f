"""What hangs is named, and ends: a stopped rank, a read that never returns, a rank that is slow."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.fit.pace import outliers
from training.fit.watch import HUNG, Watch

pytestmark = [pytest.mark.slow, pytest.mark.minutes(2)]
SHORT = {"checkpoint.interval": "2ba", "steps": 12}
HANG = {**SHORT, "hang_s": 30}


def test_a_rank_that_is_stopped_ends_the_job_which_names_it_and_goes_on(
    tmp_path: Path, settings: Callable[..., Any], run_jobs: Callable[..., Any], read_log: Callable[..., Any]
) -> None:
    names = ["undisturbed", "rank-0", "rank-1"]
    stopped = [
        {"config": settings(tmp_path / f"rank-{rank}", 2, HANG), "ranks": 2}
        | {"signal": signal.SIGSTOP, "rank": rank, "at": 5}
        for rank in (0, 1)
    ]
    again = [{"config": settings(tmp_path / name, 2, SHORT), "ranks": 2} for name in names]
    codes = run_jobs(tmp_path, [*stopped, *again])
    assert codes == [[-signal.SIGKILL, HUNG], [HUNG, -signal.SIGKILL], [0, 0], [0, 0], [0, 0]]
    said = (tmp_path / "rank-1" / "output").read_text()
    host = os.uname().nodename
    assert "ranks without a sign of life" in said
    assert f"  rank 1 (host {host}, process " in said
    assert f"rank 0 (host {host}) has not answered rank 1" in (tmp_path / "rank-0" / "output").read_text()
    losses = {name: [line["loss"] for line in read_log(tmp_path / name)] for name in names}
    assert losses["rank-0"] == losses["rank-1"] == losses["undisturbed"]


def test_a_read_that_never_returns_is_named_with_its_place(
    tmp_path: Path, settings: Callable[..., Any], run_jobs: Callable[..., Any]
) -> None:
    config = settings(tmp_path / "run", 2, HANG)
    store = tmp_path / "store"
    shutil.copytree(config["data"]["store"], store)
    tar = sorted(store.glob("block*/00000.tar"))[0]
    tar.unlink()
    os.mkfifo(tar)  # opening it waits for a writer, as a dead file server's file does
    config["data"]["store"] = str(store)
    ((code,),) = run_jobs(tmp_path, [{"config": config, "ranks": 1}])
    said = (tmp_path / "run" / "output").read_text()
    assert code == HUNG, said
    assert "no rank has moved" in said
    assert "a thread at training/stream/tars.py" in said


def test_a_batch_of_an_evaluation_is_a_sign_of_life() -> None:
    watch = Watch(hang_s=600, wait_s=600)
    said = {"beat": 1, "step": 7, "evaluated": 1, "moves": 5}
    watch._hear(0, json.dumps(said))
    for change, moved in (({"beat": 2}, False), ({"evaluated": 2}, True)):
        watch._moved = 0.0
        watch._hear(0, json.dumps(said | change))
        assert (watch._moved > 0) is moved


def test_the_slow_rank_is_named_by_what_it_takes_long_for() -> None:
    ranks = [("a", 0.010, 0.001), ("a", 0.012, 0.001), ("b", 0.100, 0.0), ("b", 0.011, 0.500)]
    compute, data = outliers(ranks)
    assert compute == "rank 2 (host b) computes 100 ms where the usual rank takes 11 ms"
    assert data == "rank 3 (host b) waits for data 500 ms where the usual rank takes 1 ms"
    assert not outliers([("a", 0.010, 0.0), ("b", 0.029, 0.010)])  # within what is usual
