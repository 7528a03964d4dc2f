"""From a configuration and a store to the model that is trained: load the parts, check that they fit, freeze.

And back at the end: from weights, wherever the ranks kept them, to those of one whole model, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from transformers import AutoConfig
from transformers.utils.chat_template_utils import render_jinja_template

from pipeline.config import meant
from pipeline.schema import StoreSpec
from training.config import TrainConfig
from training.cost.flops import check_connector
from training.engines.weights import empty_llm, fill_whole, shape_only
from training.fit.lora import add_lora, merged
from training.model.decoders import decoder_of
from training.model.decoders.base import Decoder
from training.model.model import CompactVisionForConditionalGeneration
from training.model.reducers import build_connector, connector_config
from training.model.reducers.connector import Connector
from training.model.tokenizer import Tokenizer
from training.release.connector import load_connector
from training.text.templates import TEMPLATES


def build_model(config: TrainConfig, store: StoreSpec) -> CompactVisionForConditionalGeneration:
    """The model of `empty_model`, whole, in this process's memory.

    Raises:
        ValueError, OSError: as `empty_model`.
    """
    model = empty_model(config, store)
    fill_whole(config.model, model, torch.device("cpu"))
    return model


def empty_model(config: TrainConfig, store: StoreSpec, files: bool = True) -> CompactVisionForConditionalGeneration:
    """The model of one stage, without a vision tower: it is fed the store's columns.

    The language model's weights have shapes and no contents, which its engine fills in (`Engine.place`). Weights that
    learn are fp32, frozen ones `config.model.frozen_dtype`. The initial weights of connector and adapters depend only
    on `config.seed`, so every rank starts from the same.

    Args:
        config: of the run.
        store: that it learns from.
        files: look at the files of the language model, which come from the Hub if they are not here; without them
            the model cannot be filled in.

    Raises:
        ValueError: if the connector does not fit the store or the language model, or `connector_from` another one,
            or LoRA is wanted without peft, or the files of the language model are not what its configuration says.
        OSError: if the language model cannot be read.
    """
    frozen: torch.dtype = getattr(torch, config.model.frozen_dtype)
    text = _text_config(config)
    connector = _connector(config, store, text.hidden_size)
    dtype = torch.float32 if _learns_whole(config) else frozen
    try:
        llm = empty_llm(config.model, dtype) if files else shape_only(text, dtype)
    except (KeyError, TypeError) as error:  # transformers', of an activation say that it does not know
        raise ValueError(
            f"{config.model.llm} cannot be loaded ({error!r}): its config.json or a file of weights is wrong; fetch "
            "both again"
        ) from error
    if config.model.connector_from is not None:
        load_connector(connector, Path(config.model.connector_from))
    if "connector" not in config.train:
        connector.to(frozen)
    model = CompactVisionForConditionalGeneration.from_parts(llm, connector, aspect=store.aspect)
    model.connector.requires_grad_("connector" in config.train)
    model.llm.requires_grad_(_learns_whole(config))
    if config.model.lora is not None:
        # A seed of its place: adapters start alike on every rank, and no other random number moves.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            add_lora(model.llm, config.model.lora)
    model.loss_chunks = config.model.loss_chunks
    if "connector" in config.model.compile:
        model.connector.compile()
    if "llm" in config.model.compile:
        for layer in model.llm.get_decoder().layers:
            layer.compile(dynamic=True)  # one graph for all lengths and all layers
    if config.model.activation_checkpointing:
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()  # type: ignore[no-any-return]


def _learns_whole(config: TrainConfig) -> bool:
    """Whether all weights of the language model learn, rather than none or adapters."""
    return "llm" in config.train and config.model.lora is None


def whole_model(
    model: CompactVisionForConditionalGeneration, connector: Mapping[str, torch.Tensor]
) -> CompactVisionForConditionalGeneration:
    """A model of `model`'s shape, without adapters: these weights of the connector, an LLM without contents."""
    with torch.device("meta"):
        llm = type(model.llm)(model.llm.config)
        whole = CompactVisionForConditionalGeneration.from_parts(
            llm, build_connector(model.connector.config), aspect=model.config.aspect
        )
    llm.name_or_path, llm.generation_config = model.llm.name_or_path, model.llm.generation_config
    llm.tie_weights()
    # `assign` puts the weights in place of meta tensors.
    whole.connector.load_state_dict(
        {name.removeprefix("connector."): weight for name, weight in connector.items()}, assign=True
    )
    return whole


def merged_llm(
    config: TrainConfig, whole: CompactVisionForConditionalGeneration, weights: Iterator[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The trained weights of the LLM, one after another -> those of `whole`'s, adapters merged."""
    if config.model.lora is None:
        return weights
    with torch.device("meta"):
        adapted = type(whole.llm)(whole.llm.config)
        add_lora(adapted, config.model.lora)
    inside = ((name.removeprefix("llm."), weight) for name, weight in weights)
    return ((f"llm.{name}", weight) for name, weight in merged(adapted, inside))


def _text_config(config: TrainConfig) -> Any:
    """The language model's configuration, checked: a family that is known, and positions for the longest example."""
    try:
        text = AutoConfig.from_pretrained(config.model.llm, revision=config.model.revision)
    except StrictDataclassError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"the config.json of {config.model.llm}: {said}; fetch it again") from error
    try:
        _check_decoder(decoder_of(text.model_type))
    except ValueError as error:
        raise ValueError(f"model.llm {config.model.llm}, of type {text.model_type}: {error}") from error
    quantized = getattr(text, "quantization_config", None)
    if quantized is not None:
        raise ValueError(
            f"model.llm {config.model.llm} is quantized ({quantized.get('quant_method', 'its config.json says how')}), "
            "and cannot be trained here; name the one that it was made from"
        )
    if config.data.max_length > text.max_position_embeddings:
        raise ValueError(
            f"data.max_length {config.data.max_length} is more than the {text.max_position_embeddings} positions "
            f"of {config.model.llm}; lower it"
        )
    return text


def _check_decoder(decoder: Decoder) -> None:
    """Raise ValueError if its template is not known, or its chat template, which the export takes, cannot be read."""
    if decoder.template not in TEMPLATES:
        raise ValueError(
            f"its decoder names the template {decoder.template!r}; {meant(decoder.template, TEMPLATES)} Correct its "
            "file in training/model/decoders"
        )
    question = [{"role": "user", "content": "What is this?"}]
    try:
        render_jinja_template([question], chat_template=decoder.chat_template, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(
            f"its decoder's chat template cannot be rendered: {error}; correct its file in training/model/decoders"
        ) from error


def _connector(config: TrainConfig, store: StoreSpec, llm_width: int) -> Connector:
    """The connector between this store's features and a language model of that width, initial weights by the seed."""
    shape = connector_config(
        **config.model.connector.model_dump(),
        grid=store.encoder.grid,
        vision_width=store.encoder.width,
        llm_width=llm_width,
    )
    check_connector(shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_connector(shape, available=[column.name for column in store.columns])


def load_tokenizer(config: TrainConfig) -> Tokenizer:
    """The SentencePiece tokenizer of `model.tokenizer`, by default that of the language model.

    Raises:
        ValueError: if there is none, or it has no sound `tokenizer.model`.
    """
    name = config.model.tokenizer or config.model.llm
    try:
        return Tokenizer.from_pretrained(name, revision=config.model.revision if name == config.model.llm else None)
    except (ValueError, OSError) as error:
        if Path(name).is_dir():
            raise
        setting, first = "tokenizer" if config.model.tokenizer else "llm", str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model.{setting} {name!r} is no folder here, and as an id on the Hub: {first}; correct model.{setting}"
        ) from error
