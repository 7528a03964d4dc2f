"""DeepSpeed's ZeRO inside Composer, which has not had it since its version 0.28.

DeepSpeed shards and casts, Composer does all the rest: microbatches, schedule, clock, callbacks. What each owns:

    gradients     DeepSpeed. It sums over Composer's microbatches and ranks; `step` is always the end of a batch
    clipping      DeepSpeed, by `clip_grad_norm`, 0 being off (DeepSpeed's own default is 1.0)
    learning rate Composer's schedule writes it into the parameter groups, which DeepSpeed's optimizer reads
    precision     DeepSpeed: fp32, or bf16 weights with fp32 master weights. To Composer everything is fp32
    checkpoints   DeepSpeed writes its shards, Composer a small file with clock, random states and position
    frozen weights are in no parameter group: ZeRO keeps neither gradient, master weight nor moment of them
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, by the import

import deepspeed
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.tensor_fragment import fragment_address

if os.environ.get("DS_ACCELERATOR") == "cpu":
    # Between CPUs gloo will do; DeepSpeed would first compile an operator for shared memory, and has no setting for it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

TAG = "zero"  # of DeepSpeed's folder within a checkpoint
SAVED_TYPES = [LossScaler, ZeroStageEnum, fragment_address]  # what its shards name beside tensors


def _sharing(stage: int, bf16: bool) -> dict[str, Any]:
    """What DeepSpeed has to know before there is an optimizer."""
    return {"zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}}


def partition(model: nn.Module, fill: Callable[[str, nn.Parameter], None], bf16: bool) -> None:
    """Cut each weight of a model into the ranks' parts, as ZeRO-3 keeps them, and drop the whole. A collective.

    Args:
        model: some of its weights may be on `meta`.
        fill: gives one of these its contents; (name, weight).
        bf16: cast weights to bf16 before.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    first: Any = None
    for name, weight in model.named_parameters():
        if weight.is_meta:
            fill(name, weight)
        weight.data = weight.data.to(dtype)
        if first is None:
            first = weight
            settings = {**_sharing(3, bf16), "train_micro_batch_size_per_gpu": 1}
            deepspeed.zero.Init(nn.ParameterList([weight]), config_dict_or_path=settings, dtype=dtype)
        else:
            first.convert_to_zero_parameters(param_list=[weight])


class DeepSpeedCallback(Callback):  # type: ignore[misc]
    """Hands Composer's model and optimizer to a DeepSpeed engine before a checkpoint is loaded, and loads its shards.

    Args:
        stage: what is sharded: 1 optimizer state, 2 gradients too, 3 weights too.
        bf16: weights and activations in bf16, else in fp32.
        clip_grad_norm: the L2 norm that gradients are clipped to; None for none.
        load_path: the file that Composer loads; DeepSpeed's shards lie beside it. None to start anew.
    """

    def __init__(self, stage: int, bf16: bool, clip_grad_norm: float | None, load_path: str | None) -> None:
        self.folder = None if load_path is None else Path(load_path).parent
        self.settings: dict[str, Any] = {
            **_sharing(stage, bf16),
            "gradient_clipping": clip_grad_norm or 0.0,
            # DeepSpeed never counts microbatches: Composer calls `step` only at the end of a batch.
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "zero_allow_untested_optimizer": True,  # ours is AdamW of PyTorch
            "steps_per_print": 10**12,  # never: the run has its own log
        }
        if bf16:
            self.settings["data_types"] = {"grad_accum_dtype": "fp32"}  # microbatches are not added up in bf16

    def before_load(self, state: State, logger: Logger) -> None:
        """Put the engine where Composer has its model and its optimizer. A collective."""
        (base,) = state.optimizers
        engine, *_ = deepspeed.initialize(
            model=state.model,
            optimizer=base,
            model_parameters=[p for group in base.param_groups for p in group["params"]],
            config={**self.settings, "train_micro_batch_size_per_gpu": state.device_train_microbatch_size},
            dist_init_required=False,
        )
        state.model = _EngineModel(engine)
        state.optimizers = _EngineOptimizer(engine, base)
        for name in ("model", "optimizers"):  # DeepSpeed's shards hold them
            state.serialized_attributes.remove(name)

    def after_load(self, state: State, logger: Logger) -> None:
        """Load the shards from beside the file that Composer has loaded. A collective.

        Raises:
            OSError: if there are none.
        """
        if self.folder is None:
            return
        path, _ = state.model.engine.load_checkpoint(str(self.folder), tag=TAG, load_module_strict=False)
        if path is None:
            raise OSError(f"{self.folder} holds no shards of DeepSpeed in {TAG}/; remove it to go on from an older one")


class _EngineModel(nn.Module):
    """What Composer takes for its model: calls go to the engine.

    The engine is no submodule of it. So Composer finds no parameters here that want a gradient, and does not put
    DistributedDataParallel around a model whose gradients the engine reduces already.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self._engine = (engine,)  # nn.Module would register what is not in a tuple

    @property
    def engine(self) -> Any:
        """DeepSpeed's."""
        return self._engine[0]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The engine's: what Composer's model returns."""
        return self.engine(*inputs, **named)

    def train(self, mode: bool = True) -> _EngineModel:
        """Pass the mode on."""
        self.engine.train(mode)
        return super().train(mode)


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
        # Composer's closure runs every microbatch, forward and backward.
        loss = None if closure is None else closure()
        self.engine.step()
        return loss


def save_shards(engine: Any, folder: Path) -> None:
    """Write every rank's shards of weights that learn and of optimizer state into `folder`. A collective."""
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    if dist.get_global_rank() == 0:
        for script in folder.glob("zero_to_*.py"):  # DeepSpeed's own, copied: checkpoints hold no code
            script.unlink()


def merged_shards(folder: Path) -> dict[str, Tensor]:
    """The weights that learn, whole and in fp32, of the shards in `folder`, whatever number of ranks wrote them."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(StringIO()):  # it reports each of its steps
        found: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
            str(folder), tag=TAG, exclude_frozen_parameters=True
        )
    return found


def gather(engine: Any, keep: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """The kept weights one at a time, on the CPU of rank 0, nothing elsewhere; those that learn in fp32.

    A collective, to its end.
    """
    for name, parameter in engine.module.named_parameters():
        if not keep(name):
            continue
        whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if whole is None:  # frozen: in no group of the optimizer, yet sharded in stage 3
            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone() if dist.get_global_rank() == 0 else None
        if dist.get_global_rank() == 0:
            assert whole is not None
            yield name, whole.detach().cpu().view(getattr(parameter, "ds_shape", parameter.shape))
