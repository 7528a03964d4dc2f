#!/usr/bin/env python
"""How a store is shuffled into batches and how fast they are read: `python training/stream_bench.py STORE --bench`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

from training.config import OrderSettings, ReadSettings

if TYPE_CHECKING:
    import torch

    from training.stream.stream import Stream
    from training.text.collate import Example


MOST = 1_000_000  # of anything that is counted: more is a slip of the hand
MICROBATCH = 4  # examples that are padded to one length in the description; stage 2's default


def main() -> int:
    """Describe the order of a store's examples; with --bench, measure how fast they come."""
    order, read = OrderSettings(), ReadSettings()  # the defaults of a run's `data`
    parser = argparse.ArgumentParser(
        description="Say how a feature store is shuffled into batches and, with --bench, how fast they are read."
    )
    parser.add_argument("store", help="feature store, a folder or s3://")
    parser.add_argument(
        "--bench", action="store_true", help="read batches: MB/s, examples/s, first batch, cold and warm"
    )
    parser.add_argument("--columns", nargs="*", metavar="NAME", help="feature columns to read (default: all)")
    parser.add_argument("--batch-size", type=_positive, default=32, help="examples per batch (default: %(default)s)")
    parser.add_argument("--batches", type=_positive, default=20, help="batches to read (default: %(default)s)")
    for name, default, text in (
        ("--threads", read.threads, "reader threads"),
        ("--prefetch", read.prefetch, "batches read ahead"),
        ("--window-shards", order.window_shards, "shuffle window"),
    ):
        parser.add_argument(name, type=_positive, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--no-shuffle", action="store_true", help="the store's own order")
    parser.add_argument("--together", action="store_true", help="conversations of an image one after another")
    parser.add_argument("--cache-dir", help="for a remote store: where this node keeps shards")
    parser.add_argument(
        "--cache-gb", type=_size, default=read.cache_gb, help="bound of the cache (default: %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        stream = _open(arguments)
        print(_describe(stream, arguments.store))
        if arguments.bench:
            _bench(stream, arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1; take 1 or more")
    if number > MOST:
        raise argparse.ArgumentTypeError(f"{number} is more than {MOST:,}; take less")
    return number


def _size(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{number} is no size in GB; take more than 0")
    return number


def no_text(examples: list[Example]) -> dict[str, torch.Tensor]:
    """A collate function for measurements: only the features count."""
    return {}


def _open(arguments: argparse.Namespace) -> Stream:
    """The stream that the arguments describe, without text."""
    import torch

    from pipeline.manifest import read_store
    from pipeline.storage import Storage
    from training.stream.order import Order
    from training.stream.reader import Reading
    from training.stream.source import Source
    from training.stream.stream import Stream

    columns = arguments.columns
    if columns is None:
        columns = [column.name for column in read_store(Storage(arguments.store)).columns]
    order = Order(
        global_batch_size=arguments.batch_size,
        shuffle=not arguments.no_shuffle,
        window_shards=arguments.window_shards,
        together=arguments.together,
        last_batch="pad",
    )
    reading = Reading(
        threads=arguments.threads,
        prefetch=arguments.prefetch,
        cache_dir=arguments.cache_dir,
        cache_gb=arguments.cache_gb,
        pin_memory=torch.cuda.is_available(),
    )
    return Stream([Source(arguments.store)], tuple(columns), order, reading, no_text)


def _describe(stream: Stream, url: str) -> str:
    """The store, how well its order mixes, and what grouping by length would save."""
    from training.stream.measures import padding_share, same_shard_pairs, shards_in_use
    from training.stream.order import epoch_batches

    batches, examples, store = stream.epoch_batches(0), stream.examples, stream.stores[0]
    size = stream.global_batch_size
    orders = [stream.order.model_copy(update={"together": False, "group_by_length": g}) for g in (False, True)]
    waste = [padding_share(epoch_batches(examples, o, 0), examples.words, o, rows=MICROBATCH) for o in orders]
    return (
        f"store     {url}: {store.samples} samples in {store.shards} shards, codec {store.codec}\n"
        f"examples  {len(examples)}: {len(stream)} batches of {size} per epoch\n"
        f"mixing    window of {stream.order.window_shards} shards: two examples of a batch share a shard "
        f"{same_shard_pairs(batches, examples):.2f} times as often as in a full shuffle; "
        f"at most {shards_in_use(batches, examples)} shards in use at once\n"
        f"padding   {waste[0]:.1%} of the words of microbatches of {MICROBATCH}, {waste[1]:.1%} with group_by_length"
    )


def _bench(stream: Stream, arguments: argparse.Namespace) -> None:
    """Read the same batches twice: from the disk, then from the page cache."""
    print(f"machine   {os.cpu_count()} cores; {arguments.threads} threads, {arguments.prefetch} batches ahead")
    dropped = drop_pages(stream, arguments.store)
    stream.load_state_dict(stream.state_dict(0, True))
    cold = measure(stream, arguments.batches)
    print(_line("cold" if dropped else "first", cold))
    stream.load_state_dict({**stream.state_dict(0, True), "epoch": 0, "samples": 0})
    print(_line("warm", measure(stream, arguments.batches)))


def drop_pages(stream: Stream, url: str) -> bool:
    """Ask the kernel to forget a local store's tars; False for a remote store."""
    from pipeline.storage import Storage

    storage = Storage(url)
    for name in storage.list(""):
        path = storage.local_path(name)
        if path is None:
            return False
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def measure(stream: Stream, batches: int) -> dict[str, Any]:
    """Read at most `batches` of the coming epoch; seconds, feature bytes, examples and the wait for the first one."""
    start = time.perf_counter()
    first = 0.0
    read = examples = 0
    iterator = iter(stream)
    for count, batch in enumerate(iterator, start=1):
        first = first or time.perf_counter() - start
        read += sum(tensor.numel() for tensor in batch["columns"].values())
        examples += len(batch["keys"])
        if count == batches:
            break
    seconds = time.perf_counter() - start
    iterator.close()
    return {"seconds": seconds, "bytes": read, "examples": examples, "first_batch_s": first}


def _line(name: str, result: dict[str, Any]) -> str:
    seconds = result["seconds"]
    return (
        f"{name:9} {result['bytes'] / seconds / 1e6:,.0f} MB/s, {result['examples'] / seconds:,.1f} examples/s, "
        f"first batch after {result['first_batch_s'] * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
