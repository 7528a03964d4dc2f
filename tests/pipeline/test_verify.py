"""Whatever is wrong with a store is found and named, and what is repaired is built again."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.manifest import fingerprint, read_store
from pipeline.schema import commit_path
from pipeline.shard import sha256_of
from pipeline.storage import Storage
from pipeline.verify_shards import repair, verify

VERIFY = "pipeline/verify_shards.py"


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A sound store, to be damaged."""
    shutil.copytree(store, tmp_path / "store")
    return tmp_path / "store"


def problems(folder: Path) -> list[str]:
    storage = Storage(folder)
    return [str(problem) for problem in verify(storage, read_store(storage))]


def flip_a_byte(folder: Path) -> None:
    path = folder / "block02/00001.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_a_tar(folder: Path) -> None:
    path = folder / "block04/00001.tar"
    path.write_bytes(path.read_bytes()[:2000])


def remove_a_tar(folder: Path) -> None:
    (folder / "block04/00002.tar").unlink()


def add_a_foreign_file(folder: Path) -> None:
    (folder / "block04/00099.tar").write_bytes(b"whatever")


def add_a_foreign_folder(folder: Path) -> None:
    (folder / "block03").mkdir()
    (folder / "block03/00000.tar").write_bytes(b"whatever")


def cut_a_commit(folder: Path) -> None:
    path = folder / "commits/00003.json"
    path.write_bytes(path.read_bytes()[:100])


def remove_a_commit(folder: Path) -> None:
    (folder / "commits/00000.json").unlink()


def copy_a_commit(folder: Path) -> None:
    shutil.copyfile(folder / "commits/00000.json", folder / "commits/00001.json")


def add_a_member(folder: Path) -> None:
    path = folder / "block02/00000.tar"
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("000000099.block02.bf16")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"1234"))
    recommit(folder, 0, lambda commit: seal(folder, commit, "block02"))


def drop_a_key(folder: Path) -> None:
    def drop(commit: dict[str, Any]) -> None:
        for name in ("keys", "images", "words"):
            commit[name] = commit[name][:-1]
        for file in commit["files"].values():
            file["offsets"], file["sizes"] = file["offsets"][:-1], file["sizes"][:-1]

    recommit(folder, 2, drop)


def swap_two_images(folder: Path) -> None:
    def swap(commit: dict[str, Any]) -> None:
        commit["images"][:2] = reversed(commit["images"][:2])

    recommit(folder, 2, swap)


def change_the_manifest(folder: Path) -> None:
    table = pq.read_table(folder / "manifest.parquet")
    pq.write_table(table.slice(0, len(table) - 1), folder / "manifest.parquet")


def remove_the_manifest(folder: Path) -> None:
    (folder / "manifest.parquet").unlink()


def recommit(folder: Path, shard: int, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / commit_path(shard)
    commit = json.loads(path.read_text())
    change(commit)
    path.write_text(json.dumps(commit))


def seal(folder: Path, commit: dict[str, Any], name: str) -> None:
    """Make the commit record say of a changed tar what it is now."""
    path = folder / name / f"{commit['shard']:05d}.tar"
    commit["files"][name] |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


DAMAGES = {
    flip_a_byte: ("block02/00001.tar", "checksum"),
    cut_a_tar: ("block04/00001.tar", "2000 bytes long"),
    remove_a_tar: ("block04/00002.tar", "missing"),
    add_a_foreign_file: ("block04/00099.tar", "foreign file"),
    add_a_foreign_folder: ("block03/00000.tar", "foreign file"),
    cut_a_commit: ("commits/00003.json", "damaged"),
    remove_a_commit: ("commits/00000.json", "missing: the shard is not built"),
    copy_a_commit: ("commits/00001.json", "is the record of shard 0"),
    add_a_member: ("block02/00000.tar", "members are not those"),
    drop_a_key: ("commits/00002.json", "15 samples and 0 failures, for 16 records"),
    swap_two_images: ("samples/00002.tar", "is the record of"),
    change_the_manifest: ("manifest.parquet", "does not say what the commit records say"),
    remove_the_manifest: ("manifest.parquet", "missing"),
}


def test_a_sound_store_has_no_problems(store: Path) -> None:
    assert problems(store) == []


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_each_damage_is_found_and_named(copy: Path, damage: Callable[[Path], None]) -> None:
    damage(copy)
    path, what = DAMAGES[damage]
    found = problems(copy)
    assert any(problem.startswith(f"{path}: ") and what in problem for problem in found), found


def test_repair_and_another_build_heal_all_of_it(
    copy: Path, store: Path, settings: Any, run: Any, call: Any, contents: Any
) -> None:
    for damage in (flip_a_byte, remove_a_tar, cut_a_commit, remove_the_manifest):
        damage(copy)
    output = call(VERIFY, str(copy), "--repair", fails=True)
    for path in ("block02/00001.tar: checksum", "block04/00002.tar: missing", "commits/00003.json: damaged"):
        assert path in output
    assert "removed 3 commit record(s)" in output
    assert "Traceback" not in output
    run("pipeline/build_shards.py", *settings(copy))
    assert contents(copy) == contents(store)
    assert "all right" in call(VERIFY, str(copy))


def test_repair_leaves_foreign_files_to_people(copy: Path) -> None:
    add_a_foreign_file(copy)
    storage = Storage(copy)
    said = repair(storage, verify(storage, read_store(storage)))
    assert "left alone, remove by hand: block04/00099.tar" in said
    assert (copy / "block04/00099.tar").exists()
    assert (copy / "commits/00000.json").exists()


@pytest.mark.slow  # two builds
def test_a_column_added_later_is_verified_and_repaired_by_itself(
    copy: Path, settings: Any, run: Any, call: Any, contents: Any
) -> None:
    run("pipeline/build_shards.py", *settings(copy, blocks="[2,3,4]"))
    whole = contents(copy)
    assert problems(copy) == []
    (copy / "block03/00001.tar").unlink()
    assert "block03/00001.tar: missing" in call(VERIFY, str(copy), "--repair", fails=True)
    assert (copy / "commits/00001.json").exists()
    assert not (copy / "commits/block03/00001.json").exists()
    run("pipeline/build_shards.py", *settings(copy, blocks="[2,3,4]"))
    assert contents(copy) == whole


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("of", ["tars", "commit records"])
def test_what_cannot_be_read_just_now_is_not_repaired_away(
    copy: Path, call: Any, monkeypatch: pytest.MonkeyPatch, number: int, of: str
) -> None:
    """As a tar from S3 for which this disk has no room."""

    def fails(*_: object) -> Any:
        raise OSError(number, os.strerror(number))  # as of a read, without a name

    monkeypatch.setattr(Storage, "local_copy" if of == "tars" else "read", fails)
    output = call(VERIFY, str(copy), "--repair", fails=True)
    assert f"error: [Errno {number}]" in output
    assert of == "commit records" or re.search(r"(samples|block0\d)/0000\d\.tar cannot be read just now: ", output)
    monkeypatch.undo()
    assert problems(copy) == []


def test_a_repair_that_may_not_delete_says_so_after_what_is_wrong(
    copy: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(self: Storage, name: str) -> None:
        raise PermissionError(errno.EACCES, "Access Denied", name)

    flip_a_byte(copy)
    monkeypatch.setattr(Storage, "delete", refuses)
    output = call(VERIFY, str(copy), "--repair", fails=True)
    assert "block02/00001.tar: checksum" in output
    assert "error: [Errno 13] Access Denied: 'manifest.parquet'" in output


def test_deep_leaves_the_problems_of_a_store_in_sight(copy: Path, scenes: Path, call: Any) -> None:
    (copy / "manifest.parquet").unlink()
    output = call(VERIFY, str(copy), "--deep", "--images", str(scenes / "images"), fails=True)
    assert "deep: left out" in output
    assert "manifest.parquet: missing" in output


def test_deep_finds_features_of_another_image(copy: Path, scenes: Path, call: Any) -> None:
    path = copy / "block04/00000.tar"
    with tarfile.open(path) as tar:
        first, second = tar.getmembers()[:2]
    data = bytearray(path.read_bytes())
    one, two = (slice(m.offset_data, m.offset_data + m.size) for m in (first, second))
    data[one], data[two] = data[two], data[one]
    path.write_bytes(data)
    recommit(copy, 0, lambda commit: seal(copy, commit, "block04"))
    assert problems(copy) == [], "checksums alone cannot see it"
    deep = ["--deep", "--images", str(scenes / "images"), "--sample", "60"]
    output = call(VERIFY, str(copy), *deep, fails=True)
    assert output.count("off live CLIP") == 2
    assert "000000000" in output


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_sound_store_passes_deep(store: Path, scenes: Path, call: Any, s3: dict[str, str], where: str) -> None:
    root = str(store)
    if where == "s3":
        client = boto3.client("s3")
        for path in store.rglob("*.*"):
            client.upload_file(str(path), "chaos", f"verified/{path.relative_to(store)}")
        root = "s3://chaos/verified"
    output = call(VERIFY, root, "--deep", "--images", str(scenes / "images"), "--sample", "12")
    assert "deep: 12 images encoded again, 2 columns" in output
    assert "60 samples in 4 shards, 2 columns: all right" in output


def test_deep_refuses_another_clip(store: Path, scenes: Path, call: Any, clip: Path, tmp_path: Path) -> None:
    shutil.copytree(clip, tmp_path / "clip")
    weights = bytearray((tmp_path / "clip/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "clip/model.safetensors").write_bytes(weights)
    deep = ["--deep", "--images", str(scenes / "images"), "--encoder", str(tmp_path / "clip")]
    output = call(VERIFY, str(store), *deep, fails=True)
    assert "is not the CLIP of this store" in output
    assert "Traceback" not in output


def test_deep_names_the_image_that_is_not_to_be_had(store: Path, call: Any, tmp_path: Path) -> None:
    output = call(VERIFY, str(store), "--deep", "--images", str(tmp_path), "--sample", "1", fails=True)
    assert re.search(r"error: 000000000 \(\d+\.jpg\): missing image", output), output


def test_a_sample_of_no_image_is_refused(store: Path, call: Any) -> None:
    output = call(VERIFY, str(store), "--sample", "0", fails=True)
    assert "--sample is 0" in output
    assert "Traceback" not in output


def test_a_damaged_column_is_named(copy: Path) -> None:
    (copy / "columns").mkdir()
    (copy / "columns/block03.json").write_text("{")
    with pytest.raises(ValueError, match=r"columns/block03\.json is damaged"):
        read_store(Storage(copy))


def test_what_is_no_store_is_named(tmp_path: Path, call: Any) -> None:
    output = call(VERIFY, str(tmp_path), fails=True)
    assert "is not a feature store" in output
    assert "Traceback" not in output


def in_json(path: str, *place: str | int, value: object) -> Callable[[Path], None]:
    """A change of one value in a JSON file of a store."""

    def change(folder: Path) -> None:
        tree = json.loads((folder / path).read_text())
        node = tree
        for part in place[:-1]:
            node = node[part]
        node[place[-1]] = value
        (folder / path).write_text(json.dumps(tree))

    return change


def in_manifest(column: str, values: Callable[[list[Any]], pa.Array | None]) -> Callable[[Path], None]:
    """A change of one column of the manifest; None takes it away."""

    def change(folder: Path) -> None:
        table = pq.read_table(folder / "manifest.parquet")
        changed = values(table.column(column).to_pylist())
        place = table.column_names.index(column)
        table = table.remove_column(place) if changed is None else table.set_column(place, column, changed)
        pq.write_table(table, folder / "manifest.parquet")

    return change


HOSTILE = {
    "10^10 shards": in_json("store.json", "shards", value=10**10),
    "more shards than samples": in_json("store.json", "shards", value=10**6),
    "a column of 2^40 tokens": in_json("store.json", "columns", 0, "tokens", value=2**40),
    "a column of 2^31 bytes": in_json("store.json", "columns", 0, "width", value=2**16),
    "no patches": in_json("store.json", "encoder", "patch_size", value=0),
    "a number as text": in_json("store.json", "samples", value="60"),
    "nested brackets": lambda folder: (folder / "store.json").write_text("[" * 100_000) and None,
    "a member of 2^40 bytes": in_json("commits/00001.json", "files", "block02", "sizes", 0, value=2**40),
    "a text as offset": in_json("commits/00001.json", "files", "block02", "offsets", 0, value="512"),
    "a negative offset": in_json("commits/00001.json", "files", "block02", "offsets", 0, value=-512),
    "an offset behind the end": in_json("commits/00001.json", "files", "samples", "offsets", 3, value=10**7),
    "no samples": in_json("commits/00001.json", "files", value={}),
    "a key that is a path": in_json("commits/00001.json", "keys", 0, value="../../a"),
    "a manifest without keys": in_manifest("key", lambda _: None),
    "a manifest without offsets": in_manifest("samples.offset", lambda _: None),
    "offsets as texts": in_manifest("samples.offset", lambda values: pa.array(list(map(str, values)))),
    "negative offsets": in_manifest("samples.offset", lambda values: pa.array([-5, *values[1:]])),
    "records of 2^40 bytes": in_manifest("samples.size", lambda values: pa.array([2**40, *values[1:]])),
    "features of 2^29 bytes": in_manifest("block02.size", lambda values: pa.array([2**29, *values[1:]])),
    "shard 10^10": in_manifest("shard", lambda values: pa.array([*values[:-1], 10**10])),
    "a shard that is not known": in_manifest("shard", lambda values: pa.array([None, *values[1:]], pa.int32())),
    "a key twice": in_manifest("key", lambda values: pa.array([values[1], *values[1:]])),
    "negative words": in_manifest("words", lambda values: pa.array([[-3], *values[1:]])),
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_store_gives_one_clear_message(
    copy: Path, store: Path, call: Any, damage: Callable[[Path], None]
) -> None:
    damage(copy)
    output = call(VERIFY, str(copy), fails=True)
    assert re.search(r"(store\.json|commits/00001\.json|manifest\.parquet)(:| is damaged| is not JSON)", output)
    assert "Traceback" not in output
    assert max(map(len, output.splitlines())) < 1000
    if (copy / "commits/00001.json").read_bytes() == (store / "commits/00001.json").read_bytes():
        with pytest.raises(ValueError, match=r"store\.json|manifest\.parquet"):  # what training reads
            fingerprint(Storage(copy))


@pytest.mark.parametrize(
    "change",
    [
        in_json("store.json", "seed", value=7),
        in_json("store.json", "dataset", value="0" * 64),
        in_json("store.json", "encoder", "id", value="another/clip"),
        in_json("store.json", "encoder", "revision", value="0" * 64),
        in_json("store.json", "aspect", value="square"),
    ],
)
def test_commits_are_bound_to_their_store(copy: Path, call: Any, change: Callable[[Path], None]) -> None:
    change(copy)
    output = call(VERIFY, str(copy), "--repair", fails=True)
    assert "store.json: is not what the shards were made for" in output
    assert "nothing was removed: restore store.json first" in output
    assert (copy / "manifest.parquet").exists()


def test_the_commit_of_another_store_is_named_alone(copy: Path) -> None:
    in_json("commits/00002.json", "store", value="0" * 64)(copy)
    assert problems(copy) == ["commits/00002.json: is the record of another store's shard"]


def test_commits_of_the_time_before_they_were_bound_stay_valid(copy: Path) -> None:
    for path in (copy / "commits").iterdir():
        commit = json.loads(path.read_text())
        del commit["store"]
        path.write_text(json.dumps(commit))
    assert problems(copy) == []
