"""What is left when all steps are done can be done again: by the same command, in one process; ranks: tests/engines."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipeline.encoder import describe_encoder
from pipeline.manifest import read_store
from pipeline.storage import Storage
from training.checkpoints.checkpoint import Checkpoints
from training.config import TrainConfig
from training.fit import stage
from training.fit.build import empty_model
from training.fit.callbacks import StepLog
from training.release.folder import replaced_folder

STEPS = 3


@pytest.fixture
def store(tmp_path: Path, parts: Path, new_store: Callable[..., Path]) -> Path:
    """A store of an encoder that lies beside it, and may be gone at the end."""
    shutil.copytree(parts / "clip", tmp_path / "clip")
    return new_store(tmp_path / "store", describe_encoder(str(tmp_path / "clip"), None), (1, 2, 4), 40)


@pytest.fixture
def config(tmp_path: Path, store: Path, settings: Callable[..., Any]) -> TrainConfig:
    return TrainConfig.model_validate(settings(tmp_path / "run", 2, {"data.store": str(store), "steps": STEPS}))


def in_the_last_step(patch: pytest.MonkeyPatch, happens: Callable[[], Any], last: int = STEPS) -> None:
    """Let something happen after the last step's line, before its checkpoint."""
    write = StepLog.batch_end

    def write_and_more(self: StepLog, state: Any, logger: Any) -> None:
        write(self, state, logger)
        if state.timestamp.batch.value == last:
            happens()

    patch.setattr(StepLog, "batch_end", write_and_more)


def test_an_end_that_failed_is_done_by_the_same_command_and_a_complete_run_says_so(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(config.run)
    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit, match="all steps are done: mend that"),
    ):
        in_the_last_step(patch, lambda: (tmp_path / "clip").rename(tmp_path / "away"))
        stage.train(config)
    assert (run / "connector").is_dir() and not (run / "model").exists() and not (run / "summary.json").exists()
    (tmp_path / "away").rename(tmp_path / "clip")
    (run / ".model.0123abcd").mkdir()  # as a process leaves it that is killed while it exports
    capsys.readouterr()
    stage.train(config)
    assert "trained   all 3 steps are done" in (said := capsys.readouterr().out) and "done      loss" in said
    assert not any(path.name.startswith(".") for path in run.iterdir())
    weights = load_file(run / "model" / "model.safetensors")

    shutil.rmtree(run / "model")  # and what is lost of the end comes back, even where the log is lost too
    (run / "log.jsonl").unlink()
    stage.train(config)
    assert "done      loss not known" in capsys.readouterr().out
    again = load_file(run / "model" / "model.safetensors")
    assert all(weight.equal(again[name]) for name, weight in weights.items())

    (run / "connector" / "connector.json").unlink()
    (run / "model" / "model.safetensors").write_bytes(b"")
    stage.train(config)
    again = load_file(run / "model" / "model.safetensors")
    assert all(weight.equal(again[name]) for name, weight in weights.items())

    capsys.readouterr()
    monkeypatch.setattr(stage, "open_parts", None)  # neither store nor model is opened
    shutil.rmtree(tmp_path / "store")
    stage.train(config)
    assert f"complete  {run} holds connector/ and model/ of 3 steps" in capsys.readouterr().out


def test_a_stop_in_the_last_step_leaves_the_end_to_the_same_command(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        in_the_last_step(patch, lambda: signal.raise_signal(signal.SIGTERM))
        stage.train(config)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not (Path(config.run) / "summary.json").exists()
    capsys.readouterr()
    stage.train(config)
    said = capsys.readouterr().out
    assert "step " not in said.partition("trained")[2] and "done      loss" in said


def test_a_disk_that_fills_while_a_checkpoint_is_written_is_told_with_its_place(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def enough_until_now(*_: Any) -> bool:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # bytes that a file takes from here on
        return False

    monkeypatch.setattr(Checkpoints, "_too_little_room", enough_until_now)
    try:
        with pytest.raises(SystemExit, match=rf"ba0000000{STEPS} cannot be written: .*File too large; mend that"):
            stage.train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((Path(config.run) / "checkpoints").glob("*/complete.json")) == []


def test_what_an_unfinished_checkpoint_takes_counts_as_room(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.fit import needs

    store = read_store(Storage(config.data.store))
    model = empty_model(config, store)
    nothing = shutil.disk_usage("/")._replace(free=0)
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda _: nothing)
    left = Path(config.run) / "checkpoints" / "ba00000002" / "composer.pt"
    left.parent.mkdir(parents=True)
    for size, level in ((2**20, "fail"), (2**30, "ok")):
        left.touch()
        os.truncate(left, size)
        assert [finding.level for finding in needs.disk(config, store, model)] == [level]


def test_a_last_checkpoint_without_its_mark_excuses_no_run_from_what_its_end_needs(
    config: TrainConfig, tmp_path: Path
) -> None:
    (Path(config.run) / "checkpoints" / f"ba{STEPS:08d}").mkdir(parents=True)
    (tmp_path / "clip").rename(tmp_path / "away")
    with pytest.raises(SystemExit, match="this run could not come to its end: the store's features"):
        stage.train(config)


def test_steps_that_are_lost_are_said_and_a_complete_run_is_not_trained_again(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(config.run)
    stage.train(config)
    shutil.rmtree(run / "checkpoints")
    (run / "model" / "config.json").unlink()
    before = (run / "log.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="is complete, but what it exported is missing or damaged"):
        stage.train(config)
    assert (run / "log.jsonl").read_bytes() == before
    (run / "summary.json").unlink()
    capsys.readouterr()
    stage.train(config)
    assert f"anew      no checkpoint has the {STEPS} steps of" in capsys.readouterr().out


def test_what_a_killed_export_leaves_is_swept_and_never_taken_for_whole(tmp_path: Path) -> None:
    def left(name: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)

    for name in (".model.00000001", ".model.00000002.gone", ".model.mine", ".models.00000001"):
        left(name)
    left(".model.00000003.old")  # moved away for a new one, which did not come
    with pytest.raises(KeyError), replaced_folder(tmp_path / "model") as fresh:
        assert (tmp_path / "model" / "config.json").read_text() == ".model.00000003.old"
        (fresh / "config.json").write_text("new")
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.mine", ".models.00000001", "model"]
    assert (tmp_path / "model" / "config.json").read_text() == ".model.00000003.old"
    with pytest.raises(FileNotFoundError), replaced_folder(tmp_path / "model") as first:
        with replaced_folder(tmp_path / "model") as second:
            (second / "config.json").write_text("second")
        (first / "config.json").write_text("first")  # another process has begun meanwhile: this one fails
    assert (tmp_path / "model" / "config.json").read_text() == "second"


@pytest.mark.slow
def test_dropout_goes_on_where_it_was_within_an_epoch_and_between_two(
    settings: Callable[..., Any], read_log: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps are an epoch of the store's 128 examples."""
    changes = {"steps": 4, "global_batch_size": 64, "microbatch_size": 64, "model.lora": {"rank": 2, "dropout": 0.5}}
    losses = []
    for at in (None, 2, 3):
        config = TrainConfig.model_validate(settings(tmp_path / f"stopped-{at}", 2, changes))
        if at is not None:
            with monkeypatch.context() as patch, pytest.raises(SystemExit):
                in_the_last_step(patch, lambda: signal.raise_signal(signal.SIGTERM), last=at)
                stage.train(config)
        stage.train(config)
        losses.append([line["loss"] for line in read_log(Path(config.run))])
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 4
