"""ddp: every rank has the whole model and its own examples; gradients are averaged over the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.cost.memory import GRADIENT, MOMENTS, WEIGHT, Held, ModelShape, computed, stored
from training.engines.base import Engine

if TYPE_CHECKING:
    from composer import Trainer
    from composer.core import State
    from torch import nn


class Ddp(Engine):
    """PyTorch's DistributedDataParallel, which Composer puts around the model by itself."""

    finds_microbatch = True

    def trainer(self, left_out: list[str], settings: dict[str, Any]) -> Trainer:
        """Composer's Trainer as it is."""
        from composer import Trainer

        return Trainer(precision=self.config.precision, **settings)

    def memory(self, shape: ModelShape) -> Held:
        """Everything whole; gradients twice if they are shared: once more in the buckets that are averaged."""
        learning = float(shape.learning)
        # Autocast keeps bf16 copies of the weights from the forward to the backward pass.
        cast = computed(self.config) * learning if self.config.precision == "amp_bf16" else 0.0
        return Held(
            weights=WEIGHT * learning + cast + stored(self.config) * shape.frozen,
            gradients=GRADIENT * learning * min(self.ranks, 2),
            optimizer=MOMENTS * learning,
        )

    def unwrapped(self, state: State) -> nn.Module:
        """Composer's model within DistributedDataParallel, which is not there on one rank."""
        from torch.nn.parallel import DistributedDataParallel

        model: nn.Module = state.model
        return model.module if isinstance(model, DistributedDataParallel) else model
