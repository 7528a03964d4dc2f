"""DeepSpeed's ZeRO inside Composer, which has not had it since its version 0.28.

The engine shards and casts, Composer does all the rest: microbatches, schedule, clock, callbacks. What each owns:

    gradients     the engine. It sums over Composer's microbatches and ranks; `step` is always the end of a batch
    clipping      the engine, by `clip_grad_norm`, 0 being off (DeepSpeed's own default is 1.0)
    learning rate Composer's schedule writes it into the parameter groups, which the engine's optimizer reads
    precision     the engine: fp32, or bf16 weights with fp32 master weights. To Composer everything is fp32
    checkpoints   the engine writes its shards, Composer a small file with clock, random states and position
    frozen weights are in no parameter group: ZeRO keeps neither gradient, master weight nor moment of them
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, by the import

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param

if os.environ.get("DS_ACCELERATOR") == "cpu":
    # Between CPUs gloo will do; DeepSpeed's own shared-memory op would be compiled first, with whatever is at hand.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

TAG = "zero"  # of the engine's folder within a checkpoint


class ZeroTrainer(Trainer):  # type: ignore[misc]
    """Composer's Trainer over a DeepSpeed engine of ZeRO stage 1, 2 or 3.

    Args:
        stage: what is sharded: 1 optimizer state, 2 gradients too, 3 weights too.
        bf16: weights and activations in bf16, else in fp32.
        clip_grad_norm: the L2 norm that gradients are clipped to; None for none.
        **settings: Composer's.

    Raises:
        ValueError: if Composer algorithms are given: they change gradients, which the engine keeps to itself.
    """

    def __init__(self, *, stage: int, bf16: bool, clip_grad_norm: float | None, **settings: Any) -> None:
        if settings.get("algorithms"):
            raise ValueError(
                "Composer's algorithms read and change p.grad, which is empty under ZeRO: the engine keeps its own "
                "gradients; use clip_grad_norm for clipping, or parallelism ddp or fsdp"
            )
        self._zero = {
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": bf16},
            "gradient_clipping": clip_grad_norm or 0.0,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**12,
        }
        if bf16:
            self._zero["data_types"] = {"grad_accum_dtype": "fp32"}  # microbatches are not added up in bf16
        settings["callbacks"] = [*settings.get("callbacks", ()), _LoadShards(settings.get("load_path"))]
        # Trainer.__init__ ends by wrapping the model in DDP; the engine reduces gradients already.
        with mock.patch("composer.trainer.trainer.prepare_ddp_module", lambda module, *_: module):
            super().__init__(precision="fp32", **settings)

    def _wrap_model_for_distributed(self, model: Any, optimizers: Any) -> None:
        (base,) = self.state.optimizers
        settings = {**self._zero, "train_micro_batch_size_per_gpu": self.state.device_train_microbatch_size}
        engine, *_ = deepspeed.initialize(
            model=self.state.model,
            optimizer=base,
            model_parameters=[p for group in base.param_groups for p in group["params"]],
            config=settings,
            dist_init_required=False,
        )
        self.state.model = engine
        self.state.optimizers = _EngineOptimizer(engine, base)
        for name in ("model", "optimizers"):  # the engine's shards hold them
            self.state.serialized_attributes.remove(name)


class _EngineOptimizer:
    """What Composer takes for its optimizer: the groups of the real one, and the engine's step."""

    _step_supports_amp_closure = False

    def __init__(self, engine: Any, base: torch.optim.Optimizer) -> None:
        self.engine = engine
        self.base = base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Left to `step`, which clears what the engine has accumulated."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else closure()  # Composer's closure runs every microbatch
        self.engine.step()
        return loss


class _LoadShards(Callback):  # type: ignore[misc]
    """Loads the engine's shards from beside the file that Composer has loaded."""

    def __init__(self, load_path: str | None) -> None:
        self.folder = None if load_path is None else Path(load_path).parent

    def after_load(self, state: State, logger: Logger) -> None:
        """A collective.

        Raises:
            OSError: if there are none.
        """
        if self.folder is None:
            return
        path, _ = state.model.load_checkpoint(str(self.folder), tag=TAG, load_module_strict=False)
        if path is None:
            raise OSError(f"{self.folder} holds no shards of a DeepSpeed engine")


def save_shards(engine: Any, folder: Path) -> None:
    """Write every rank's shards of weights that learn and of optimizer state into `folder`. A collective."""
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)


def whole_weights(engine: Any, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    """The kept weights on the CPU of rank 0, nothing elsewhere; those that learn in fp32. A collective."""
    weights = {}
    for name, parameter in _named(engine.module, keep):
        whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if whole is None:
            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone() if dist.get_global_rank() == 0 else None
        if dist.get_global_rank() == 0:
            assert whole is not None
            weights[name] = whole.detach().cpu().view(getattr(parameter, "ds_shape", parameter.shape))
    return weights


def _named(module: torch.nn.Module, keep: Callable[[str], bool]) -> Iterable[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if keep(name))
