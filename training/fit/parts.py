"""What a stage is made of: the stores, the tokenizer, the model and the stream of batches, which fit each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.manifest import read_store, shards_of
from pipeline.schema import StoreSpec
from pipeline.storage import Storage
from training.checkpoints.resume import together
from training.config import TrainConfig
from training.fit.build import empty_model, load_tokenizer
from training.model.model import CompactVisionForConditionalGeneration
from training.model.tokenizer import Tokenizer
from training.release.records import CONFIG
from training.stream.order import Order
from training.stream.reader import Collate, Reading
from training.stream.source import Side, Source, refuse_unlike
from training.stream.split import Split
from training.stream.stream import Stream
from training.text.collate import Collator

HELD_OUT_AHEAD = 1  # batches of held-out examples that are read ahead; memory is one more
STORE = "store.sha256"  # in a run's folder: a line with the fingerprint of each store that it learns from
Shards = tuple[int | None, ...]  # of each store, how many of its first shards count; None for all


class Parts(NamedTuple):
    """The parts of one rank."""

    store: StoreSpec  # the first; others have the same encoder, columns and codec
    tokenizer: Tokenizer
    model: CompactVisionForConditionalGeneration
    stream: Stream
    held_out: Stream | None  # examples that are never learned from


def open_parts(config: TrainConfig, rank: int, ranks: int) -> Parts:
    """Load what the configuration names and check that the parts fit; nothing is trained yet. A collective.

    Raises:
        ValueError: if they do not. OSError: if one cannot be read.
    """
    config.per_rank(ranks)
    store = read_store(Storage(config.data.mixture[0].store))
    tokenizer = load_tokenizer(config)
    model = empty_model(config, store)
    (shards,) = together(rank == 0, lambda: shards_at_start(config))  # rank 0 speaks for all
    collate = text_collate(config, tokenizer, model)
    stream = open_stream(config, model.connector.columns, rank, ranks, collate, shards)
    held_out = held_out_stream(config, model.connector.columns, rank, ranks, collate, shards)
    return Parts(store, tokenizer, model, stream, held_out)


def shards_at_start(config: TrainConfig) -> Shards:
    """How many shards each store had when the run began; None for a run that begins now, or with another store.

    Shards may have come since (`build_shards.py --retry-failed`): with them, a resumed run would see another order.
    """
    run, storages = Path(config.run), [Storage(entry.store) for entry in config.data.mixture]
    if (run / STORE).is_file():
        known = (run / STORE).read_text(encoding="utf-8").split()
        if len(known) != len(storages):
            raise ValueError(
                f"{run / STORE} names {len(known)} stores, the run's settings {len(storages)}; set them back, or take "
                "another run=..."
            )
        return tuple(shards_of(storage, one) for storage, one in zip(storages, known, strict=True))
    if (run / CONFIG).exists():  # it began before fingerprints were kept, and before shards could come
        return tuple(read_store(storage).shards for storage in storages)
    return (None,) * len(storages)


def open_stream(
    config: TrainConfig, columns: tuple[str, ...], rank: int, ranks: int, collate: Collate, shards: Shards = ()
) -> Stream:
    """The batches of one rank of a run, in the order that `config` asks for, of the stores' first `shards`.

    Raises:
        ValueError: if the settings do not fit the stores, an epoch has no batch, or nothing in it can teach.
    """
    order = Order.of(config.data, config.global_batch_size)
    reading = Reading.of(config.data, rank, ranks, pin_memory=torch.cuda.is_available())
    side = Side(Split.of(config.data.validation))
    stream = Stream(sources(config, shards), columns, order, reading, collate, side)
    what = " and ".join(entry.store for entry in config.data.mixture)
    if len(stream) == 0:
        groups = f" in {order.groups} groups" if order.groups > 1 else ""
        there = sum(due for _, due in stream.due())
        raise ValueError(
            f"{what} gives {there} examples to learn from, fewer than one global batch of "
            f"{config.global_batch_size}{groups}; lower global_batch_size or set data.last_batch=pad"
        )
    if "llm" not in config.train and not stream.examples.has_image.any():
        raise ValueError(
            f"{what} has no image to learn from, and the connector learns from nothing else; add a store with images "
            "to data.stores, or llm to train"
        )
    return stream


def sources(config: TrainConfig, shards: Shards = ()) -> list[Source]:
    """The stores that a run learns from, of each its first `shards`."""
    known = shards or (None,) * len(config.data.mixture)
    return [Source(entry.store, count) for entry, count in zip(config.data.mixture, known, strict=True)]


def held_out_stream(
    config: TrainConfig, columns: tuple[str, ...], rank: int, ranks: int, collate: Collate, shards: Shards = ()
) -> Stream | None:
    """The batches of one rank of the examples that are never learned from; None if `config` asks for no validation.

    They come in the store's own order. The last batch is filled up with those before it, so that all ranks have equally
    many batches: `Stream.filling` says which of its rows do not count. The buffers are a second set.

    Args:
        shards: as of `open_stream`; of a store of its own all are read.

    Raises:
        ValueError: if there are none, or the store of its own has other features than the one that is learned from.
    """
    validation = config.data.validation
    if validation is None:
        return None
    read, split = sources(config, shards), Split.of(validation)
    if validation.store is not None:
        learned, own = ((url, read_store(Storage(url))) for url in (read[0].url, validation.store))
        refuse_unlike(learned, own, columns)
        read, split = [Source(validation.store)], Split.whole(validation.seed)
        if isinstance(collate, Collator):
            collate = replace(collate, by_store=())  # it has data.template
    order = Order(global_batch_size=config.global_batch_size, shuffle=False, last_batch="pad")
    reading = Reading.of(config.data, rank, ranks, pin_memory=torch.cuda.is_available())
    # A few examples of each tar are not worth a download of the whole: of a remote store they are read by ranges.
    ranges = {} if validation.store is not None else {"cache_dir": None}
    reading = reading.model_copy(update={"prefetch": HELD_OUT_AHEAD, **ranges})
    return Stream(read, columns, order, reading, collate, Side(split, True, validation.limit))


def learned_too(held_out: Stream, learned: Stream) -> str:
    """Which held-out images are learned from all the same, as those of a store of their own may be; "" if none is."""
    both = sorted(held_out.images() & learned.images())
    return f"{len(both):,} of these images are learned from too: {', '.join(map(repr, both[:3]))}" if both else ""


def text_collate(config: TrainConfig, tokenizer: Tokenizer, model: CompactVisionForConditionalGeneration) -> Collator:
    """What makes the text tensors of a batch, of each store in its template."""
    data, vision = config.data, (model.connector.tokens, model.config.image_token_id)
    by_store = tuple(entry.template or data.template for entry in data.mixture)
    return Collator(tokenizer, data.template, data.max_length, *vision, by_store=by_store)
