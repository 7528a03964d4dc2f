"""Low-rank adapters (LoRA, arXiv 2106.09685) on the language model's linear layers, through peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.config import LoraSettings


def linear_layers(llm: PreTrainedModel) -> list[str]:
    """Names of the linear layers of a language model's layer: all but the head, as LLaVA-1.5."""
    layer = llm.get_decoder().layers[0]
    return [name.rpartition(".")[2] for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]


def add_lora(llm: PreTrainedModel, settings: LoraSettings) -> None:
    """Put adapters into `llm`, in place: only they learn, in fp32; B is 0, so nothing changes before the first step.

    Raises:
        ValueError: if peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(f"model.lora needs peft: pip install 'compact-vision-tokens[lora]' ({error})") from error
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=linear_layers(llm),
    )
    with _weights_at_hand(llm):
        inject_adapter_in_model(config, llm)
    for name, parameter in llm.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


@contextmanager
def _weights_at_hand(llm: PreTrainedModel) -> Iterator[None]:
    """Weights on `meta` stand on the CPU meanwhile, each one number spread over its shape, which takes no memory.

    peft puts initial adapters where the weight is that they adapt, and casts them to its dtype: on `meta` they would be
    lost.
    """
    layers = [m for m in llm.modules() if isinstance(m, torch.nn.Linear) and m.weight.is_meta]
    weights = [layer.weight for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        one = torch.zeros((), dtype=weight.dtype, device="cpu")
        layer.weight = torch.nn.Parameter(one.expand(weight.shape), weight.requires_grad)
    try:
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = weight


def merge_lora(llm: PreTrainedModel) -> None:
    """Add the adapters to the weights they adapt, in place and in fp32, and take them out of the model."""
    from peft.tuners.lora import LoraLayer

    llm.to(torch.float32)  # in bf16 most of an adapter's small change would be rounded away
    for name, module in list(llm.named_modules()):  # a list: modules are replaced on the way
        if isinstance(module, LoraLayer):
            module.merge()
            llm.set_submodule(name, module.get_base_layer())


def merged(llm: PreTrainedModel, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights with adapters one after another -> those of the model without, in fp32: one layer is merged at a time.

    Args:
        llm: with adapters, on `meta`.
        weights: every weight of `llm` by its name there, those of a layer and its adapters one after another.
    """
    from peft.tuners.lora import LoraLayer

    adapted = {name: layer for name, layer in llm.named_modules() if isinstance(layer, LoraLayer)}
    waiting: dict[str, Tensor] = {}
    for name, weight in weights:
        layer_name = next((part for part in _parents(name) if part in adapted), None)
        if layer_name is None:
            yield name, weight.float()
            continue
        layer = adapted[layer_name]
        waiting[name.removeprefix(f"{layer_name}.")] = weight.float()
        if waiting.keys() == layer.state_dict().keys():
            layer.load_state_dict(waiting, assign=True)
            waiting = {}
            with torch.no_grad():  # else each merged weight keeps the graph of its change
                layer.merge()
            for end, whole in layer.get_base_layer().named_parameters():
                yield f"{layer_name}.{end}", whole.detach()
            layer.to("meta")
    assert not waiting, f"{list(waiting)} came without the rest of their layer"


def _parents(name: str) -> Iterator[str]:
    """`a.b.c` -> `a.b`, `a`."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
