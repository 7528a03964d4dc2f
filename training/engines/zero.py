"""zero1, zero2, zero3: DeepSpeed shards the optimizer's state; gradients too; weights too.

DeepSpeed itself enters in training/engines/deepspeed_callback.py, which says how it stands inside Composer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from training.config import TrainConfig
from training.cost.memory import CHECKPOINT, Held, ModelShape, computed, gathered
from training.engines.base import INNER, Engine

if TYPE_CHECKING:
    from composer import Trainer
    from composer.core import State
    from torch import Tensor, nn

    from training.model.model import CompactVisionForConditionalGeneration


class Zero(Engine):
    """DeepSpeed's ZeRO (Rajbhandari et al., 2020), its stages being subclasses."""

    stage: ClassVar[int]
    any_ranks = False
    bf16_on_cpu = True

    @property
    def _bf16(self) -> bool:
        """Whether weights are bf16, beside fp32 ones in the optimizer's state."""
        return self.config.precision == "amp_bf16"

    @classmethod
    def saved_types(cls) -> list[type]:
        """DeepSpeed's own, in the shards of the optimizer's state."""
        from training.engines.deepspeed_callback import SAVED_TYPES

        return SAVED_TYPES

    def trainer(self, left_out: list[str], settings: dict[str, Any]) -> Trainer:
        """Composer's Trainer with a callback that hands the model to DeepSpeed.

        Raises:
            ValueError: if Composer algorithms are given: they change gradients, which DeepSpeed keeps to itself.
        """
        if settings.get("algorithms"):
            names = ", ".join(type(algorithm).__name__ for algorithm in settings["algorithms"])
            raise ValueError(
                f"Composer's algorithms ({names}) read and change p.grad, which is empty under ZeRO: DeepSpeed keeps "
                "its own gradients; use clip_grad_norm for clipping, or parallelism ddp or fsdp"
            )
        from composer import Trainer

        from training.engines.deepspeed_callback import DeepSpeedCallback

        callback = DeepSpeedCallback(
            stage=self.stage,
            bf16=self._bf16,
            clip_grad_norm=self.config.optimizer.clip_grad_norm,
            load_path=settings.get("load_path"),
        )
        callbacks = [*settings.get("callbacks", ()), callback]
        return Trainer(precision="fp32", **{**settings, "callbacks": callbacks})  # the bf16 weights are DeepSpeed's

    def memory(self, shape: ModelShape) -> Held:
        """Optimizer state, with it the fp32 weights, is sharded; gradients from stage 2 on, weights in stage 3."""
        # Weights and gradients have the dtype of the forward pass; fp32 copies and moments are the optimizer's.
        width, learning = computed(self.config), float(shape.learning)
        weights = width * (learning + shape.frozen)
        return Held(
            weights=weights / self.ranks + gathered(self.config, shape) if self.stage == 3 else weights,
            gradients=width * learning / (self.ranks if self.stage >= 2 else 1),
            optimizer=CHECKPOINT * learning / self.ranks,
        )

    def host(self, shape: ModelShape) -> float:
        """DeepSpeed takes whole weights to the host while it lays them out in one piece; parts it does not."""
        return 0.0 if self.stage == 3 else float(computed(self.config) * shape.learning)

    def left_out(self, model: nn.Module) -> list[str]:
        """None: Composer's file has no weights at all, and DeepSpeed's shards leave out frozen ones by themselves."""
        return []

    def clip_gradients(self, state: State) -> None:
        """Left to DeepSpeed, which measures and clips within its step: p.grad holds this rank's part, or nothing."""

    def gradient_norm(self, state: State) -> float:
        """The norm that DeepSpeed measured in its last step."""
        norm = state.model.engine.get_global_grad_norm()
        return 0.0 if norm is None else float(norm)

    def whole_weights(self, state: State, keep: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        """The kept weights one at a time, on the CPU of rank 0; those that learn in fp32. A collective, to its end."""
        from training.engines.deepspeed_callback import gather

        # DeepSpeed wraps Composer's model, so that its names begin with `model.`.
        for key, weight in gather(state.model.engine, lambda key: keep(key.removeprefix(INNER))):
            yield key.removeprefix(INNER), weight

    @classmethod
    def saved_weights(cls, checkpoint: Path, load: str) -> dict[str, Tensor]:
        """The fp32 weights of all ranks' shards, by DeepSpeed's own way to put them together."""
        from training.engines.deepspeed_callback import merged_shards

        return {key.removeprefix(INNER): weight for key, weight in merged_shards(checkpoint).items()}

    def save(self, state: State, folder: Path) -> None:
        """Every rank's shards of the weights that learn and of the optimizer's state. A collective."""
        from training.engines.deepspeed_callback import save_shards

        save_shards(state.model.engine, folder)


class Zero1(Zero):
    """The optimizer's state is sharded."""

    stage = 1


class Zero2(Zero):
    """Gradients are sharded too."""

    stage = 2


class Zero3(Zero):
    """Weights are sharded too: each layer's are gathered for its use."""

    stage = 3
    whole_everywhere = False

    def place(self, model: CompactVisionForConditionalGeneration) -> None:
        """Fill in a weight, keep this rank's part of it, and go on to the next. A collective."""
        from training.engines.deepspeed_callback import partition
        from training.engines.weights import LlmWeights

        weights = LlmWeights(self.config.model, model.llm)
        partition(model, lambda name, weight: weights.fill(name, weight, self.device()), self._bf16)

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """Refuse torch.compile.

        Raises:
            ValueError: with what to say instead.
        """
        if config.model.compile:
            raise ValueError(
                f"model.compile {list(config.model.compile)} with parallelism zero3: ZeRO-3 gathers weights in Python "
                "hooks that torch.compile cannot keep; use zero2 or fsdp, or leave it out"
            )
