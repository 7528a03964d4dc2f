"""Examples that teach nothing: a run goes on without them, lists each once, and ends where they are too many."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from composer.core import Callback, State
from composer.loggers import Logger

from training.checkpoints.checkpoint import StopRequest
from training.config import TrainConfig
from training.engines import engine_of
from training.fit.parts import open_parts
from training.fit.skipped import too_many
from training.fit.trainer import WAIT_S, build_trainer
from training.fit.watch import Watch

pytestmark = pytest.mark.minutes(1)
SHORT = {"data.max_length": 54, "microbatch_size": 1, "steps": 16}  # cuts off every answer of 30 of the 128 examples
ANY = {"data.max_skipped": 1.0}
RUNS: dict[str, dict[str, Any]] = {
    "ddp": ANY,
    "fsdp-killed": {**ANY, "parallelism": "fsdp"},
    "zero3": {**ANY, "parallelism": "zero3"},
    "too-many": {},
}


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    settings: Callable[..., Any],
    run_jobs: Callable[..., Any],
    needed: list[str],
) -> Path:
    """A folder for each of RUNS that is needed; one is killed at step 6, behind a checkpoint, and started again."""
    folder = tmp_path_factory.mktemp("runs")
    jobs: list[dict[str, Any]] = []
    for name in needed:
        job = {"config": settings(folder / name, 2, {**SHORT, **RUNS[name]}), "ranks": 2}
        jobs += [{**job, "signal": signal.SIGKILL, "at": 6}, job] if name.endswith("killed") else [job]
    for job, codes in zip(jobs, run_jobs(folder, jobs), strict=True):
        run = Path(job["config"]["run"])
        expected = [-signal.SIGKILL] * 2 if "signal" in job else [1, 1] if run.name == "too-many" else [0, 0]
        assert codes == expected, (run / "output").read_text()[-4000:]
    return folder


def listed(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("fsdp-killed", marks=pytest.mark.needs("ddp", "fsdp-killed")),
        pytest.param("zero3", marks=[pytest.mark.needs("ddp", "zero3"), pytest.mark.slow]),
    ],
)
def test_every_engine_goes_on_without_them_and_lists_each_once(
    runs: Path, read_log: Callable[..., Any], name: str
) -> None:
    usual, other = (read_log(runs / folder) for folder in ("ddp", name))
    assert [line["step"] for line in other] == list(range(1, 17))
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in usual], rel=1e-4)
    lines = listed(runs / name)
    assert len(lines) == 30
    assert json.loads((runs / name / "summary.json").read_text())["skipped"] == 30
    assert "; 30 examples that teach nothing were skipped." in (runs / name / "model" / "README.md").read_text()
    assert sorted(map(str, lines)) == sorted(map(str, listed(runs / "ddp")))
    for line in lines:
        number = int(line["id"])
        assert line["image"] == (None if number % 6 == 5 else f"{number}.jpg")
    assert {line["reason"].partition(":")[0] for line in lines} == {"no supervised token within data.max_length"}


@pytest.mark.needs("too-many")
def test_too_many_end_the_run_with_their_reasons(runs: Path) -> None:
    said = (runs / "too-many" / "output").read_text()
    found = len(listed(runs / "too-many"))
    assert found > 10
    assert f"error: {found} of the first" in said
    assert f"  {found} x no supervised token within data.max_length: its first answer begins beyond the 54" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("skipped", "seen", "examples", "expected"),
    [
        (10, 100, 100, False),
        (11, 100, 100, True),
        (11, 16, 1000, False),
        (51, 900, 1000, True),
        (11, 11, 1000, True),
        (10, 10, 1000, False),
        (4, 4, 4, True),
        (3, 4, 4, False),
    ],
)
def test_a_few_are_allowed_at_any_rate_but_not_nothing_else(
    skipped: int, seen: int, examples: int, expected: bool
) -> None:
    assert too_many(skipped, seen, examples, rate=0.05) is expected


class LittleMemory(Callback):  # type: ignore[misc]
    """A device that holds two examples at a time, and from step 11 on one."""

    def fit_start(self, state: State, logger: Logger) -> None:
        state.auto_microbatching = True  # on GPUs alone for Composer

    def before_forward(self, state: State, logger: Logger) -> None:
        if len(state.batch["keys"]) > (2 if state.timestamp.batch.value < 10 else 1):
            raise RuntimeError("CUDA out of memory")


def test_a_step_that_begins_again_for_lack_of_memory_tells_of_its_whole_batch(
    settings: Callable[..., Any], read_log: Callable[..., Any], tmp_path: Path
) -> None:
    said = []
    for name, size, more in (("enough", 2, []), ("little", 8, [LittleMemory()])):
        config = TrainConfig.model_validate(settings(tmp_path / name, 1, {**SHORT, **ANY, "microbatch_size": size}))
        config = config.model_copy(update={"stop_on_spike": 1e-3})  # which step 11, the first that it bounds, is
        (tmp_path / name).mkdir()
        with StopRequest() as stop:
            watch = Watch(config.hang_s, WAIT_S)
            trainer, *_ = build_trainer(config, open_parts(config, 0, 1), engine_of(config, 1), 16, stop, watch)
            trainer.state.callbacks += more
            with pytest.raises(FloatingPointError, match="at step 11 is more than") as stopped:
                trainer.fit()
            trainer.close()
        said.append(re.findall(r"\d{9}#0", str(stopped.value)))
    assert said[0] == said[1] and len(said[0]) == 8
    assert listed(tmp_path / "enough") == listed(tmp_path / "little") != []
    for one, other in zip(*(read_log(tmp_path / name)[:10] for name in ("enough", "little")), strict=True):
        assert [one[key] for key in ("loss", "padding")] == [other[key] for key in ("loss", "padding")]
