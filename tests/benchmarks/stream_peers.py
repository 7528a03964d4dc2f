"""What `bench_stream.py` reads, and all the ways in which it is read: ours, and the peers'."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from pipeline.schema import SAMPLES, Column, EncoderSpec, StoreSpec, tar_path  # noqa: E402
from training.stream.order import Order  # noqa: E402
from training.stream.reader import Reading  # noqa: E402
from training.stream.source import Source  # noqa: E402
from training.stream.stream import Stream  # noqa: E402
from training.stream_bench import no_text  # noqa: E402

COLUMNS = tuple(f"block{block:02d}" for block in (3, 6, 9, 12, 15, 18, 21, 24))
TOKENS, WIDTH = 576, 1024
PAYLOAD = TOKENS * WIDTH * 2
BATCH = 32
PER_SHARD = 50
Read = Callable[[], Iterator[int]]  # one pass over the data, giving the feature bytes of each step


def readinto(folder: Path, columns: tuple[str, ...]) -> Read:
    """The bare disk: every tar of the columns from end to end into one buffer."""
    buffer = bytearray(8 << 20)

    def read() -> Iterator[int]:
        for column in columns:
            for path in sorted((folder / column).glob("*.tar")):
                with path.open("rb", buffering=0) as file:
                    while count := file.readinto(buffer):
                        yield count

    return read


def stream(folder: Path, columns: tuple[str, ...], shuffle: bool, threads: int, window: int = 4) -> Read:
    """Ours: batches of 32 in staging buffers."""
    order = Order(global_batch_size=BATCH, shuffle=shuffle, window_shards=window, last_batch="pad")
    opened = Stream([Source(str(folder))], columns, order, Reading(threads=threads, prefetch=2), no_text)

    def read() -> Iterator[int]:
        for batch in opened:
            yield sum(tensor.numel() for tensor in batch["columns"].values())

    return read


def webdataset(folder: Path, columns: tuple[str, ...], decode: bool) -> Read:
    """webdataset over one mixed tar per shard, the layout in which it can read several blocks of a sample."""
    import webdataset as wds

    urls = sorted(str(path) for path in (folder / "mixed").glob("*.tar"))

    def read() -> Iterator[int]:
        dataset = wds.WebDataset(urls, shardshuffle=False)
        for sample in dataset.decode() if decode else dataset:
            values = [sample[f"{column}.npy"] for column in columns]
            yield sum(value.nbytes if decode else len(value) for value in values)

    return read


def webdataset_one_column(folder: Path, column: str) -> Read:
    """webdataset, raw bytes, over the store's own tars of one column."""
    import webdataset as wds

    urls = sorted(str(path) for path in (folder / column).glob("*.tar"))

    def read() -> Iterator[int]:
        for sample in wds.WebDataset(urls, shardshuffle=False):
            yield len(sample[f"{column}.bf16"])

    return read


class Indexed(Dataset[dict[str, torch.Tensor]]):
    """The usual map-style dataset over the store's tars: one positioned read per member, one tensor per block."""

    def __init__(self, folder: Path, columns: tuple[str, ...], samples: int) -> None:
        self.folder, self.columns, self.samples = folder, columns, samples
        self.files: dict[str, int] = {}
        table = pq.read_table(folder / "manifest.parquet")
        self.offsets = {column: table.column(f"{column}.offset").to_pylist() for column in columns}

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = {}
        for column in self.columns:
            name = tar_path(column, index // PER_SHARD)
            if name not in self.files:
                self.files[name] = os.open(self.folder / name, os.O_RDONLY)
            tensor = torch.empty(PAYLOAD, dtype=torch.uint8)
            os.preadv(self.files[name], [tensor.numpy()], self.offsets[column][index])
            sample[column] = tensor
        return sample


def dataloader(folder: Path, columns: tuple[str, ...], samples: int) -> Read:
    """torch's DataLoader with two worker processes, batches of 32, shuffled."""
    loader = DataLoader(Indexed(folder, columns, samples), batch_size=BATCH, shuffle=True, num_workers=2)

    def read() -> Iterator[int]:
        for batch in loader:
            yield sum(tensor.numel() for tensor in batch.values())

    return read


def mds(folder: Path, columns: tuple[str, ...]) -> Read:
    """mosaicml-streaming: one MDS sample holds all blocks as bytes, so one block costs as much as eight."""
    from streaming import StreamingDataset

    def read() -> Iterator[int]:
        for sample in StreamingDataset(local=str(folder / "mds"), shuffle=False, batch_size=BATCH):
            yield sum(len(sample[column]) for column in columns)

    return read


def write_mds(folder: Path, samples: int) -> None:
    """The same features for mosaicml-streaming."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder / "mds"), columns=dict.fromkeys(COLUMNS, "bytes")) as out:
        for _, features in images(samples):
            out.write({name: array.tobytes() for name, array in features.items()})


def lit(folder: Path, columns: tuple[str, ...]) -> Read:
    """litdata: one chunked sample holds all blocks as arrays."""
    import litdata

    def read() -> Iterator[int]:
        for sample in litdata.StreamingDataset(str(folder / "litdata"), shuffle=False):
            yield sum(sample[column].nbytes for column in columns)

    return read


def write_lit(folder: Path, samples: int) -> None:
    """The same features for litdata, by its own worker process."""
    import litdata

    litdata.optimize(
        fn=some_images,
        inputs=[(first, min(first + PER_SHARD, samples)) for first in range(0, samples, PER_SHARD)],
        output_dir=str(folder / "litdata"),
        chunk_bytes="256MB",
        num_workers=1,
    )


def some_images(numbers: tuple[int, int]) -> Iterator[dict[str, np.ndarray]]:
    """The features of images `first` to `last`, exclusive."""
    for _, features in islice(images(numbers[1]), *numbers):
        yield features


def energon(folder: Path, columns: tuple[str, ...]) -> Read:
    """megatron-energon over the mixed tars, raw bytes, with its index and a filter on the wanted members."""
    from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless
    from megatron.energon.tools.prepare import command

    if not (folder / "mixed" / ".nv-meta").exists():
        options = "--non-interactive --no-progress --split-ratio 1,0,0 --sample-type CrudeWebdataset --num-workers 1"
        with contextlib.redirect_stdout(io.StringIO()):
            command.main([str(folder / "mixed"), *options.split()], standalone_mode=False)

    @stateless
    def cook(sample: dict[str, object]) -> dict[str, object]:
        return sample

    class Raw(DefaultTaskEncoder):
        decoder = None
        cookers = (Cooker(cook),)

    dataset = get_train_dataset(
        folder / "mixed",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
        task_encoder=Raw(),
        part_filter=lambda part: part.split(".")[0] in columns,
    )

    def read() -> Iterator[int]:
        for sample in get_loader(dataset):
            yield sum(len(sample[f"{column}.npy"]) for column in columns)

    return read


def images(samples: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(key, features) of every image: noise that no two images share."""
    noise = np.random.default_rng(0).integers(0, 1 << 16, (len(COLUMNS), TOKENS, WIDTH), dtype=np.uint16)
    for number in range(samples):
        yield f"{number:09d}", {column: np.roll(block, number) for column, block in zip(COLUMNS, noise, strict=True)}


def write_store(folder: Path, samples: int) -> None:
    """A feature store of random features."""
    rows: list[dict[str, object]] = []
    stream = images(samples)
    for shard in range(samples // PER_SHARD):
        part = list(islice(stream, PER_SHARD))
        places = {SAMPLES: write_tar(folder / tar_path(SAMPLES, shard), ((f"{k}.json", record(k)) for k, _ in part))}
        for column in COLUMNS:
            members = ((f"{key}.{column}.bf16", features[column].tobytes()) for key, features in part)
            places[column] = write_tar(folder / tar_path(column, shard), members)
        for row, (key, _) in enumerate(part):
            line: dict[str, object] = {"key": key, "shard": shard, "image": f"{key}.jpg", "words": [3]}
            for name, found in places.items():
                line |= {f"{name}.offset": found[row][0], f"{name}.size": found[row][1]}
            rows.append(line)
    write_manifest(folder, rows)


def write_mixed(folder: Path, samples: int) -> None:
    """The same features as one tar per shard that holds all blocks, with .npy members."""
    stream = images(samples)
    for shard in range(samples // PER_SHARD):
        members = (
            (f"{key}.{column}.npy", npy(array))
            for key, features in islice(stream, PER_SHARD)
            for column, array in features.items()
        )
        write_tar(folder / "mixed" / f"{shard:05d}.tar", members)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> list[tuple[int, int]]:
    """Write a plain tar; gives (offset, size) of every member's payload."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return [(member.offset_data, member.size) for member in tar]


def record(key: str) -> bytes:
    """The record of one image with one conversation."""
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "Noise."}]
    sample = {"key": key, "image": f"{key}.jpg", "width": 336, "height": 336}
    return json.dumps(sample | {"conversations": [{"id": key, "turns": turns}]}).encode()


def npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def write_manifest(folder: Path, rows: list[dict[str, object]]) -> None:
    """`manifest.parquet` and `store.json`."""
    types = {"key": pa.string(), "shard": pa.int32(), "image": pa.string(), "words": pa.list_(pa.int32())}
    columns = {name: pa.array([row[name] for row in rows], types.get(name, pa.int64())) for name in rows[0]}
    pq.write_table(pa.table(columns), folder / "manifest.parquet")
    encoder = EncoderSpec(id="noise", revision="0", blocks=24, width=WIDTH, image_size=336, patch_size=14)
    spec = StoreSpec(
        dataset="0" * 64,
        samples=len(rows),
        shards=len(rows) // PER_SHARD,
        shard_size=PER_SHARD,
        seed=0,
        encoder=encoder,
        aspect="pad",
        compute="bfloat16",
        codec="bf16",
        columns=tuple(Column(name=name, tokens=TOKENS, width=WIDTH) for name in COLUMNS),
    )
    (folder / "store.json").write_text(spec.model_dump_json())
