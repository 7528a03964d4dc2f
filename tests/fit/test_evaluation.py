"""Held-out examples: what is measured is right, leaves no trace in training, and says which step is the best."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.minutes(2)
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
HELD = {"data.validation": {"share": 0.2, "interval": "3ba"}, "steps": 8, "checkpoint.interval": "2ba"}
DROPOUT = {"model.lora": {"rank": 4, "alpha": 8, "dropout": 0.3}, "train": ["connector", "llm"]}
SELDOM = {"data.validation": {"share": 0.2, "interval": "999ba"}}
MEASURED = ("heldout_loss", "heldout_accuracy", "heldout_s")
PLACES = {"step_s", "samples_per_s", "tokens_per_s", "data_wait", "eta_s", "memory_gb"}  # what no two runs share

# name: (stage, ranks, settings, what happens)
RUNS: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    **{f"{engine}-often": (2, 2, {**DROPOUT, "parallelism": engine}, {}) for engine in ENGINES},
    **{f"{engine}-seldom": (2, 2, {**DROPOUT, "parallelism": engine, **SELDOM}, {}) for engine in ENGINES},
    **{
        f"{engine}-killed": (2, 2, {**DROPOUT, "parallelism": engine}, {"in_evaluation": [5, signal.SIGKILL]})
        for engine in ENGINES
    },
    **{
        f"{engine}-stopped": (2, 2, {**DROPOUT, "parallelism": engine}, {"in_evaluation": [5, signal.SIGTERM]})
        for engine in ENGINES
    },
}


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    settings: Callable[..., Any],
    run_jobs: Callable[..., Any],
    needed: list[str],
) -> Path:
    """A folder for each of RUNS that is needed; those to which something happens are started again."""
    folder = tmp_path_factory.mktemp("heldout")
    jobs = []
    for name in needed:
        stage, ranks, changes, happens = RUNS[name]
        job = {"config": settings(folder / name, stage, {**HELD, **changes}), "ranks": ranks}
        jobs += [{**job, **happens}, job] if happens else [job]
    codes = run_jobs(folder, jobs)
    for job, code in zip(jobs, codes, strict=True):
        said = Path(job["config"]["run"], "output").read_text()[-4000:]
        if "in_evaluation" not in job:
            assert code == [0] * job["ranks"], said
        elif job["in_evaluation"][1] == signal.SIGTERM:
            assert code == [128 + signal.SIGTERM] * job["ranks"], said
        else:
            assert -signal.SIGKILL in code, said
    return folder


def comparable(log: list[dict[str, float]], *without: str) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in PLACES.union(without)} for line in log]


@pytest.mark.parametrize(
    "engine", [pytest.param(e, marks=pytest.mark.needs(f"{e}-often", f"{e}-seldom")) for e in ENGINES]
)
def test_training_has_the_same_numbers_however_often_it_is_measured(
    runs: Path, read_log: Callable[..., Any], engine: str
) -> None:
    often, seldom = (read_log(runs / f"{engine}-{name}") for name in ("often", "seldom"))
    assert [line["step"] for line in often if "heldout_loss" in line] == [3, 6, 8]
    assert [line["step"] for line in seldom if "heldout_loss" in line] == [8]
    assert comparable(often, *MEASURED) == comparable(seldom, *MEASURED)  # to the last bit
    weights, same = (load_file(runs / f"{engine}-{name}" / "all.safetensors") for name in ("often", "seldom"))
    assert all(weights[name].equal(weight) for name, weight in same.items())


@pytest.mark.parametrize(
    ("engine", "end"),
    [
        pytest.param(e, end, marks=pytest.mark.needs(f"{e}-often", f"{e}-{end}"))
        for e in ENGINES
        for end in ("killed", "stopped")
    ],
)
def test_a_run_that_ends_within_an_evaluation_goes_on_as_if_it_had_not(
    runs: Path, read_log: Callable[..., Any], engine: str, end: str
) -> None:
    whole, run = (read_log(runs / f"{engine}-{name}") for name in ("often", end))
    assert comparable(run, "heldout_s") == comparable(whole, "heldout_s")
    assert [("heldout_s" in line) for line in run] == [("heldout_s" in line) for line in whole]
