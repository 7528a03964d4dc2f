"""What failed is tried again on request: gained samples are new shards at the end, and nothing there changes."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import worker as working
from pipeline.build_shards import read_sources
from pipeline.config import BuildConfig, load_config
from pipeline.manifest import (
    create_or_check,
    fingerprint,
    known_failures,
    read_manifest,
    read_store,
    retried,
    shards_of,
    write_manifest,
)
from pipeline.plan import row_of, shard_records, todo
from pipeline.retry import list_readable
from pipeline.storage import Storage
from pipeline.verify_shards import repair, verify
from pipeline.worker import ShardWorker

LOST = (3, 5, 17, 18, 19, 40)  # records, by their number, whose images are not there at first


class Build:
    """A build as `build_shards.py` does it, with a worker in this process instead of Ray."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        self.store = Path(load_config(BuildConfig, None, arguments).store)

    def __call__(self, *more: str, retry: bool = False) -> None:
        if retry:
            self.list_retried(*more)
        worker, rows, end = self.prepared(*more)
        for row in rows:
            worker(row)
        end()

    def list_retried(self, *more: str) -> None:
        """What `--retry-failed` does before anything is built."""
        config = load_config(BuildConfig, None, [*self.arguments, *more])
        dataset, spec = read_sources(config)
        list_readable(config, dataset, create_or_check(Storage(config.store), spec))

    def prepared(self, *more: str) -> tuple[ShardWorker, list[dict[str, Any]], Callable[[], int]]:
        """A worker, what it is to build, and what ends the build."""
        config = load_config(BuildConfig, None, [*self.arguments, *more])
        dataset, spec = read_sources(config)
        storage, columns = Storage(config.store), spec.columns
        spec = create_or_check(storage, spec)
        moved = {key for keys in retried(storage, spec).values() for key in keys}
        rows = []
        for item in todo(storage, spec, columns):
            records = shard_records(dataset.records, spec, item.shard, item.keys)
            rows.append(json.loads(json.dumps(row_of(item, records, [{}], "job", True, moved))))
        return ShardWorker(config, spec), rows, lambda: write_manifest(storage, dataset.failures)

    def problems(self) -> list[str]:
        storage = Storage(self.store)
        return [str(problem) for problem in verify(storage, read_store(storage))]


@pytest.fixture
def images(scenes: Path, tmp_path: Path) -> Path:
    """The images but for those that are lost at first."""
    shutil.copytree(scenes / "images", tmp_path / "images")
    for record in lost(scenes):
        (tmp_path / "images" / record).unlink()
    return tmp_path / "images"


def lost(scenes: Path) -> list[str]:
    records = json.loads((scenes / "chat.json").read_text())
    return [records[number]["image"] for number in LOST]


@pytest.fixture
def build(settings: Callable[..., list[str]], images: Path, tmp_path: Path) -> Build:
    """The first build of a store that lacks some images."""
    built = Build(settings(tmp_path / "store", images=images, shard_size=16))
    built()
    return built


def come(scenes: Path, images: Path, names: list[str]) -> None:
    for name in names:
        shutil.copy(scenes / "images" / name, images / name)


def rows(build: Build) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_manifest(Storage(build.store)).to_pylist()
    return rows


def test_what_is_gained_becomes_new_shards_and_the_rest_stays(
    build: Build, scenes: Path, images: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    before, first = contents(build.store), rows(build)
    known = fingerprint(Storage(build.store))
    come(scenes, images, lost(scenes)[:4])
    build(retry=True)
    after, second = contents(build.store), rows(build)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"manifest.parquet", "failures.jsonl"}
    assert second[: len(first)] == first
    assert {row["image"] for row in second[len(first) :]} == set(lost(scenes)[:4])
    assert {row["shard"] for row in second[len(first) :]} == {4}
    assert len({row["key"] for row in second}) == len(second) == 58
    failures = [json.loads(line) for line in (build.store / "failures.jsonl").read_text().splitlines()]
    assert {failure["source"] for failure in failures} == set(lost(scenes)[4:])
    assert {failure["kind"] for failure in failures} == {"missing image"}
    assert build.problems() == []
    # A run that began before goes on with the shards that it began with.
    assert shards_of(Storage(build.store), known) == 4
    assert shards_of(Storage(build.store), fingerprint(Storage(build.store))) == 5
    assert shards_of(Storage(build.store), "0" * 64) is None


def test_nothing_new_is_nothing_written_and_a_second_gain_is_one_more_shard(
    build: Build, scenes: Path, images: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    before = contents(build.store)
    build(retry=True)
    assert contents(build.store) == before
    for number, names in enumerate((lost(scenes)[:2], lost(scenes)[2:])):
        come(scenes, images, names)
        build(retry=True)
        build(retry=True)
        assert max(row["shard"] for row in rows(build)) == 4 + number
    assert sorted(row["image"] for row in rows(build)) == sorted(path.name for path in images.iterdir())[:60]
    assert (build.store / "failures.jsonl").read_text() == ""
    assert build.problems() == []


def test_a_retry_that_was_killed_is_ended_by_the_next_build(build: Build, scenes: Path, images: Path) -> None:
    come(scenes, images, lost(scenes))
    build.list_retried()  # the list is there, its shard is not
    assert any("commits/00004.json: missing" in problem for problem in build.problems())
    build()
    assert build.problems() == []
    assert known_failures(Storage(build.store)) == []
    assert len(rows(build)) == 60


@pytest.mark.parametrize("again", ["gone", "damaged"])
def test_a_listed_sample_that_fails_again_for_want_of_its_image_stays_to_be_stored(
    build: Build, scenes: Path, images: Path, again: str
) -> None:
    """As after a kill, by a build from other images: it would be listed no second time."""
    come(scenes, images, lost(scenes))
    build.list_retried()
    path = images / lost(scenes)[0]
    path.unlink() if again == "gone" else path.write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"shard 4: of 6 samples .* 5 can be read now; give the images that --retry-"):
        build()
    come(scenes, images, lost(scenes))
    build()
    assert known_failures(Storage(build.store)) == []
    assert build.problems() == []


@pytest.mark.parametrize("built", [False, True])
def test_where_a_listed_image_is_gone_for_good_the_cure_that_is_named_helps(
    build: Build, scenes: Path, images: Path, built: bool
) -> None:
    """Also where another list, and perhaps its shard, lies behind that of the image."""
    for names in (lost(scenes)[:3], lost(scenes)[3:]):
        come(scenes, images, names)
        build.list_retried()
    (images / lost(scenes)[0]).unlink()
    worker, (row, behind), _ = build.prepared()
    if built:
        worker(behind)
    with pytest.raises(ValueError, match="if they are gone, delete all files of the store numbered 00004 or higher"):
        worker(row)
    for path in build.store.rglob("*.*"):
        if path.stem.isdigit() and int(path.stem) >= 4:
            path.unlink()
    build(retry=True)
    assert [failure.source for failure in known_failures(Storage(build.store))] == lost(scenes)[:1]
    assert build.problems() == []


def test_many_gained_samples_are_listed_by_reading_each_list_once(
    build: Build, scenes: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    come(scenes, images, lost(scenes))
    config = load_config(BuildConfig, None, build.arguments)
    dataset, spec = read_sources(config)
    asked: list[str] = []

    plainly = Storage.read

    def read(self: Storage, name: str, check: Callable[[int], None] | None = None) -> bytes:
        asked.append(name)
        return plainly(self, name, check)

    monkeypatch.setattr(Storage, "read", read)
    for _ in range(2):
        assert list_readable(config, dataset, spec.model_copy(update={"shard_size": 1}))[0] in (len(LOST), 0)
    assert [name for name in asked if name.startswith("retried/")] == [f"retried/{4 + i:05d}.json" for i in range(6)]


@pytest.mark.parametrize("retry", [False, True])
def test_an_encoder_that_cannot_be_read_just_now_is_no_fault_of_the_images(
    build: Build, scenes: Path, images: Path, retry: bool, tmp_path: Path
) -> None:
    """Read where the build was started, and not where a worker runs."""
    come(scenes, images, lost(scenes))
    if retry:
        build.list_retried()
    else:
        shutil.rmtree(build.store)
    worker, (row, *_), _ = build.prepared()
    worker.config = worker.config.model_copy(update={"encoder": str(tmp_path / "not-mounted")})
    with pytest.raises(ValueError, match=r"encoder .*not-mounted.*: no vision model can be read from it"):
        worker(row)
    assert not list(build.store.glob(f"commits/{row['shard']:05d}.json"))


def test_another_encoder_under_the_same_name_is_refused_by_the_worker(
    settings: Callable[..., list[str]], clip: Path, tmp_path: Path
) -> None:
    shutil.copytree(clip, tmp_path / "clip")
    build = Build(settings(tmp_path / "store", encoder=tmp_path / "clip"))
    worker, (row, *_), _ = build.prepared()
    with (tmp_path / "clip/config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match="is another one on this machine than where the build was started"):
        worker(row)
    assert not list(build.store.glob("*/*.tar"))


def test_a_build_that_ends_beside_one_that_adds_a_column_keeps_it_in_the_manifest(build: Build) -> None:
    _, _, end_of_the_first = build.prepared()
    build("blocks=[2,3,4]")
    end_of_the_first()
    assert all(row["block03.size"] > 0 for row in rows(build))
    assert build.problems() == []


def test_a_repaired_shard_does_not_take_back_what_a_later_one_holds(build: Build, scenes: Path, images: Path) -> None:
    come(scenes, images, lost(scenes))
    build(retry=True)
    whole, tars = rows(build), {path: path.read_bytes() for path in build.store.glob("*/0000[0-3].tar")}
    for path in build.store.glob("samples/0000[0-3].tar"):
        path.write_bytes(path.read_bytes()[:-512])
    storage = Storage(build.store)
    repair(storage, verify(storage, read_store(storage)))
    build()
    assert rows(build) == whole
    assert {path: path.read_bytes() for path in tars} == tars
    assert build.problems() == []


def test_a_column_is_added_to_retried_shards_too_and_to_no_sample_that_failed(
    build: Build, scenes: Path, images: Path
) -> None:
    come(scenes, images, lost(scenes)[:3])
    build(retry=True)
    come(scenes, images, lost(scenes))
    build("blocks=[2,3,4]")
    assert build.problems() == []
    assert all(row["block03.size"] > 0 for row in rows(build))
    assert len(rows(build)) == 57


def test_images_that_cannot_be_read_just_now_are_no_failures_and_the_same_command_builds_them(
    settings: Callable[..., list[str]], scenes: Path, images: Path, tmp_path: Path
) -> None:
    come(scenes, images, lost(scenes))
    build = Build(settings(tmp_path / "store", images=images, shard_size=16))
    worker, (first, second, *_), _ = build.prepared()
    worker(first)
    images.rename(tmp_path / "away")  # as a mount that is lost
    with pytest.raises(OSError, match=r"images is not there on .*; mount it"):
        worker(second)
    assert [path.name for path in build.store.glob("commits/*.json")] == ["00000.json"], "what is done stays"
    (tmp_path / "away").rename(images)
    build()
    assert (build.store / "failures.jsonl").read_text() == ""
    assert len(rows(build)) == 60


def test_after_the_first_image_that_cannot_be_read_just_now_no_other_is_tried(
    settings: Callable[..., list[str]], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, **more: bool) -> None:
            super().shutdown(wait=False, **more)
            ends.set()
            super().shutdown(wait)

    monkeypatch.setattr(working, "ThreadPoolExecutor", Pool)
    build = Build(settings(tmp_path / "store", images=images, shard_size=16, decode_threads=1))
    worker, (row, *_), _ = build.prepared()
    images.rename(tmp_path / "away")
    tried = []

    def decode(key: str, *more: Any, plainly: Callable[..., Any] = worker.decode) -> Any:
        if tried:  # by then the first one has failed
            ends.wait()
        tried.append(key)
        return plainly(key, *more)

    monkeypatch.setattr(worker, "decode", decode)
    with pytest.raises(OSError, match="mount it"):
        worker(row)
    assert len(tried) <= 2, "of 16, those in a thread at that moment alone"


def test_a_list_that_does_not_fit_the_store_is_named(build: Build) -> None:
    (build.store / "retried").mkdir()
    for name, keys in (("00007", ["000000003"]), ("00004", ["000000099"]), ("00004", [3]), ("00004", [])):
        path = build.store / f"retried/{name}.json"
        path.write_text(json.dumps({"keys": keys}))
        with pytest.raises(ValueError, match=rf"retried/{name}\.json (is damaged|does not fit)"):
            todo(Storage(build.store), read_store(Storage(build.store)), ())
        path.unlink()


def test_retried_shards_come_by_their_numbers_and_other_files_beside_them_do_not_count(build: Build) -> None:
    storage = Storage(build.store)
    spec = read_store(storage).model_copy(update={"samples": 99_999, "shards": 99_999})
    keys = {99_999: ("000000003",), 100_000: ("000000005",)}  # as text, 100000 comes before 99999
    for shard, of_shard in keys.items():
        storage.publish_bytes(f"retried/{shard}.json", json.dumps({"keys": of_shard}).encode())
    for name in (".DS_Store", "99999.json~", "._99999.json", "099999.json"):
        storage.publish_bytes(f"retried/{name}", b"?")
    assert list(retried(storage, spec).items()) == list(keys.items())


@pytest.mark.slow  # three builds
def test_the_command_retries_what_failed(
    settings: Callable[..., list[str]], run: Callable[..., str], scenes: Path, images: Path, tmp_path: Path
) -> None:
    """Most images are not there at first: the message shows the names, and --retry-failed takes up what has come.

    One shard: a build that gives up may end a worker between a shard's tar and its record, and such a tar, made without
    the images, is refused once they are there.
    """
    (tmp_path / "other").mkdir()
    shutil.move(images, tmp_path / "other/images")
    arguments = settings(tmp_path / "store", images=tmp_path / "other", shard_size=64)
    output = run("pipeline/build_shards.py", *arguments, fails=True)
    assert "Most images are missing: asked for" in output
    assert f"{tmp_path}/other holds 'images/" in output
    arguments = settings(tmp_path / "store", images=tmp_path / "other/images", shard_size=64)
    assert "--retry-failed" in run("pipeline/build_shards.py", *arguments, fails=True)
    output = run("pipeline/build_shards.py", *arguments, "--retry-failed")
    assert "done: 54 samples, 6 failures" in output
    assert Build(arguments).problems() == []
