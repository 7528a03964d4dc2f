"""Who hangs and who is slow, told from signs: the times are the test's own."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import psutil
import pytest

from pipeline.watch import Sign, Watch

HANG_S = 100.0
BUSY = Sign("host", "node", pid=7, identity=1, beat=0, steps=5, shard=3, place="sample 000000012")


def after(sign: Sign, **changes: object) -> Sign:
    return dataclasses.replace(sign, **changes)


def test_a_worker_whose_steps_stand_still_hangs_though_it_lives() -> None:
    watch = Watch(HANG_S)
    assert watch.hung({"a": BUSY}, now=0) == {}
    assert watch.hung({"a": after(BUSY, beat=9)}, now=99) == {}
    (sign, seconds) = watch.hung({"a": after(BUSY, beat=10)}, now=101)["a"]
    assert seconds == 101
    assert str(sign) == "the worker on host (process 7), in shard 3, at sample 000000012"


def test_progress_starts_the_count_anew() -> None:
    watch = Watch(HANG_S)
    watch.hung({"a": BUSY}, now=0)
    watch.hung({"a": after(BUSY, steps=6)}, now=99)
    assert watch.hung({"a": after(BUSY, steps=6)}, now=150) == {}
    assert watch.moved == 99


def test_between_two_shards_a_worker_hangs_only_if_it_is_silent() -> None:
    watch, idle = Watch(HANG_S), after(BUSY, shard=None)
    watch.hung({"lives": idle, "silent": idle}, now=0)
    assert list(watch.hung({"lives": after(idle, beat=1), "silent": idle}, now=101)) == ["silent"]
    assert watch.moved == 0  # nothing was done


def test_another_process_under_the_same_name_is_another_worker() -> None:
    watch = Watch(HANG_S)
    watch.hung({"a": BUSY}, now=0)
    assert watch.hung({"a": after(BUSY, identity=2)}, now=101) == {}


def test_a_worker_is_ended_though_the_clock_was_set_and_another_process_of_its_pid_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pipeline.scheduling import _kill

    with subprocess.Popen(["sleep", "inf"]) as worker:
        try:
            process = psutil.Process(worker.pid)
            identity, began = hash(process), process.create_time()
            hour_later = re.sub(
                r"(?<=btime )\d+", lambda found: str(int(found[0]) + 3600), Path("/proc/stat").read_text()
            )
            (tmp_path / "stat").write_text(hour_later)  # the kernel counts it from the clock of today
            (tmp_path / str(worker.pid)).symlink_to(f"/proc/{worker.pid}")
            monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
            assert psutil.Process(worker.pid).create_time() > began + 1800
            assert not _kill(worker.pid, identity + 1)
            assert worker.poll() is None
            assert _kill(worker.pid, identity)
        finally:
            worker.kill()


def test_signs_that_cannot_be_taken_away_hide_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.experimental import internal_kv

    from pipeline.scheduling import _Guard

    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("no control process\nand more of it")

    monkeypatch.setattr(internal_kv, "_internal_kv_del", gone)
    said: list[str] = []
    guard = _Guard.__new__(_Guard)  # it would look for a cluster
    guard._board, guard._say = "board", said.append
    guard.clear()
    assert said == ["the workers' signs stay on Ray's board, in nobody's way (ConnectionError: no control process)"]


def test_a_worker_far_slower_than_the_others_is_named_once() -> None:
    watch = Watch(HANG_S)
    workers = {name: after(BUSY, pid=pid, steps=0) for pid, name in enumerate("abc")}
    lines: list[str] = []
    for now in range(0, 301, 10):
        steps = {"a": now, "b": now, "c": now // 10}
        watch.hung({name: after(sign, steps=steps[name]) for name, sign in workers.items()}, float(now))
        lines += watch.slow(float(now))
    assert lines == [
        "the worker on host (process 2), in shard 3, at sample 000000012, is slow: 0.1 steps/s, the others do 1; "
        "the build goes on"
    ]


def test_a_worker_alone_is_never_slow() -> None:
    watch = Watch(HANG_S)
    for now in (0.0, 60.0, 120.0):
        watch.hung({"a": after(BUSY, beat=int(now))}, now)
        assert watch.slow(now) == []
