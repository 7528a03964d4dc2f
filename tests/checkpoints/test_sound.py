"""A checkpoint is taken if its bytes are those that were written, from disk or bucket, and if it names no code."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as sharded

from fixtures.hostile import mark_again, poison_metadata, poison_shard, poison_torch_file
from pipeline.config import load_config
from training.checkpoints.mark import FOLDER, MARK, read_mark, write_mark
from training.checkpoints.remote import Remote
from training.checkpoints.resume import find, newest_on_disk
from training.checkpoints.safe import only_data, refuse_code
from training.config import CheckpointSettings, TrainConfig
from training.engines import engine_class
from training.engines.base import Engine

SETTINGS = Path(__file__).parents[2] / "training" / "pretrain.yaml"
BUCKET = "sound"


def state() -> dict[str, Any]:
    """Of the kinds that Composer saves."""
    return {
        "model": {"weight": torch.arange(300.0)},
        "rng": [{"python": random.Random(0).getstate(), "numpy": np.random.RandomState(0).get_state()}],
        "time": timedelta(seconds=3),
    }


def ddp(folder: Path) -> Path:
    folder.mkdir(parents=True)
    torch.save({"state": state()}, folder / "composer.pt")
    return mark_again(folder, "ddp")


def fsdp(folder: Path) -> Path:
    sharded.save({"state": state()}, checkpoint_id=folder / "ep0", no_dist=True)
    return mark_again(folder, "fsdp")


def engine(name: str) -> Engine:
    config = load_config(TrainConfig, SETTINGS, ["run=none", "data.store=none", "model.llm=none"])
    return engine_class(name)(name, config, 1)


def found(folder: Path, engine_name: str = "ddp", **settings: Any) -> Path | None:
    return find(folder, CheckpointSettings(**settings), engine(engine_name))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.fixture(scope="module")
def bucket(s3: dict[str, str]) -> Any:
    client = boto3.client("s3", endpoint_url=s3["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket=BUCKET)
    return client


@pytest.fixture
def remote(bucket: Any) -> Callable[[Path], str]:
    """remote(folder of checkpoints): its address in a bucket, where a copy of them lies."""

    def copy(folder: Path) -> str:
        prefix = uuid.uuid4().hex
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                bucket.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}")
        return f"s3://{BUCKET}/{prefix}"

    return copy


@pytest.mark.parametrize("write", [ddp, fsdp])
def test_every_flipped_bit_is_noticed(
    tmp_path: Path, write: Callable[[Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = write(tmp_path / "ba00000004"), write(tmp_path / "ba00000008")
    files = [path for path in sorted(newer.rglob("*")) if path.is_file()]
    rng = random.Random(0)
    for number in range(20):
        path = files[number % len(files)]
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        caplog.clear()
        assert found(tmp_path, write.__name__) == older / ("composer.pt" if write is ddp else "ep0"), (path, bit)
        (line,) = caplog.messages
        assert str(path) in line and "an older checkpoint, is taken" in line
        flip(path, bit)
    assert found(tmp_path, write.__name__) == newer / ("composer.pt" if write is ddp else "ep0")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: os.truncate(folder / "composer.pt", 100), r"composer.pt has 100 bytes instead of \d+"),
        (lambda folder: (folder / "composer.pt").unlink(), "composer.pt is missing"),
        (lambda folder: (folder / MARK).write_text("{"), "complete.json is damaged"),
        (lambda folder: (folder / MARK).write_bytes(b""), "complete.json is damaged"),
    ],
)
def test_a_damaged_one_is_passed_over_with_its_file_named(
    tmp_path: Path, damage: Callable[[Path], Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = ddp(tmp_path / "ba00000004"), ddp(tmp_path / "ba00000008")
    damage(newer)
    assert found(tmp_path) == older / "composer.pt"
    assert caplog.text.count(newer.name) == 1
    assert newest_on_disk(tmp_path) == (older, read_mark(older))
    damage(older)
    for look in (found, newest_on_disk):
        caplog.clear()
        with pytest.raises(OSError, match=r"no checkpoint in .* is sound"):
            look(tmp_path)
        assert [bool(re.search(said, line)) for line in caplog.messages] == [True, True]


def test_nothing_but_an_unfinished_one_means_the_first_step_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert found(tmp_path) is None
    assert not caplog.messages
    (ddp(tmp_path / "ba00000004") / MARK).unlink()
    assert found(tmp_path) is None
    assert "ba00000004 was not finished, and none before it: starting from the first step" in caplog.text
    assert newest_on_disk(tmp_path) is None


def test_marks_of_before_load_and_digests_can_be_left_out(tmp_path: Path) -> None:
    folder = ddp(tmp_path / "ba00000004")
    mark = json.loads((folder / MARK).read_text())
    old = {name: value for name, value in mark.items() if name not in ("sha256", "seal")}
    (folder / MARK).write_text(json.dumps(old, indent=1))
    flip(folder / "composer.pt", 8 * 700)  # nobody noted what was there
    assert found(tmp_path) == folder / "composer.pt"
    (folder / MARK).write_text(json.dumps(mark))
    assert found(tmp_path, verify=False) == folder / "composer.pt"
    with pytest.raises(OSError, match="no checkpoint in"):
        found(tmp_path)


def test_the_checkpoint_of_another_run_is_refused_with_what_differs(
    tmp_path: Path, remote: Callable[[Path], str]
) -> None:
    folder = ddp(tmp_path / "there" / "ba00000004")
    settings = engine("ddp").config.plain_identity()
    mark = read_mark(folder)
    assert mark is not None
    write_mark(folder, replace(mark, run=settings | {"optimizer.lr": 5.0, "a setting of later": 1}))
    with pytest.raises(ValueError, match=r"with other settings: optimizer.lr: 5.0 in it, 0.001 now; set them back"):
        found(folder.parent)
    with pytest.raises(ValueError, match=r"with other settings: optimizer.lr: 5.0 in it, 0.001 now; set them back"):
        found(tmp_path / "here", remote=remote(folder.parent))  # two runs with one bucket
    del settings["optimizer.eps"]  # a setting that did not exist yet
    write_mark(folder, replace(mark, run=settings | {"a setting of later": 1}))
    assert found(folder.parent) == folder / "composer.pt"


def test_sealed_marks_of_before_runs_were_noted_are_whole(tmp_path: Path) -> None:
    folder = ddp(tmp_path / "ba00000004")
    mark = json.loads((folder / MARK).read_text())
    del mark["run"]
    mark["seal"] = hashlib.sha256(json.dumps(mark | {"seal": None}, sort_keys=True).encode()).hexdigest()
    (folder / MARK).write_text(json.dumps(mark))
    assert found(tmp_path) == folder / "composer.pt"


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../composer.pt": 3}},
        {"files": {"/etc/passwd": 3}},
        {"files": [1]},
        {"load": "../x"},
        {"load": "other.pt"},
        {"step": "4"},
        {"more": 1},
        {"sha256": {}},
    ],
)
def test_a_mark_that_leads_elsewhere_or_holds_other_things_is_none(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = ddp(tmp_path / "ba00000004")
    mark = json.loads((folder / MARK).read_text()) | {"seal": None}
    (folder / MARK).write_text(json.dumps(mark | change))
    assert read_mark(folder) is None
    (folder / MARK).write_text(json.dumps(mark))
    assert read_mark(folder) is not None


def test_what_is_damaged_here_is_fetched_from_the_bucket(
    tmp_path: Path, remote: Callable[[Path], str], caplog: pytest.LogCaptureFixture
) -> None:
    here = tmp_path / "here"
    ddp(here / "ba00000004")
    newer = ddp(here / "ba00000008")
    url = remote(here)
    sound = {name: (newer / name).read_bytes() for name in ("composer.pt", MARK)}
    for name in sound:
        flip(newer / name, 700)
        assert found(here, remote=url) == newer / "composer.pt"
        assert f"{newer}/{name}" in caplog.text
        assert {name: (newer / name).read_bytes() for name in sound} == sound
    shutil.rmtree(here)  # an empty disk
    assert found(here, remote=url) == newer / "composer.pt"
    assert {name: (newer / name).read_bytes() for name in sound} == sound


@pytest.mark.parametrize("damaged", [True, False])
def test_what_a_killed_download_left_is_swept(tmp_path: Path, remote: Callable[[Path], str], damaged: bool) -> None:
    checkpoint = ddp(tmp_path / "ba00000004")
    url = remote(tmp_path)
    left = [checkpoint / f"composer.pt.{uuid.uuid4()}.tmp{end}" for end in ("", ".6eF0A7c1")]
    for path in left:
        path.write_bytes(b"half of it")
    if damaged:
        (checkpoint / MARK).unlink()
        (checkpoint / "composer.pt").unlink()
    with pytest.raises(ValueError, match="no file of this kind"):
        refuse_code(checkpoint, "ddp")
    assert found(tmp_path, remote=url) == checkpoint / "composer.pt"
    assert sorted(path.name for path in checkpoint.iterdir()) == [MARK, "composer.pt"]


@pytest.mark.parametrize("name", ["composer.pt", MARK])
def test_what_is_damaged_in_the_bucket_is_not_taken(
    tmp_path: Path, remote: Callable[[Path], str], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    there = tmp_path / "there"
    ddp(there / "ba00000004")
    flip(ddp(there / "ba00000008") / name, 700)
    url = remote(there)
    assert found(tmp_path / "here", remote=url) == tmp_path / "here" / "ba00000004" / "composer.pt"
    assert f"ba00000008/{name}" in caplog.text
    (there / "ba00000004" / "composer.pt").unlink()
    url = remote(there)
    with pytest.raises(OSError, match=f"no checkpoint in .* or {url} is sound"):
        found(tmp_path / "empty", remote=url)


@pytest.mark.parametrize("keep", [1, 2, -1])
def test_overtaken_uploads_do_not_stay_in_a_bucket(
    tmp_path: Path, remote: Callable[[Path], str], bucket: Any, keep: int
) -> None:
    folders = [ddp(tmp_path / f"ba{step:08d}") for step in (2, 4, 6, 8, 10)]
    for overtaken in (1, 2, 4):
        (folders[overtaken] / MARK).unlink()  # 4 and 6 were overtaken by 8; 10 is on its way
    url = remote(tmp_path)
    Remote(url).drop_old(FOLDER, MARK, keep)
    keys = bucket.list_objects_v2(Bucket=BUCKET, Prefix=url.rpartition("/")[2])["Contents"]
    left = {"ba00000002", "ba00000008", "ba00000010"} if keep != 1 else {"ba00000008", "ba00000010"}
    assert {key["Key"].split("/")[1] for key in keys} == left


def test_a_bucket_keeps_the_best_beside_the_newest(tmp_path: Path, remote: Callable[[Path], str], bucket: Any) -> None:
    for step in (2, 4, 6, 8):
        ddp(tmp_path / f"ba{step:08d}")
    url = remote(tmp_path)
    Remote(url).drop_old(FOLDER, MARK, 1, lambda whole: {whole[1]})
    keys = bucket.list_objects_v2(Bucket=BUCKET, Prefix=url.rpartition("/")[2])["Contents"]
    assert {key["Key"].split("/")[1] for key in keys} == {"ba00000004", "ba00000008"}


@pytest.mark.parametrize(
    ("write", "poison", "name"),
    [
        (ddp, lambda folder, command: poison_torch_file(folder / "composer.pt", command), "composer.pt"),
        (fsdp, lambda folder, command: poison_metadata(folder / "ep0", command), "ep0/.metadata"),
        (fsdp, lambda folder, command: poison_shard(folder / "ep0", command, True), "ep0/.metadata"),
        (fsdp, lambda folder, command: poison_shard(folder / "ep0", command, False), "ep0/.metadata"),
    ],
)
@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_pickle_that_names_code_is_refused_unread(
    tmp_path: Path,
    remote: Callable[[Path], str],
    write: Callable[[Path], Path],
    poison: Callable[[Path, str], None],
    name: str,
    place: str,
) -> None:
    ran = tmp_path / "ran"
    folder = write(tmp_path / "there" / "ba00000008")
    refuse_code(folder, write.__name__)
    poison(folder, f"touch {ran}")
    mark_again(folder, write.__name__)
    settings = {"remote": remote(folder.parent)} if place == "bucket" else {}
    here = tmp_path / "here" if place == "bucket" else folder.parent
    with pytest.raises(ValueError, match=rf"{here}/ba00000008/{name} is not loaded.*posix.system"):
        found(here, write.__name__, **settings)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["notes.tar", "composer.pt.symlink", "model.pkl", "zero.py"])
def test_a_file_of_another_kind_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    folder = ddp(tmp_path / "ba00000004")
    (folder / name).write_bytes(b"anything")
    with pytest.raises(ValueError, match=rf"{name} is not loaded.*no file of this kind"):
        refuse_code(folder, "ddp")


def test_links_out_of_a_checkpoint_and_scripted_models_are_refused(tmp_path: Path) -> None:
    folder = ddp(tmp_path / "ba00000004")
    (folder / "zero").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="zero is not loaded"):
        refuse_code(folder, "ddp")
    (folder / "zero").unlink()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "composer.pt")
    with pytest.raises(ValueError, match=r"composer.pt is not loaded.*torchscript"):
        refuse_code(folder, "ddp")
    torch.save({"a": 1}, folder / "composer.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"composer.pt is not loaded"):
        refuse_code(folder, "ddp")


@pytest.mark.parametrize("name", ["pipe.pt", ".metadata"])
def test_a_pipe_in_a_checkpoint_keeps_nobody(tmp_path: Path, name: str) -> None:
    os.mkfifo(ddp(tmp_path / "ba00000004") / name)
    with pytest.raises(ValueError, match=f"{name} is not loaded, and nothing in it was run: it is no file"):
        found(tmp_path)


def test_shards_are_read_within_their_folder_only(tmp_path: Path) -> None:
    folder = fsdp(tmp_path / "ba00000004")
    metadata = pickle.loads((folder / "ep0" / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../../elsewhere"
    (folder / "ep0" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"\.metadata is not loaded.*elsewhere"):
        refuse_code(folder, "fsdp")


def test_only_data_holds_for_every_torch_load_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    poison_torch_file(ddp(tmp_path / "ba00000004") / "composer.pt", f"touch {tmp_path / 'ran'}")
    before = dict(os.environ), set(torch.serialization.get_safe_globals())
    with pytest.raises(Exception, match=r"posix.system"), only_data("ddp"), only_data("fsdp"):
        torch.load(tmp_path / "ba00000004" / "composer.pt", weights_only=False)
    assert (dict(os.environ), set(torch.serialization.get_safe_globals())) == before
    assert not (tmp_path / "ran").exists()
