"""A feature store written by hand, byte by byte as the contract says, and a server that speaks S3."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

TOKENS, WIDTH = 4, 8
COLUMNS = ("block03", "cls23")


def conversation(key: str, number: int, words: int) -> dict:
    question = {"from": "human", "value": "<image>\n" + "w " * (words - 3)}
    return {"id": f"{key}-{number}", "turns": [question, {"from": "gpt", "value": "a b"}]}


def write_tar(path: Path, members: dict[str, bytes]) -> dict[str, tuple[int, int]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return {member.name: (member.offset_data, member.size) for member in tar}


def _features(column: str, key: str) -> bytes:
    """Numbers in bf16 that no other column and no other sample has."""
    tokens = 1 if column.startswith("cls") else TOKENS
    seed = hashlib.sha256(f"{column}/{key}".encode()).digest()
    numbers = np.random.default_rng(list(seed)).standard_normal(tokens * WIDTH).astype("<f4")
    return (numbers.view("<u4") >> 16).astype("<u2").tobytes()


def _make_store(folder: Path, shards: list[int], text_every: int = 0, columns: tuple[str, ...] = COLUMNS) -> Path:
    """A store written by hand; `shards` gives the samples of each, every `text_every`-th of them without an image."""
    table: dict[str, list] = {"key": [], "shard": [], "image": [], "words": []}
    for name in ("samples", *columns):
        table |= {f"{name}.offset": [], f"{name}.size": []}
    number = 0
    for shard, count in enumerate(shards):
        tars: dict[str, dict[str, bytes]] = {name: {} for name in ("samples", *columns)}
        keys, images, words = [], [], []
        for _ in range(count):
            key, text = f"{number:09d}", bool(text_every) and number % text_every == 0
            image = None if text else f"{number}.jpg"
            lengths = [3 + (number * 7 + i * 5) % 40 for i in range(1 if text else 1 + number % 3)]
            record = {"key": key, "image": image, "width": None if text else 10, "height": None if text else 10}
            record["conversations"] = [conversation(key, i, n) for i, n in enumerate(lengths)]
            tars["samples"][f"{key}.json"] = json.dumps(record).encode()
            if not text:
                for name in columns:
                    tars[name][f"{key}.{name}.bf16"] = _features(name, key)
            keys.append(key)
            images.append(image)
            words.append(lengths)
            number += 1
        table["key"] += keys
        table["image"] += images
        table["words"] += words
        table["shard"] += [shard] * count
        files = {}
        for name, members in tars.items():
            path = folder / name / f"{shard:05d}.tar"
            places = {member.split(".")[0]: place for member, place in write_tar(path, members).items()}
            offsets, sizes = zip(*(places.get(key, (-1, 0)) for key in keys), strict=True)
            table[f"{name}.offset"] += offsets
            table[f"{name}.size"] += sizes
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            files[name] = {"bytes": len(data), "sha256": digest, "offsets": offsets, "sizes": sizes}
        commit = {"shard": shard, "keys": keys, "images": images, "words": words, "files": files, "failures": []}
        (folder / "commits").mkdir(exist_ok=True)
        (folder / "commits" / f"{shard:05d}.json").write_text(json.dumps(commit))
    types = {"key": pa.string(), "shard": pa.int32(), "image": pa.string(), "words": pa.list_(pa.int32())}
    arrays = {name: pa.array(values, types.get(name, pa.int64())) for name, values in table.items()}
    pq.write_table(pa.table(arrays), folder / "manifest.parquet")
    encoder = {"id": "clip", "revision": "0", "blocks": 24, "width": WIDTH, "image_size": 28, "patch_size": 14}
    spec = {
        "dataset": "0" * 64,
        "samples": number,
        "shards": len(shards),
        "shard_size": max(shards),
        "seed": 0,
        "encoder": encoder,
        "aspect": "pad",
        "compute": "float32",
        "codec": "bf16",
        "columns": [{"name": n, "tokens": 1 if n.startswith("cls") else TOKENS, "width": WIDTH} for n in columns],
    }
    (folder / "store.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture(scope="session")
def make_store() -> Callable[..., Path]:
    return _make_store


@pytest.fixture(scope="session")
def features() -> Callable[[str, str], bytes]:
    """features(column, key): what the stores of `make_store` hold."""
    return _features


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six unequal shards; every fifth sample has no image, the others have one to three conversations."""
    return _make_store(tmp_path_factory.mktemp("store"), [9, 4, 9, 7, 1, 9], text_every=5)


@pytest.fixture(scope="session")
def s3() -> Iterator[None]:
    """An S3 server on a socket of this machine; the environment leads every S3 client to it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=True)
        server.start()
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        yield
        server.stop()


@pytest.fixture(scope="session")
def fork() -> ForkServerContext:
    """Starts processes from one that has imported torch and Composer already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["composer", "training.stream.stream"])
    return context


def _ended(processes: Sequence[BaseProcess], expected: int = 0) -> list[int | None]:
    try:
        while running := [process.sentinel for process in processes if process.exitcode is None]:
            if any(process.exitcode not in (0, None, expected) for process in processes):
                break
            multiprocessing.connection.wait(running)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


@pytest.fixture(scope="session")
def ended() -> Callable[..., list[int | None]]:
    """ended(processes, expected=0): their exit codes; one with another code than these ends those that wait for it."""
    return _ended


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    def find() -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return int(free.getsockname()[1])

    return find


def _become_rank(rank: int, ranks: int, port: int, output: Path) -> None:
    with output.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    launcher = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "NODE_RANK": 0}
    os.environ.update({name: str(value) for name, value in (launcher | {"MASTER_PORT": port}).items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""})


@pytest.fixture(scope="session")
def become_rank() -> Callable[[int, int, int, Path], None]:
    """become_rank(rank, ranks, port, output): in a new process, what Composer's launcher would have set."""
    return _become_rank
