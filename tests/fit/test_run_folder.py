"""The folder of a run: one process, one run; what a failed try leaves, what may change, what is damaged."""

from __future__ import annotations

import errno
import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from training.config import MAY_CHANGE, TrainConfig, flat
from training.fit import run_folder
from training.fit.identity import SOURCES, refuse_another
from training.fit.parts import STORE
from training.fit.run_folder import LOCK, held, working
from training.release.records import CONFIG, IN_EVERY_LINE, LOG, SKIPPED, SUMMARY

ROOT = Path(__file__).resolve().parents[2]
Settings = Callable[..., dict[str, Any]]
SHORT = {"steps": 2, "checkpoint.interval": "1ba"}


@pytest.fixture(scope="module")
def train(settings: Settings) -> Callable[..., TrainConfig]:
    """train(run, changes): a stage of two steps, in this process."""

    def run(folder: Path, changes: dict[str, Any] | None = None) -> TrainConfig:
        from training.fit import stage

        config = TrainConfig.model_validate(settings(folder, 1, {**SHORT, **(changes or {})}))
        stage.train(config)
        return config

    return run


@pytest.fixture(scope="module")
def begun(train: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps; tests copy it."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    train(folder)
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    """A copy of it, elsewhere."""
    return Path(shutil.copytree(begun, tmp_path / "moved" / "run"))


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as error:
        refuse_another(TrainConfig.model_validate(config))
    return str(error.value)


def test_a_failed_try_leaves_nothing_that_a_corrected_one_trips_over(
    train: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    for wrong in ({"model.connector.blocks": [1, 3]}, {"model.connector_from": "/nowhere"}, {"global_batch_size": 999}):
        with pytest.raises(SystemExit):
            train(folder, {"optimizer.lr": 1.0, **wrong})
        assert not folder.exists()
    train(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["checkpoints", CONFIG, "connector", LOG, SOURCES, STORE, SUMMARY]
    )
    capsys.readouterr()


def test_the_room_for_an_export_is_what_it_takes(
    settings: Settings, run_store: Path, train: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    from pipeline.manifest import read_store
    from pipeline.storage import Storage
    from training.fit.build import empty_model
    from training.fit.needs import _export_bytes

    store = read_store(Storage(run_store))
    for name, changes in (("whole", {}), ("adapters", {"model.lora": {"rank": 2}})):
        config = train(tmp_path / name, {"train": ["connector", "llm"], **changes})
        took = sum(path.stat().st_size for path in (tmp_path / name).glob("*/*.safetensors"))
        assert _export_bytes(config, store, empty_model(config, store)) == pytest.approx(took, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"steps": 20, "checkpoint.interval": "3ba"}, 7),
        ({"steps": 20, "checkpoint.interval": "0ba"}, 2),  # only where it is stopped
        ({"steps": None, "epochs": 5, "checkpoint.interval": "2ep"}, 3),
        ({"steps": 20, "epochs": 5, "checkpoint.interval": "2ep"}, 2),  # how many epochs 20 steps are, the data tell
        ({"steps": None, "epochs": 5, "checkpoint.interval": "3ba"}, 2),
    ],
)
def test_of_all_checkpoints_as_many_are_reckoned_with_as_the_settings_tell(
    settings: Settings, tmp_path: Path, changes: dict[str, Any], count: int
) -> None:
    from training.fit.needs import _checkpoints

    config = settings(tmp_path, 1, {**changes, "checkpoint.keep": -1})
    assert _checkpoints(TrainConfig.model_validate(config)) == count


def test_a_complete_run_says_so_in_a_folder_that_cannot_be_written_and_another_says_that_it_cannot(
    run: Path, train: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (run / LOCK).mkdir()  # as little a file as in a folder that is read-only, for root too
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    train(run)
    assert re.search(r"complete  .*run holds connector/ of 2 steps, .*nothing is left to do", capsys.readouterr().out)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before
    (run / SUMMARY).unlink()
    (tmp_path / "file").touch()
    for folder in (run, tmp_path / "file" / "run"):
        with pytest.raises(SystemExit, match=f"^error: {folder} cannot be written: .*; make it writable, or take ano"):
            train(folder)


def test_make_clean_leaves_runs_alone() -> None:
    said = subprocess.run(["make", "-n", "clean"], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert ".venv" in said
    assert "runs" not in said.split()


def test_the_same_run_by_another_path_is_the_same_run(
    run: Path, settings: Settings, run_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = shutil.copytree(run_store, tmp_path / "a copy of the store")
    refuse_another(TrainConfig.model_validate(settings(run, 1, {**SHORT, "data.store": str(store)})))
    monkeypatch.chdir(run.parent)
    refuse_another(TrainConfig.model_validate(settings(Path("run"), 1, SHORT)))


def test_another_store_at_the_same_path_is_noticed(
    run: Path, settings: Settings, new_store: Any, run_store: Path
) -> None:
    from pipeline.manifest import read_store
    from pipeline.storage import Storage

    encoder = read_store(Storage(run_store)).encoder
    other = new_store(run.parent / "other", encoder, (1, 2, 4), 64)
    said = refused(settings(run, 1, {**SHORT, "data.store": str(other)}))
    assert f"data.store: {run_store} -> {other}, which holds another store" in said
    config = json.loads((run / CONFIG).read_text())
    config["data"]["store"] = str(other)  # as if the store there had been built anew
    (run / CONFIG).write_text(json.dumps(config))
    assert "which holds another store" in refused(settings(run, 1, {**SHORT, "data.store": str(other)}))


def test_a_run_goes_on_with_the_shards_that_it_began_with(
    run: Path, settings: Settings, run_store: Path, grown: Any, tmp_path: Path
) -> None:
    """Samples that were retried are further shards; whoever begins now sees them, the run does not."""
    from pipeline.manifest import fingerprint
    from pipeline.storage import Storage
    from training.fit.parts import shards_at_start

    before, after = grown(run_store, tmp_path)
    config = TrainConfig.model_validate(settings(run, 1, {**SHORT, "data.store": str(after)}))
    (run / STORE).write_text(fingerprint(Storage(before)) + "\n")
    refuse_another(config)
    shards = json.loads((after / "store.json").read_text())["shards"]
    assert shards_at_start(config) == (shards,)
    (run / STORE).unlink()  # of the time before fingerprints, when no shard could come
    assert shards_at_start(config) == (shards,)
    assert shards_at_start(config.model_copy(update={"run": str(tmp_path / "new")})) == (None,)


def test_a_complete_run_without_its_settings_gets_them_back(
    run: Path, train: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    log, settings = (run / LOG).read_bytes(), json.loads((run / CONFIG).read_text())
    (run / CONFIG).unlink()
    train(run)
    said = capsys.readouterr().out
    assert "trained   all 2 steps are done" in said and "done      loss" in said
    assert (run / LOG).read_bytes() == log
    assert json.loads((run / CONFIG).read_text()) == settings | {"run": str(run)}


def as_before(run: Path, changes: dict[str, Any]) -> None:
    """Make a run's settings what an older version wrote: with the paths of the time, without a fingerprint."""
    (run / STORE).unlink()
    config = json.loads((run / CONFIG).read_text())
    del config["data"]["limit"]  # a setting that did not exist yet
    config["data"] |= changes
    (run / CONFIG).write_text(json.dumps(config | {"run": "/where/it/lay/then"}))


def test_a_run_of_the_time_before_fingerprints_is_taken_up(
    run: Path, settings: Settings, run_store: Path, tmp_path: Path, train: Callable[..., TrainConfig]
) -> None:
    as_before(run, {})
    copy = str(shutil.copytree(run_store, tmp_path / "copy"))
    refuse_another(TrainConfig.model_validate(settings(run, 1, {**SHORT, "data.store": copy})))
    (run / SUMMARY).unlink()
    shutil.rmtree(run / "checkpoints" / "ba00000002")
    train(run)  # step 2 again
    assert re.fullmatch(r"[0-9a-f]{64}\n", (run / STORE).read_text())
    as_before(run, {"store": "/no/more"})
    assert f"data.store: /no/more -> {run_store}" in refused(settings(run, 1, SHORT))


def test_what_may_change_may_and_the_rest_is_shown_key_by_key(run: Path, settings: Settings) -> None:
    free = {
        "boards": ["tensorboard"],
        "checkpoint.interval": "2ba",
        "checkpoint.remote_patience_s": 1.0,
        "data.threads": 2,
        "data.cache_dir": "/nvme",
        "microbatch_size": 4,
        "model.activation_checkpointing": True,
    }
    refuse_another(TrainConfig.model_validate(settings(run, 1, SHORT | free)))
    said = refused(
        settings(run, 1, SHORT | free | {"optimizer.lr": 0.5, "data.seed": 3, "model.connector.kernel_size": 4})
    )
    assert said.splitlines()[1:] == [
        "  model.connector.kernel_size: 2 -> 4",
        "  data.seed: 0 -> 3",
        "  optimizer.lr: 0.002 -> 0.5",
    ]
    # A mean over microbatches depends on their size.
    said = refused(settings(run, 1, SHORT | {"loss": "microbatch", "microbatch_size": 4}))
    assert "microbatch_size: None -> 4" in said


def test_what_may_change_are_settings(settings: Settings, tmp_path: Path) -> None:
    known = flat(TrainConfig.model_validate(settings(tmp_path, 1)).model_dump(mode="json"))
    assert known.keys() >= MAY_CHANGE


@pytest.mark.parametrize(
    ("name", "contents", "words"),
    [
        (CONFIG, '{"run": "x", "tra', "config.json is damaged"),
        (CONFIG, "[" * 100_000, "config.json is damaged"),
        (CONFIG, "[1, 2]", "config.json is damaged"),
        (CONFIG, '{"model": 3}', "config.json is damaged, or of another version of this program: train: "),
        (SUMMARY, "", "summary.json is damaged"),
        (SUMMARY, '{"steps": "many"}', "summary.json is damaged, or of another version of this program: steps: "),
        (LOG, '{"step": 1}\n{"step": 2}\n', "log.jsonl:1 is damaged"),
        (LOG, "\0\0\0\n{}\n", "log.jsonl:1 is damaged"),
        (SKIPPED, '{"step": 1, "key"\n{}\n', "skipped.jsonl:1 is damaged"),
        (SKIPPED, '{"step": 1, "key": "0#0"}\n', "skipped.jsonl:1 is damaged"),
        (STORE, "0123", "store.sha256 is damaged"),
        (SOURCES, "{", "sources.json is damaged"),
        (SOURCES, '["a"]', "sources.json is damaged"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(
    run: Path, settings: Settings, name: str, contents: str, words: str
) -> None:
    (run / name).write_text(contents)
    said = refused(settings(run, 1, SHORT))
    assert words in said
    assert "delete" in said


def test_a_log_that_is_cut_back_is_never_half_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one stays until the new one is whole."""
    from training.release import records

    before = (run / LOG).read_bytes()
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        records.write_whole(run / LOG, "")
    assert (run / LOG).read_bytes() == before


class NoStop:
    signal = 0


@contextmanager
def another_process(run: Path) -> Iterator[subprocess.Popen[str]]:
    """One that works in the folder, and says so."""
    code = (
        "import fcntl, sys\n"
        f"file = open({str(run / LOCK)!r}, 'a+')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "file.write('pid 7 on node7 since noon'); file.flush(); print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_folder_in_which_another_process_works_is_refused_and_a_dead_ones_lock_taken_over(
    run: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_folder, "PATIENCE_S", 0)
    config = TrainConfig.model_validate(settings(run, 1, SHORT))
    with another_process(run) as process:
        assert working(run) == "pid 7 on node7 since noon"
        with (
            pytest.raises(ValueError, match=r"another process works in .*: pid 7 on node7 since noon"),
            held(config, NoStop()),
        ):
            pass
        with held(config, None):  # --check only looks
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (run / LOCK).exists()
        assert working(run) is None
        with held(config, NoStop()):
            assert re.fullmatch(r"pid \d+ on \S+ since \S+ \S+ UTC", (run / LOCK).read_text())
        assert not (run / LOCK).exists()


def test_the_lock_of_another_process_stays(run: Path, settings: Settings) -> None:
    with held(TrainConfig.model_validate(settings(run, 1, SHORT)), NoStop()):
        (run / LOCK).unlink()  # by someone who took this process for dead
        (run / LOCK).write_text("another's")
    assert (run / LOCK).read_text() == "another's"


def test_two_that_look_at_once_do_not_take_each_other_for_a_run(run: Path) -> None:
    (run / LOCK).touch()  # as a dead process leaves it
    with (run / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert working(run) is None


def test_who_waits_for_a_folder_gets_it_when_it_is_free(
    run: Path, settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with another_process(run) as process:
        monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: (process.kill(), process.wait()))
        with held(TrainConfig.model_validate(settings(run, 1, SHORT)), NoStop()):
            assert "pid 7" not in (run / LOCK).read_text()
    assert "waiting   another process works in" in capsys.readouterr().out


def test_a_signal_ends_the_wait_for_a_folder_as_it_ends_a_run(
    run: Path, train: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
    with another_process(run), pytest.raises(SystemExit) as stopped:
        train(run)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "stopped   by signal 15 while another process works in" in capsys.readouterr().out


def test_only_numbers_that_readers_count_on_are_asked_of_a_log(run: Path) -> None:
    first = json.loads((run / LOG).read_text().splitlines()[0])
    assert set(IN_EVERY_LINE) <= first.keys()


def test_a_file_system_without_locks_is_said(
    run: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    with held(TrainConfig.model_validate(settings(run, 1, SHORT)), NoStop()):
        assert (run / LOCK).exists()
    assert "no file can be locked here" in caplog.text
