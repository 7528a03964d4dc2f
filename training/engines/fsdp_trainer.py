"""Composer's Trainer, which shards weights that have no contents yet, then fills in each rank's share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from composer import Trainer
from composer.distributed.fsdp2_utils import generate_composer_model_policy
from composer.distributed.prepare_distributed import parallelize_model
from torch import nn

from training.engines.base import INNER


class FillingTrainer(Trainer):  # type: ignore[misc]
    """Composer's own way to fill in sharded weights works on GPUs alone, or takes them whole from rank 0's memory.

    Args:
        fill: gives a sharded weight on `meta` this rank's contents; (name in our model, weight).
        settings: the Trainer's own.
    """

    def __init__(self, fill: Callable[[str, nn.Parameter], None], **settings: Any) -> None:
        self._fill = fill
        super().__init__(**settings)

    def _wrap_model_for_distributed(self, model: Any, optimizers: Any) -> None:
        """Composer's, but for `param_init_fn`."""
        parallelize_model(
            self.state.model,
            self.state.fsdp_config,
            self.state.optimizers[0],
            self.state.precision,
            generate_composer_model_policy(self.state.model),
            param_init_fn=self._fill_in,
        )

    def _fill_in(self, module: nn.Module) -> None:
        """Fill in what is on `meta`, of `module` all of whose weights are sharded."""
        for name, weight in module.named_parameters():
            if weight.is_meta:
                self._fill(name.removeprefix(INNER), weight)
