"""A store behind S3: the same batches as on a local disk, whatever the cache holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from training.config import TrainConfig
from training.fit.parts import held_out_stream
from training.stream.ahead import most_bytes_in_use
from training.stream.order import Order, epoch_of
from training.stream.reader import Reading
from training.stream.source import Source
from training.stream.stream import Stream

COLUMNS = ("block03", "cls23")


@pytest.fixture(scope="module")
def remote(store: Path, s3: dict[str, str]) -> str:
    client = boto3.client("s3")
    client.create_bucket(Bucket="stores")
    for path in store.rglob("*"):
        if path.is_file():
            client.put_object(Bucket="stores", Key=f"a/{path.relative_to(store)}", Body=path.read_bytes())
    return "s3://stores/a"


def open_stream(store: Path | str, **settings: object) -> Stream:
    order = Order(global_batch_size=8, window_shards=settings.pop("window_shards", 3))
    return Stream([Source(str(store))], COLUMNS, order, Reading(**settings), lambda examples: {})


def contents(stream: Stream) -> list[tuple[list[str], list[bytes]]]:
    return [(b["keys"], [b["columns"][name].numpy().tobytes() for name in COLUMNS]) for b in stream]


@pytest.mark.parametrize("state", ["empty", "warm", "small", "absent"])
def test_a_remote_store_gives_the_same_batches_whatever_the_cache_holds(
    store: Path, remote: str, tmp_path: Path, state: str
) -> None:
    cache: dict[str, object] = {} if state == "absent" else {"cache_dir": str(tmp_path)}
    if state == "warm":
        contents(open_stream(remote, **cache))
    if state == "small":
        cache["cache_gb"] = tars_in_use(open_stream(store)) / 1e9
    local, stream = open_stream(store), open_stream(remote, **cache)
    for _ in range(2):
        assert contents(stream) == contents(local)
    if state == "small":
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.tar")) <= cache["cache_gb"] * 1e9


def test_what_is_held_out_of_a_remote_store_is_read_without_whole_tars(
    store: Path, remote: str, tmp_path: Path, settings: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache"

    def held_out(place: str) -> Stream:
        changes = {"data.store": place, "data.cache_dir": str(cache), "data.validation": {"share": 0.3}}
        config = TrainConfig.model_validate(settings(tmp_path / "run", 1, changes))
        stream = held_out_stream(config, COLUMNS, 0, 1, lambda examples: {})
        assert stream is not None
        return stream

    assert contents(held_out(remote)) == contents(held_out(str(store)))
    assert not list(cache.rglob("*.tar"))


def tars_in_use(stream: Stream) -> int:
    epochs = (epoch_of(stream.examples, stream.order, epoch) for epoch in range(2))
    return max(most_bytes_in_use(stream._uses(epoch)) for epoch in epochs)


def test_each_tar_of_a_remote_store_is_fetched_once_per_epoch(store: Path, remote: str, tmp_path: Path) -> None:
    stream = open_stream(remote, cache_dir=str(tmp_path), window_shards=1)
    (cache,) = stream._caches
    assert cache is not None
    cache.max_bytes = tars_in_use(stream)
    names: list[str] = []
    download = cache.storage.download
    cache.storage.download = lambda name, target: (names.append(name), download(name, target))[1]
    contents(stream)
    assert sorted(names) == sorted(use.name for use in stream._uses(epoch_of(stream.examples, stream.order, 0)))


def test_a_cache_smaller_than_the_window_is_refused(remote: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="raise cache_gb, lower window_shards"):
        open_stream(remote, cache_dir=str(tmp_path), cache_gb=30e-6)


def test_a_damaged_remote_tar_stops_the_consumer_with_its_name(store: Path, remote: str, tmp_path: Path) -> None:
    name, client = "a/block03/00002.tar", boto3.client("s3")
    client.put_object(Bucket="stores", Key=name, Body=b"rubbish")
    with pytest.raises(ValueError, match=r"block03/00002.tar of s3://.* came twice with wrong bytes"):
        list(open_stream(remote, cache_dir=str(tmp_path)))
    client.put_object(Bucket="stores", Key=name, Body=(store / "block03/00002.tar").read_bytes())


def test_ranks_on_two_nodes_resume_from_one_state(store: Path, remote: str, tmp_path: Path) -> None:
    whole = [keys for keys, _ in contents(open_stream(store))]
    state = open_stream(store).state_dict(2 * 8, True)
    parts = []
    for rank in range(2):
        stream = open_stream(remote, rank=rank, world_size=2, cache_dir=str(tmp_path / str(rank)))
        stream.load_state_dict(state)
        parts.append([keys for keys, _ in contents(stream)])
    assert [first + second for first, second in zip(*parts, strict=True)] == whole[2:]
