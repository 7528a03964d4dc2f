"""How a model is spread over the ranks: what cannot work, the trainer of each kind, and whole weights out of it.

ddp             whole copies; gradients are averaged
fsdp            weights, gradients and optimizer state sharded, by Composer's FSDP2: each layer's gathered for its use
zero1, 2, 3     optimizer state; gradients too; weights too: by DeepSpeed (training/engines/zero.py)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from composer import Trainer
from composer.core import State
from composer.utils import dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.config import TrainConfig
from training.model.reducers.connector import Connector


def microbatch_size(config: TrainConfig, world_size: int) -> int | str:
    """Examples per rank and forward pass; `auto` on a GPU lets Composer halve it until it fits.

    Raises:
        ValueError: if it cannot be found automatically.
    """
    per_rank = config.per_rank(world_size)
    if config.microbatch_size != "auto":
        return min(config.microbatch_size, per_rank)
    if config.device == "cpu" or not torch.cuda.is_available():
        return per_rank  # a CPU's memory has no edge to try
    if config.parallelism != "ddp":
        raise ValueError(
            f"microbatch_size auto with parallelism {config.parallelism}: a rank that runs out of memory leaves the "
            "others waiting for its shards; give a number, e.g. microbatch_size=4"
        )
    return "auto"


def engine_of(config: TrainConfig, world_size: int) -> str:
    """`parallelism`, but one rank has nobody to share with: fsdp is ddp there."""
    return "ddp" if config.parallelism == "fsdp" and world_size == 1 else config.parallelism


def make_trainer(config: TrainConfig, not_saved: list[str], **settings: Any) -> Trainer:
    """Composer's Trainer, with the model spread as `config.parallelism` says; `settings` are the Trainer's own.

    `not_saved` are the keys that checkpoints lack.
    """
    if config.parallelism.startswith("zero"):
        from training.engines.zero import ZeroTrainer

        return ZeroTrainer(
            stage=int(config.parallelism[-1]),
            bf16=config.precision == "amp_bf16",
            clip_grad_norm=config.optimizer.clip_grad_norm,
            **settings,
        )
    if engine_of(config, dist.get_world_size()) == "ddp":
        return Trainer(precision=config.precision, **settings)
    from composer.utils.parallelism import FSDP2Config

    model = settings["model"].model
    layer = type(model.llm.get_decoder().layers[0])
    model.fsdp_wrap_fn = lambda module: isinstance(module, layer | Connector)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental")
        trainer = Trainer(
            precision=config.precision,
            parallelism_config={"fsdp": FSDP2Config(reshard_after_forward=True)},
            load_ignore_keys=not_saved or None,
            **settings,
        )
    if next(model.parameters()).device.type == "cpu" and not _gloo_averages():
        _average_on_gloo(model)
    return trainer


def _gloo_averages() -> bool:
    """Whether a mean over the ranks is one: gloo gives the sum without a word up to PyTorch 2.10. A collective."""
    mean, ones = torch.zeros(1), torch.ones(dist.get_world_size())
    torch.distributed.reduce_scatter_tensor(mean, ones, op=torch.distributed.ReduceOp.AVG)
    return float(mean) == 1.0


def _average_on_gloo(model: nn.Module) -> None:
    """FSDP2 asks for the mean of gradients: divide the sum that gloo gives."""
    from torch.distributed.fsdp import FSDPModule

    def divide(gradient: Tensor) -> None:
        gradient.div_(dist.get_world_size())

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_all_reduce_hook(divide)


def gradient_norm(state: State, clip: float | None) -> float:
    """L2 norm of the whole gradient, which is clipped to `clip` afterwards. Between backward pass and step.

    Under ZeRO the engine measures and clips, within its step: the norm is 0 here, `engine_norm` gives it afterwards.
    """
    if hasattr(state.model, "zero_optimization_stage"):
        return 0.0  # stage 1 still has gradients there: of this rank alone
    learning = [p for p in state.model.parameters() if p.grad is not None]
    if not learning:
        return 0.0
    norm = torch.nn.utils.get_total_norm([p.grad for p in learning])
    norm = getattr(norm, "full_tensor", lambda: norm)()  # sharded by FSDP
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(learning, clip, norm)
    return float(norm)


def engine_norm(state: State) -> float | None:
    """The norm that a DeepSpeed engine measured in its last step; None for other engines."""
    measured = getattr(state.model, "get_global_grad_norm", lambda: None)()
    return None if measured is None else float(measured)


def whole_weights(state: State, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    """The weights of the multimodal model whose name is kept, on the CPU of rank 0. A collective."""
    inner = "model."  # Composer's model around ours

    def kept(name: str) -> bool:
        return keep(name.removeprefix(inner))

    model = state.model
    if hasattr(model, "zero_optimization_stage"):
        from training.engines.zero import whole_weights as from_engine

        return {name.removeprefix(inner): weight for name, weight in from_engine(model, kept).items()}
    if isinstance(model, DistributedDataParallel):
        model = model.module
    weights = {}
    for name, weight in model.state_dict().items():
        if kept(name):
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # one at a time, on every rank
            if dist.get_global_rank() == 0:
                weights[name.removeprefix(inner)] = whole.detach().cpu()
    return weights
