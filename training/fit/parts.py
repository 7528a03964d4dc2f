"""What a stage is made of: the store, the tokenizer, the model and the stream of batches, which fit each other."""

from __future__ import annotations

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
from training.stream.source import Source, refuse_unlike
from training.stream.split import Split
from training.stream.stream import Stream
from training.text.collate import Collator

HELD_OUT_AHEAD = 1  # batches of held-out examples that are read ahead; memory is one more
STORE = "store.sha256"  # in a run's folder: the fingerprint of the store that it learns from


class Parts(NamedTuple):
    """The parts of one rank."""

    store: StoreSpec
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
    store = read_store(Storage(config.data.store))
    tokenizer = load_tokenizer(config)
    model = empty_model(config, store)
    (shards,) = together(rank == 0, lambda: shards_at_start(config))  # rank 0 speaks for all
    collate = text_collate(config, tokenizer, model)
    stream = open_stream(config, model.connector.columns, rank, ranks, collate, shards)
    held_out = held_out_stream(config, model.connector.columns, rank, ranks, collate, shards)
    return Parts(store, tokenizer, model, stream, held_out)


def shards_at_start(config: TrainConfig) -> int | None:
    """How many shards the store had when the run began; None for a run that begins now, or with another store.

    Shards may have come since (`build_shards.py --retry-failed`): with them, a resumed run would see another order.
    """
    run, storage = Path(config.run), Storage(config.data.store)
    if (run / STORE).is_file():
        return shards_of(storage, (run / STORE).read_text(encoding="utf-8").strip())
    if (run / CONFIG).exists():
        return read_store(storage).shards  # it began before fingerprints were kept, and before shards could come
    return None


def open_stream(
    config: TrainConfig,
    columns: tuple[str, ...],
    rank: int,
    ranks: int,
    collate: Collate,
    shards: int | None = None,
) -> Stream:
    """The batches of one rank of a run, in the order that `config` asks for, of the store's first `shards`.

    Raises:
        ValueError: if the settings do not fit the store, or an epoch has no batch.
    """
    order = Order.of(config.data, config.global_batch_size)
    reading = Reading.of(config.data, rank, ranks, pin_memory=torch.cuda.is_available())
    source = Source(config.data.store, shards, Split.of(config.data.validation))
    stream = Stream(source, columns, order, reading, collate)
    if len(stream) == 0:
        raise ValueError(
            f"{config.data.store} gives {len(stream.examples)} examples, fewer than one global batch of "
            f"{config.global_batch_size}; lower global_batch_size or set data.last_batch=pad"
        )
    return stream


def held_out_stream(
    config: TrainConfig, columns: tuple[str, ...], rank: int, ranks: int, collate: Collate, shards: int | None = None
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
    if validation.store is None:
        source = Source(config.data.store, shards, Split.of(validation), True, validation.limit)
    else:
        refuse_unlike(config.data.store, validation.store, columns)
        source = Source(validation.store, None, Split.whole(validation.seed), True, validation.limit)
    order = Order(global_batch_size=config.global_batch_size, shuffle=False, last_batch="pad")
    reading = Reading.of(config.data, rank, ranks, pin_memory=torch.cuda.is_available())
    return Stream(source, columns, order, reading.model_copy(update={"prefetch": HELD_OUT_AHEAD}), collate)


def text_collate(config: TrainConfig, tokenizer: Tokenizer, model: CompactVisionForConditionalGeneration) -> Collator:
    """What makes the text tensors of a batch."""
    data = config.data
    return Collator(tokenizer, data.template, data.max_length, model.connector.tokens, model.config.image_token_id)
