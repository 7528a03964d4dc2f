"""The optimizer's steps with which the demo's models are made."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from training.toy.settings import Training

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

WARMUP = 30  # steps in which the learning rate climbs


def steps_for(how: Training, examples: int) -> int:
    """Optimizer steps: all of them, or what sees few examples `epochs` times, and no fewer than the warm-up."""
    if not examples:
        return 0
    seen = how["epochs"] * examples / min(how["batch"], examples)
    return min(how["steps"], max(WARMUP, math.ceil(seen)))


def train(
    name: str,
    parameters: Sequence[Parameter],
    loss_of: Callable[[list[int]], Tensor],
    examples: int,
    how: Training,
    seed: int,
) -> None:
    """Adam with a short warm-up, then down to 0 linearly; every epoch is shuffled anew.

    Args:
        name: of what is trained, in the lines of progress.
        loss_of: the loss of the examples with these numbers.
        examples: how many there are.
    """
    import torch

    steps, batch = steps_for(how, examples), min(how["batch"], examples)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    shuffled = random.Random(seed)
    order: list[int] = []
    start = time.perf_counter()
    for step in range(steps):
        if len(order) < batch:
            order = shuffled.sample(range(examples), examples)
        for group in optimizer.param_groups:
            group["lr"] = how["lr"] * min((step + 1) / WARMUP, 1 - step / steps)
        loss = loss_of([order.pop() for _ in range(batch)])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            rate = (step + 1) / (time.perf_counter() - start)
            print(f"{name} {step + 1}/{steps}  loss {float(loss.detach()):.3f}  {rate:.1f} steps/s", flush=True)
