"""Two ranks on gloo: every engine has the same losses, weights, resumption and end, in both stages."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from pipeline.manifest import read_store
from pipeline.storage import Storage
from training.config import TrainConfig
from training.fit.optimizer import cosine_with_warmup
from training.fit.trained import trained_model

pytestmark = pytest.mark.minutes(3)
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
# fp32 sums in another order, over 20 steps of Adam; measured: below 2e-6 (losses) and 1e-4 of the largest weight.
LOSS, WEIGHT = 1e-5, 1e-3
LAST_FILE = {1: "connector.json", 2: "README.md"}  # of what a stage exports: all before it is written already


def of_every_engine(stage: int) -> pytest.MarkDecorator:
    return pytest.mark.needs(*(f"{engine}-{stage}" for engine in ENGINES))


def killed(engine: str, stage: int) -> Any:
    """Stage 1 of an engine of each kind is tried at once, the others in `make test-slow`."""
    marks = [pytest.mark.needs(f"{engine}-{stage}", f"{engine}-{stage}-killed")]
    quick = stage == 1 and engine in ("fsdp", "zero2")
    return pytest.param(engine, stage, marks=marks if quick else [*marks, pytest.mark.slow])


STAGES = [
    pytest.param(1, marks=of_every_engine(1)),
    pytest.param(2, marks=[of_every_engine(2), pytest.mark.slow]),
]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    settings: Callable[..., Any],
    run_jobs: Callable[..., Any],
    needed: list[str],
) -> Path:
    """Folders <engine>-<stage>, and <engine>-<stage>-killed: killed with SIGKILL, and started again, over and over.

    First at step 6; then in its last export, when all steps are done; then it ends; then there is nothing left to do.
    """
    folder = tmp_path_factory.mktemp("engines")
    jobs = []
    for name in needed:
        engine, stage, *end = name.split("-")
        job = {"config": settings(folder / name, int(stage), {"parallelism": engine}), "ranks": 2}
        export = {"killed_writing": LAST_FILE[int(stage)]}
        jobs += [{**job, "signal": signal.SIGKILL, "at": 6}, {**job, **export}, job, job] if end else [job]
    codes = run_jobs(folder, jobs)
    for job, code in zip(jobs, codes, strict=True):
        # Rank 0 alone writes; the other one is killed too, unless it first fails of the silence.
        dead = {"signal": [-signal.SIGKILL] * 2, "killed_writing": [-signal.SIGKILL, code[1] or 1]}
        expected = next((codes for end, codes in dead.items() if end in job), [0, 0])
        assert code == expected, Path(job["config"]["run"], "output").read_text()[-4000:]
    return folder


def losses(log: list[dict[str, float]]) -> list[float]:
    assert [line["step"] for line in log] == list(range(1, 21))
    return [line["loss"] for line in log]


@pytest.mark.parametrize("stage", STAGES)
def test_every_engine_has_the_losses_and_gradient_norms_of_ddp(
    runs: Path, read_log: Callable[..., Any], stage: int
) -> None:
    usual = read_log(runs / f"ddp-{stage}")
    assert losses(usual)[-1] < losses(usual)[0]
    assert [line["lr"] for line in usual] == [2e-3 * cosine_with_warmup(step, 20, 0.1) for step in range(20)]
    for engine in ENGINES[1:]:
        log = read_log(runs / f"{engine}-{stage}")
        assert losses(log) == pytest.approx(losses(usual), rel=LOSS), engine
        for name in ("grad_norm", "lr"):
            assert [line[name] for line in log] == pytest.approx([line[name] for line in usual], rel=1e-3), engine


@pytest.mark.parametrize(("engine", "stage"), [killed(engine, stage) for engine in ENGINES for stage in (1, 2)])
def test_a_killed_run_has_the_losses_of_an_undisturbed_one(
    runs: Path, read_log: Callable[..., Any], engine: str, stage: int
) -> None:
    whole, killed = (losses(read_log(runs / f"{engine}-{stage}{end}")) for end in ("", "-killed"))
    assert killed == whole  # to the last bit


@pytest.mark.parametrize(("engine", "stage"), [killed(engine, stage) for engine in ENGINES for stage in (1, 2)])
def test_a_run_that_is_killed_while_it_exports_ends_with_the_same_command(runs: Path, engine: str, stage: int) -> None:
    whole, run = (runs / f"{engine}-{stage}{end}" for end in ("", "-killed"))
    said = (run / "output").read_text()
    trained, ended = said.split("trained   all 20 steps are done")  # said once: the last start found all done
    assert "step 20/20" in trained
    assert "step " not in ended
    assert ended.index("done      loss") < ended.index(f"complete  {run} holds connector/")
    assert {path.name for path in run.iterdir()} - {"signal-sent"} == {path.name for path in whole.iterdir()}  # no half
    for path in [*whole.glob("connector/*"), *whole.glob("model/*.safetensors")]:
        assert (run / path.relative_to(whole)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_every_engine_exports_the_weights_of_ddp(runs: Path, stage: int) -> None:
    name = "connector/connector.safetensors" if stage == 1 else "model/model.safetensors"
    usual = load_file(runs / f"ddp-{stage}" / name)
    for engine in ENGINES[1:]:
        found = load_file(runs / f"{engine}-{stage}" / name)
        assert found.keys() == usual.keys()
        for key, weight in usual.items():
            torch.testing.assert_close(found[key], weight, rtol=0, atol=WEIGHT * float(weight.abs().max()), msg=key)


@pytest.mark.parametrize("stage", STAGES)
def test_the_weights_come_out_of_every_engines_checkpoint_without_its_ranks(
    runs: Path, settings: Callable[..., Any], stage: int
) -> None:
    for engine in ENGINES:
        run = runs / f"{engine}-{stage}"
        config = TrainConfig.model_validate(settings(run, stage, {"parallelism": engine}))
        newest = max((run / "checkpoints").glob("ba*"))
        state = trained_model(config, read_store(Storage(config.data.store)), run, newest).state_dict()
        exported = load_file(run / "all.safetensors")
        assert state.keys() == exported.keys()
        assert all(torch.equal(state[name], weight) for name, weight in exported.items()), engine


@of_every_engine(1)
@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_weights_keep_their_bytes(runs: Path, parts: Path, engine: str) -> None:
    before = load_file(parts / "llm" / "model.safetensors")
    after = load_file(runs / f"{engine}-1" / "all.safetensors")
    assert {f"llm.{name}" for name in before} < after.keys()
    assert all(torch.equal(after[f"llm.{name}"], weight) for name, weight in before.items())


@of_every_engine(1)
def test_a_checkpoint_of_stage_1_holds_nothing_of_the_frozen_model(runs: Path) -> None:
    """Neither weight nor moment: fp32 weights of the connector and two moments, and little beside them."""
    for engine in ENGINES:
        run = runs / f"{engine}-1"
        weights = sum(w.numel() for w in load_file(run / "connector" / "connector.safetensors").values())
        newest = max((run / "checkpoints").glob("ba*"))
        size = sum(json.loads((newest / "complete.json").read_text())["files"].values())
        frozen = sum(w.numel() for w in load_file(run / "all.safetensors").values()) - weights
        assert frozen > 0.3 * weights
        extra = 4 * weights if engine in ("zero1", "zero2") else 0  # their weights and their master copies
        assert size - 12 * weights - extra < 300_000 < 4 * frozen, engine  # fsdp's metadata alone has some 250 kB
        for shards in newest.glob("ep*"):
            assert not any("llm" in name for name in FileSystemReader(shards).read_metadata().state_dict_metadata)
