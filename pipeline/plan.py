"""Samples -> numbered shards, and what building them will cost: bytes, hours, dollars, and what is left to do."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from pipeline.codec import payload_bytes
from pipeline.config import BuildConfig
from pipeline.dataset import Dataset, Record
from pipeline.images import ZipMember, compare_names
from pipeline.manifest import added_columns, committed, retried
from pipeline.schema import Codec, Column, Failure, StoreSpec
from pipeline.storage import Storage

CODECS: tuple[Codec, ...] = ("bf16", "fp16", "fp8", "int8")


@dataclass(frozen=True)
class Work:
    """What is to be done on one shard: everything, or only the columns that were added to the store."""

    shard: int
    columns: tuple[str, ...]
    base: bool  # whether the samples and the base columns are among it
    keys: tuple[str, ...] = ()  # of a shard of retried samples


def todo(storage: Storage, spec: StoreSpec, wanted: Sequence[Column]) -> list[Work]:
    """The shards of the store `spec` that lack something of the `wanted` columns, in order."""
    known = {column.name for column in spec.columns}
    # These have separate commit records: they were added after the first build, or are about to be.
    later = {*added_columns(storage), *(column.name for column in wanted if column.name not in known)}
    base = tuple(column.name for column in spec.columns if column.name not in later)
    done = committed(storage)
    done_added = {column.name: committed(storage, column.name) for column in wanted if column.name in later}
    work = []
    behind = retried(storage, spec)
    for shard in range(spec.shards + len(behind)):
        keys = behind.get(shard, ())
        extra = tuple(name for name, shards in done_added.items() if shard not in shards)
        if shard not in done:
            work.append(Work(shard, base, base=True, keys=keys))
        if extra:
            work.append(Work(shard, extra, base=False, keys=keys))
    return work


def shard_records(
    records: list[Record], spec: StoreSpec, shard: int, keys: tuple[str, ...] = ()
) -> list[tuple[str, Record]]:
    """(key, record) of a shard's samples: the key is the position in the store's order, so it sorts like it.

    `keys`: those of a shard of retried samples.
    """
    if keys:
        return [(key, records[int(key)]) for key in keys]
    first = shard * spec.shard_size
    return [(f"{first + i:09d}", record) for i, record in enumerate(records[first : first + spec.shard_size])]


def row_of(
    work: Work,
    records: list[tuple[str, Record]],
    zips: list[dict[str, ZipMember]],
    job: str,
    insist: bool,
    moved: Set[str] = frozenset(),
) -> dict[str, Any]:
    """What a worker needs to know, as plain data: a few hundred bytes a sample, never an image.

    Args:
        insist: build the shard even if a job other than `job` has claimed it.
        moved: the keys that shards of retried samples hold.
    """
    return {
        "job": job,
        "insist": insist,
        "shard": work.shard,
        "columns": list(work.columns),
        "base": work.base,
        "moved": [] if work.keys else [key for key, _ in records if key in moved],
        "records": [
            (key, record.image, record.conversations, [index.get(record.image or "") for index in zips])
            for key, record in records
        ],
    }


def count_shards(samples: int, shard_size: int) -> int:
    """How many shards `samples` samples fill; the last one may be smaller."""
    return -(-samples // shard_size)


def read_rate(batch: float, image_bytes: float, step_s: float) -> float:
    """Bytes per second that one GPU needs for `batch` images a step of `step_s` seconds, to wait for none."""
    return batch * image_bytes / step_s


def break_even(batch: float, image_bytes: float, step_s: float, encode_rate: float) -> float:
    """Bytes/s of a GPU above which stored features beat encoding on the fly, where it encodes `encode_rate` images/s.

    Reading goes on beside the step and stretches it only when it takes longer: batch * bytes / bandwidth. Encoding
    takes the GPU itself, so a step becomes step_s + batch / rate. Both are equal at this bandwidth.
    """
    return batch * image_bytes / (step_s + batch / encode_rate)


def report(
    config: BuildConfig,
    spec: StoreSpec,
    dataset: Dataset,
    left: list[Work],
    absent: list[str],
    prices: dict[str, float],
) -> str:
    """What a build would do and cost, for a person: printed by `--plan`. `absent`: images that no root has."""
    images = sum(record.image is not None for record in dataset.records)
    conversations = sum(len(record.conversations) for record in dataset.records)
    per_image = {codec: sum(payload_bytes(column, codec) for column in spec.columns) for codec in CODECS}
    total = images * per_image[spec.codec]
    rate, price, step = prices["rate"], prices["price"], prices["step_time"]
    batch, image_bytes, of_one = prices["batch"], per_image[spec.codec], rate / (config.workers or 1)
    even = break_even(batch, image_bytes, step, of_one)
    images_left, bytes_left = _left(spec, dataset, left)
    lines = [
        f"store          {config.store}",
        f"images         {images:,} (not found: {len(absent):,}), text-only records {len(dataset.records) - images:,}",
        *([f"               {compare_names(config.image_roots, absent)}"] if 2 * len(absent) > images else []),
        f"conversations  {conversations:,}; {dataset.merged:,} joined an image already seen, "
        f"{dataset.duplicates:,} duplicates left out, {len(dataset.failures):,} records unusable",
        f"shards         {spec.shards:,} of {spec.shard_size} samples; "
        f"{spec.shards - len({item.shard for item in left if not item.keys}):,} there, "
        f"{len({item.shard for item in left}):,} to do",
        "",
        f"{'column':<10}{'tokens':>8}{'width':>8}" + "".join(f"{codec + ' GB':>12}" for codec in CODECS),
    ]
    for column in spec.columns:
        sizes = "".join(f"{images * payload_bytes(column, codec) / 1e9:>12,.2f}" for codec in CODECS)
        lines.append(f"{column.name:<10}{column.tokens:>8}{column.width:>8}{sizes}")
    lines += [
        f"{'all':<26}" + "".join(f"{images * per_image[codec] / 1e9:>12,.2f}" for codec in CODECS),
        "",
        f"this store     {total / 1e12:,.3f} TB in {spec.codec}, {per_image[spec.codec] / 1e6:.3f} MB per image",
        f"left           {bytes_left / 1e12:,.3f} TB of {images_left:,} images",
        f"time           {images_left / rate / 3600:,.2f} h for what is left, at {rate:g} images/s (--rate)",
        f"rent           {total / 1e9 * price:,.2f} $ a month at {price:g} $ per GB (--price)",
        "",
        f"training       {read_rate(batch, image_bytes, step) / 1e9:,.3f} GB/s per GPU for {batch:g} images a step of "
        f"{step:g} s (--batch, --step-time)",
        f"break-even     encoding on the fly adds {batch / of_one:,.3f} s a step where a GPU encodes {of_one:g} "
        f"images/s (--rate); reading is faster above {even / 1e9:,.3f} GB/s per GPU",
    ]
    return "\n".join(lines)


def missing_names(config: BuildConfig, failures: list[Failure]) -> str:
    """If most failures are missing images: the names that are asked for beside names that are there."""
    absent = [failure.source for failure in failures if failure.kind == "missing image"]
    if 2 * len(absent) <= len(failures):
        return ""
    return f". Most images are missing: {compare_names(config.image_roots, absent)}"


def _left(spec: StoreSpec, dataset: Dataset, left: list[Work]) -> tuple[int, int]:
    """Images to encode (once more for columns that are added), and the bytes that they make."""
    size = {column.name: payload_bytes(column, spec.codec) for column in spec.columns}
    images = total = 0
    for item in left:
        records = shard_records(dataset.records, spec, item.shard, item.keys)
        here = sum(record.image is not None for _, record in records)
        images += here
        total += here * sum(size.get(name, 0) for name in item.columns)
    return images, total
