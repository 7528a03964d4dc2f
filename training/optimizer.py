"""Adam and the cosine schedule of section 4.1.3."""

from __future__ import annotations

import math

import torch

from training.config import OptimizerSettings


def build_optimizer(model: torch.nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Adam over the parameters that require a gradient; without weight decay AdamW is Adam."""
    learning = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        learning,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=torch.cuda.is_available(),
    )


def cosine_with_warmup(step: int, total: int, warmup_ratio: float) -> float:
    """Multiplier of the rate at 0-based `step`: linear from 0 over ceil(ratio * total) steps, then cosine to 0."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
