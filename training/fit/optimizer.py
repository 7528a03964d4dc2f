"""Adam and the cosine schedule of section 4.1.3."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from training.config import OptimizerSettings
from training.model.model import CompactVisionForConditionalGeneration


def build_optimizer(model: CompactVisionForConditionalGeneration, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Adam over the parameters that require a gradient; without weight decay AdamW is Adam.

    One group for the connector, then one for the LLM, if they learn: their rates may differ.
    """
    rates = {"connector": settings.connector_lr, "llm": settings.llm_lr}
    groups: list[dict[str, Any]] = []
    for part, rate in rates.items():
        learning = [p for p in getattr(model, part).parameters() if p.requires_grad]
        if learning:
            groups.append({"params": learning, "lr": rate or settings.lr})  # a part's rate, else the common one
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=torch.cuda.is_available(),
    )


def build_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_ratio: float) -> LambdaLR:
    """The rates of `steps` steps, to be moved on after each.

    It counts its steps itself: Composer moves schedules before its own clock, whose time is one step late to them.
    """
    return LambdaLR(optimizer, lambda step: cosine_with_warmup(step, steps, warmup_ratio))


def cosine_with_warmup(step: int, total: int, warmup_ratio: float) -> float:
    """Multiplier of the rate at 0-based `step`: linear from 0 over ceil(ratio * total) steps, then cosine to 0."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
