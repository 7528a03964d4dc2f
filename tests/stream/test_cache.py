"""The node's cache over a real S3 protocol: once per node, checked, bounded, and safe under kill -9."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from pipeline.schema import Commit, commit_path, tar_path
from pipeline.storage import Storage
from training.stream.ahead import Ahead, Use, most_bytes_in_use
from training.stream.cache import ShardCache
from training.stream.tars import FileTars, RangeTars

SIZE = 300_000
SHARDS = 8
COLUMNS = ("samples", "block03")


class Requests(logging.Handler):
    """What the S3 server was asked for, from its own log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def downloads(self) -> Counter[str]:
        gets = (line.partition("GET /")[2].partition(" ")[0] for line in self.lines if "GET /" in line)
        return Counter(name.partition("/")[2] for name in gets if name.endswith(".tar"))


@pytest.fixture
def requests(s3: dict[str, str]) -> Iterator[Requests]:
    handler, logger = Requests(), logging.getLogger("werkzeug")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def contents(name: str) -> bytes:
    return random.Random(name).randbytes(SIZE)


@pytest.fixture
def bucket(s3: dict[str, str], request: pytest.FixtureRequest) -> str:
    """A store of SHARDS shards with the columns COLUMNS; only tars and commit records, which is all a cache knows."""
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:20]
    client = boto3.client("s3")
    client.create_bucket(Bucket=name)
    for shard in range(SHARDS):
        files = {}
        for column in COLUMNS:
            data = contents(tar_path(column, shard))
            client.put_object(Bucket=name, Key=tar_path(column, shard), Body=data)
            digest = hashlib.sha256(data).hexdigest()
            files[column] = {"bytes": SIZE, "sha256": digest, "offsets": (512,), "sizes": (9,)}
        commit = Commit.model_validate(
            {"shard": shard, "keys": ("0",), "images": (None,), "words": ((1,),), "files": files, "failures": ()}
        )
        client.put_object(Bucket=name, Key=commit_path(shard), Body=commit.model_dump_json().encode())
    return name


def open_cache(bucket: str, folder: Path, max_bytes: int = 1 << 40) -> ShardCache:
    return ShardCache(Storage(f"s3://{bucket}"), folder, "identity", max_bytes)


def read_all(cache: ShardCache, name: str) -> bytes:
    descriptor = cache.open(name)
    try:
        return os.pread(descriptor, 10 * SIZE, 0)
    finally:
        os.close(descriptor)


def files(folder: Path, suffix: str = ".tar") -> list[Path]:
    return sorted(folder.glob(f"*/*/*{suffix}"))


NAMES = [tar_path(column, shard) for shard in range(SHARDS) for column in COLUMNS]


def test_an_object_is_fetched_once_and_read_from_disk_ever_after(
    bucket: str, requests: Requests, tmp_path: Path
) -> None:
    cache = open_cache(bucket, tmp_path)
    for _ in range(3):
        assert read_all(cache, NAMES[0]) == contents(NAMES[0])
    assert requests.downloads() == {NAMES[0]: 1}


def test_many_threads_that_want_one_object_fetch_it_once(bucket: str, requests: Requests, tmp_path: Path) -> None:
    caches = [open_cache(bucket, tmp_path) for _ in range(2)]
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda c=c: found.append(read_all(c, NAMES[1]) == contents(NAMES[1])))
        for c in caches * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    assert requests.downloads() == {NAMES[1]: 1}


def read_in_another_order(bucket: str, folder: Path, seed: int) -> None:
    cache = open_cache(bucket, folder)
    for name in random.Random(seed).sample(NAMES, len(NAMES)):
        assert read_all(cache, name) == contents(name)


def test_the_ranks_of_a_node_fetch_each_object_once_between_them(
    bucket: str, requests: Requests, tmp_path: Path, ended: Callable[..., list[int]]
) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=read_in_another_order, args=(bucket, tmp_path, seed)) for seed in range(3)]
    for rank in ranks:
        rank.start()
    assert ended(ranks) == [0, 0, 0]
    assert requests.downloads() == dict.fromkeys(NAMES, 1)


def test_the_oldest_objects_make_room_and_the_bound_is_kept(bucket: str, tmp_path: Path) -> None:
    cache = open_cache(bucket, tmp_path, max_bytes=3 * SIZE)
    for number, name in enumerate(NAMES[:6]):
        assert read_all(cache, name) == contents(name)
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 3 * SIZE
        os.utime(cache.root / name, (number, number))  # file times tell the order
    assert sorted(str(path.relative_to(cache.root)) for path in files(tmp_path)) == sorted(NAMES[3:6])


def test_what_the_epoch_still_needs_is_evicted_last(bucket: str, tmp_path: Path) -> None:
    cache = open_cache(bucket, tmp_path, max_bytes=3 * SIZE)
    cache.needed = {NAMES[0]}
    for number, name in enumerate(NAMES[:6]):
        read_all(cache, name)
        os.utime(cache.root / name, (number, number))
    assert {str(path.relative_to(cache.root)) for path in files(tmp_path)} == {NAMES[0], NAMES[4], NAMES[5]}


def test_an_evicted_tar_stays_readable_while_it_is_open(bucket: str, tmp_path: Path) -> None:
    cache = open_cache(bucket, tmp_path, max_bytes=SIZE)
    descriptor = cache.open(NAMES[0])
    read_all(cache, NAMES[1])
    assert not (cache.root / NAMES[0]).exists()
    assert os.pread(descriptor, SIZE, 0) == contents(NAMES[0])
    os.close(descriptor)


def test_an_evicted_tar_is_closed_when_another_is_opened(bucket: str, tmp_path: Path) -> None:
    tars = FileTars(open_cache(bucket, tmp_path, max_bytes=SIZE).open, bucket)
    target = bytearray(100)
    for name in NAMES[:4]:
        tars.read_into(name, 50, memoryview(target))
        assert bytes(target) == contents(name)[50:150]
    assert len(tars._files) <= 2


def test_an_object_larger_than_the_cache_is_refused(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="raise cache_gb"):
        open_cache(bucket, tmp_path, max_bytes=SIZE - 1).open(NAMES[0])


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1] + b"!", lambda data: data[:1000], lambda data: data + b"more"]
)
def test_wrong_bytes_are_fetched_again_then_named(
    bucket: str, requests: Requests, tmp_path: Path, damage: object
) -> None:
    name = NAMES[2]
    boto3.client("s3").put_object(Bucket=bucket, Key=name, Body=damage(contents(name)))
    cache = open_cache(bucket, tmp_path)
    with pytest.raises(ValueError, match=rf"{name} of .*{bucket} came twice with wrong bytes"):
        cache.open(name)
    assert requests.downloads() == {name: 2}
    assert files(tmp_path) == files(tmp_path, ".part") == []
    boto3.client("s3").put_object(Bucket=bucket, Key=name, Body=contents(name))
    assert read_all(cache, name) == contents(name)


class Flipping(Storage):
    """A network that damages the first copy of everything."""

    def download(self, name: str, target: Path) -> None:
        super().download(name, target)
        seen = target.with_name(target.name + ".seen")
        if not seen.exists():
            seen.touch()
            with target.open("r+b") as file:
                file.write(b"?")


def test_bytes_that_were_damaged_on_the_way_are_fetched_again(bucket: str, tmp_path: Path) -> None:
    cache = ShardCache(Flipping(f"s3://{bucket}"), tmp_path, "identity", 1 << 40)
    assert read_all(cache, NAMES[0]) == contents(NAMES[0])


KILLED = """
import os, sys
from pathlib import Path
from pipeline.storage import Storage
from training.stream.cache import ShardCache
bucket, folder, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
cache = ShardCache(Storage(f"s3://{bucket}"), folder, "identity", 5 * int(os.environ["SIZE"]))
cache._expected(names[0])
print("ready", flush=True)
while True:
    for name in names:
        os.close(cache.open(name))
"""


def test_kill_9_leaves_nothing_that_is_read_as_whole(bucket: str, tmp_path: Path) -> None:
    env = {**os.environ, "SIZE": str(SIZE)}
    moments = random.Random(0)
    for _ in range(5):
        command = [sys.executable, "-c", KILLED, bucket, str(tmp_path), *NAMES]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=env)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(moments.uniform(0.0, 0.3))  # any moment will do
        finally:
            process.kill()
            process.wait()
        for path in files(tmp_path):
            assert path.read_bytes() == contents(str(path.relative_to(tmp_path / "identity")))
    cache = open_cache(bucket, tmp_path, 5 * SIZE)
    for name in NAMES:
        assert read_all(cache, name) == contents(name)
    assert files(tmp_path, ".part") == []
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 5 * SIZE


def test_what_a_killed_process_left_is_swept_when_room_is_made(bucket: str, tmp_path: Path) -> None:
    cache = open_cache(bucket, tmp_path, 2 * SIZE)
    left = cache.root / NAMES[1]
    left.parent.mkdir(parents=True)
    left.with_name(left.name + ".part").write_bytes(b"half")
    left.with_name(left.name + ".lock").write_text(str(2 * SIZE))
    read_all(cache, NAMES[0])
    assert files(tmp_path, ".part") == []
    assert left.with_name(left.name + ".lock").read_text() == ""


def test_what_was_just_fetched_counts_once_while_its_reservation_stands(bucket: str, tmp_path: Path) -> None:
    cache = open_cache(bucket, tmp_path, 2 * SIZE)
    read_all(cache, NAMES[0])
    lock = cache.root / (NAMES[0] + ".lock")
    with lock.open("w") as held:  # whoever fetched it has renamed it and not let go yet
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write(str(SIZE))
        held.flush()
        read_all(cache, NAMES[1])
    assert len(files(tmp_path)) == 2


def uses() -> list[Use]:
    """Each shard is needed for two batches, one after another."""
    return [Use(name, SIZE, first=i // 2, last=i // 2 + 1) for i, name in enumerate(NAMES)]


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.02)


def test_fetching_ahead_stops_where_it_would_push_out_what_is_in_use(bucket: str, tmp_path: Path) -> None:
    cache = open_cache(bucket, tmp_path, 6 * SIZE)
    ahead = Ahead([cache], uses(), start=0, threads=3)
    wait_until(lambda: len(ahead._changed._waiters) == 3)  # every thread: none is fetching any more
    assert {str(path.relative_to(cache.root)) for path in files(tmp_path)} == set(NAMES[:6])
    ahead.at(2)  # the first shard is done: its two tars may go
    wait_until(lambda: all((cache.root / name).exists() for name in NAMES[6:8]))
    ahead.close()


def test_fetching_ahead_starts_at_the_resumed_batch(bucket: str, requests: Requests, tmp_path: Path) -> None:
    ahead = Ahead([open_cache(bucket, tmp_path)], uses(), start=6, threads=2)
    wait_until(lambda: not any(thread.is_alive() for thread in ahead._threads))  # all is fetched
    ahead.close()
    assert set(requests.downloads()) == set(NAMES[-6:])


def test_an_object_that_cannot_be_fetched_ahead_is_left_to_its_reader(
    bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boto3.client("s3").delete_object(Bucket=bucket, Key=NAMES[0])
    cache = open_cache(bucket, tmp_path)
    ahead = Ahead([cache], uses(), start=0, threads=1)
    wait_until(lambda: not any(thread.is_alive() for thread in ahead._threads))
    ahead.close()
    assert len(files(tmp_path)) == len(NAMES) - 1
    assert f"fetching {NAMES[0]} ahead failed" in caplog.text
    with pytest.raises(OSError, match=NAMES[0]):
        cache.open(NAMES[0])


def test_the_most_bytes_in_use_are_counted() -> None:
    assert most_bytes_in_use(uses()) == 4 * SIZE
    assert most_bytes_in_use([]) == 0


def test_ranged_requests_read_members_without_a_cache(bucket: str) -> None:
    target = bytearray(1000)
    RangeTars(Storage(f"s3://{bucket}")).read_into(NAMES[3], 500, memoryview(target))
    assert bytes(target) == contents(NAMES[3])[500:1500]


def test_a_ranged_request_past_the_end_is_an_error(bucket: str) -> None:
    with pytest.raises(ValueError, match="shorter than the store's manifest says"):
        RangeTars(Storage(f"s3://{bucket}")).read_into(NAMES[3], SIZE - 10, memoryview(bytearray(20)))
