"""Low-rank adapters (LoRA, arXiv 2106.09685) on the language model's linear layers, through peft."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from training.config import LoraSettings

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # all but the head, as LLaVA-1.5


def add_lora(llm: LlamaForCausalLM, settings: LoraSettings) -> None:
    """Put adapters into `llm`, in place: only they learn, in fp32; B is 0, so nothing changes before the first step.

    Raises:
        ValueError: if peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("model.lora needs peft: pip install 'compact-vision-tokens[lora]'") from error
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(LAYERS),
    )
    inject_adapter_in_model(config, llm)
    for name, parameter in llm.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


def merge_lora(llm: LlamaForCausalLM) -> None:
    """Add the adapters to the weights they adapt, in place and in fp32, and take them out of the model."""
    from peft.tuners.lora import LoraLayer

    llm.to(torch.float32)  # in bf16 most of an adapter's small change would be rounded away
    for name, module in list(llm.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            llm.set_submodule(name, module.get_base_layer())
