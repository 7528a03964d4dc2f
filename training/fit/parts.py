"""What a stage is made of: the store, the tokenizer, the model and the stream of batches, which fit each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pipeline.manifest import read_store
from pipeline.schema import StoreSpec
from pipeline.storage import Storage
from training.config import TrainConfig
from training.fit.assemble import build_model, load_tokenizer
from training.model.model import CompactVisionForConditionalGeneration
from training.model.tokenizer import Tokenizer
from training.stream.reader import Collate
from training.stream.stream import Example, Stream
from training.text.batch import collate, encode


class Parts(NamedTuple):
    """The parts of one rank."""

    store: StoreSpec
    tokenizer: Tokenizer
    model: CompactVisionForConditionalGeneration
    stream: Stream


def open_parts(config: TrainConfig, rank: int, ranks: int) -> Parts:
    """Load what the configuration names and check that the parts fit; nothing is trained yet.

    Raises:
        ValueError: if they do not. OSError: if one cannot be read.
    """
    config.per_rank(ranks)
    store = read_store(Storage(config.data.store))
    tokenizer = load_tokenizer(config)
    model = build_model(config, store)
    stream = open_stream(config, model.connector.columns, rank, ranks, text_collate(config, tokenizer, model))
    return Parts(store, tokenizer, model, stream)


def open_stream(config: TrainConfig, columns: tuple[str, ...], rank: int, ranks: int, to_batch: Collate) -> Stream:
    """The batches of one rank of a run, in the order that `config` asks for.

    Raises:
        ValueError: if the settings do not fit the store, or an epoch has no batch.
    """
    data = config.data
    stream = Stream(
        data.store,
        columns=columns,
        global_batch_size=config.global_batch_size,
        seed=data.seed,
        rank=rank,
        world_size=ranks,
        collate=to_batch,
        shuffle=data.shuffle,
        window_shards=data.window_shards,
        group_by_length=data.group_by_length,
        together=data.together,
        last_batch=data.last_batch,
        threads=data.threads,
        prefetch=data.prefetch,
        cache_dir=data.cache_dir,
        cache_bytes=int(data.cache_gb * 1e9),
        pin_memory=torch.cuda.is_available(),
        limit=data.limit,
    )
    if len(stream) == 0:
        raise ValueError(
            f"{data.store} gives {len(stream.examples)} examples, fewer than one global batch of "
            f"{config.global_batch_size}; lower global_batch_size or set data.last_batch=pad"
        )
    return stream


def text_collate(config: TrainConfig, tokenizer: Tokenizer, model: CompactVisionForConditionalGeneration) -> Collate:
    """What makes the text tensors of a batch: int64 (B, L) of input_ids, labels and attention_mask."""

    def to_batch(examples: list[Example]) -> dict[str, Any]:
        encoded = [
            encode(
                [{"from": turn.speaker, "value": turn.value} for turn in example.conversation.turns],
                tokenizer,
                config.data.template,
                example.has_image,
                model.connector.tokens,
                config.data.max_length,
                model.config.image_token_id,
            )
            for example in examples
        ]
        return collate(encoded, tokenizer.pad_id)

    return to_batch
