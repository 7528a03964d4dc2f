"""The optimizer's steps with which the demo's models are made."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from training.toy.settings import Training

if TYPE_CHECKING:
    from torch import Tensor, nn

WARMUP = 30  # steps in which the learning rate climbs
MOMENTUM = 0.95


def train(
    name: str,
    models: Sequence[nn.Module],
    loss_of: Callable[[list[int]], Tensor],
    examples: int,
    how: Training,
    seed: int,
) -> None:
    """Muon for the matrices inside the layers, Adam for the rest; a short warm-up, then down to 0 linearly.

    Args:
        name: of what is trained, in the lines of progress.
        models: what learns.
        loss_of: the loss of the examples with these numbers; every epoch is shuffled anew.
        examples: how many there are.
    """
    import torch

    steps, batch = how["steps"], min(how["batch"], examples)
    named = [pair for model in models for pair in model.named_parameters()]
    inside = [p for name, p in named if p.ndim == 2 and "layers." in name]
    others = [p for name, p in named if not (p.ndim == 2 and "layers." in name)]
    momenta = [torch.zeros_like(p) for p in inside]
    adam = torch.optim.AdamW(others, lr=how["lr"], betas=(0.9, 0.98), weight_decay=0.0)
    shuffled = random.Random(seed)
    order: list[int] = []
    start = time.perf_counter()
    for step in range(steps):
        if len(order) < batch:
            order = shuffled.sample(range(examples), examples)
        share = min((step + 1) / WARMUP, 1 - step / steps)
        adam.param_groups[0]["lr"] = how["lr"] * share
        loss = loss_of([order.pop() for _ in range(batch)])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_([*inside, *others], 1.0)
        _muon(inside, momenta, how["muon_lr"] * share)
        adam.step()
        for parameter in (*inside, *others):
            parameter.grad = None
        if step % 25 == 0 or step == steps - 1:
            rate = (step + 1) / (time.perf_counter() - start)
            print(f"{name} {step + 1}/{steps}  loss {float(loss.detach()):.3f}  {rate:.1f} steps/s", flush=True)


def _muon(matrices: Sequence[nn.Parameter], momenta: Sequence[Tensor], lr: float) -> None:
    """One step of Muon (Jordan 2024): each matrix moves along its momentum, made orthogonal.

    Small models learn to look things up in far fewer steps than with Adam. Matrices of one shape are taken together.
    """
    import torch

    shapes = {matrix.shape for matrix in matrices}
    with torch.no_grad():
        for shape in sorted(shapes):
            alike = [(p, m) for p, m in zip(matrices, momenta, strict=True) if p.shape == shape and p.grad is not None]
            if not alike:
                continue
            grads = [p.grad for p, _ in alike if p.grad is not None]
            for (_, momentum), grad in zip(alike, grads, strict=True):
                momentum.lerp_(grad, 1 - MOMENTUM)
            ahead = torch.stack([g.lerp(m, MOMENTUM) for (_, m), g in zip(alike, grads, strict=True)])  # Nesterov's
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for (parameter, _), update in zip(alike, _orthogonal(ahead), strict=True):
                parameter.sub_(update, alpha=lr * scale)


def _orthogonal(x: Tensor) -> Tensor:
    """(n, rows, columns) -> about U V^T of each one's U S V^T: five Newton-Schulz steps, with Muon's coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
