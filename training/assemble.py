"""From a configuration and a store to the model that is trained: load the parts, check that they fit, freeze."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaForCausalLM

from pipeline.schema import StoreSpec
from training.config import TrainConfig
from training.connectors import Connector, ConnectorConfig, build_connector
from training.export import load_connector
from training.model import CompactVisionForConditionalGeneration
from training.tokenizer import Tokenizer


def build_model(config: TrainConfig, store: StoreSpec) -> CompactVisionForConditionalGeneration:
    """The model of one stage, without a vision tower: it is fed the store's columns.

    Parts that learn have fp32 master weights, frozen ones `config.model.frozen_dtype`. The connector's initial weights
    depend on `config.seed` alone, so every rank starts from the same.

    Raises:
        ValueError: if the connector does not fit the store or the language model, or `connector_from` another one.
        OSError: if the language model cannot be read.
    """
    frozen: torch.dtype = getattr(torch, config.model.frozen_dtype)
    text = _llama_config(config)
    connector = _connector(config, store, text.hidden_size)
    llm = LlamaForCausalLM.from_pretrained(
        config.model.llm,
        revision=config.model.revision,
        dtype=torch.float32 if "llm" in config.train else frozen,
    )
    if config.model.connector_from is not None:
        load_connector(connector, Path(config.model.connector_from))
    if "connector" not in config.train:
        connector.to(frozen)
    model = CompactVisionForConditionalGeneration.from_parts(llm, connector, aspect=store.aspect)
    model.connector.requires_grad_("connector" in config.train)
    model.llm.requires_grad_("llm" in config.train)
    if config.model.activation_checkpointing:
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()  # type: ignore[no-any-return]


def _llama_config(config: TrainConfig) -> Any:
    text = AutoConfig.from_pretrained(config.model.llm, revision=config.model.revision)
    if text.model_type != "llama":
        raise ValueError(f"model.llm {config.model.llm} is a {text.model_type} model; Llama's architecture is needed")
    if config.data.max_length > text.max_position_embeddings:
        raise ValueError(
            f"data.max_length {config.data.max_length} is more than the {text.max_position_embeddings} positions "
            f"of {config.model.llm}"
        )
    return text


def _connector(config: TrainConfig, store: StoreSpec, llm_width: int) -> Connector:
    shape = ConnectorConfig(
        **config.model.connector.model_dump(),
        grid=store.encoder.grid,
        vision_width=store.encoder.width,
        llm_width=llm_width,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_connector(shape, available=[column.name for column in store.columns])


def load_tokenizer(config: TrainConfig) -> Tokenizer:
    """The SentencePiece tokenizer of `model.tokenizer`, by default that of the language model.

    Raises:
        ValueError: if it has no `tokenizer.model`.
    """
    name = config.model.tokenizer or config.model.llm
    return Tokenizer.from_pretrained(name, revision=config.model.revision if name == config.model.llm else None)
