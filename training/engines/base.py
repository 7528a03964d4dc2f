"""What an engine is: everything that differs between the ways to spread a model over the ranks.

Importing an engine's file is cheap: it loads torch, Composer or DeepSpeed inside the methods that need them, so that a
configuration which the engine refuses is refused at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from training.config import TrainConfig
from training.cost.memory import Held, ModelShape

if TYPE_CHECKING:
    import torch
    from composer import Trainer
    from composer.core import State
    from torch import Tensor, nn

    from training.model.model import CompactVisionForConditionalGeneration

INNER = "model."  # what Composer's model, around ours, puts before the names of weights


class Engine(ABC):
    """One way to spread a model over the ranks of a run.

    What is implemented here holds where every rank has whole weights and gradients, under Composer's own Trainer.

    Args:
        name: as `parallelism` says it, and as checkpoints are marked.
        config: settings of the run.
        ranks: how many processes train.
    """

    on_one_rank: ClassVar[str | None] = None  # the engine that takes its place on one rank; None: it works there too
    any_ranks: ClassVar[bool] = True  # whether another number of ranks can resume its checkpoints
    bf16_on_cpu: ClassVar[bool] = False  # whether precision amp_bf16 works without a GPU
    whole_everywhere: ClassVar[bool] = True  # whether each rank has all weights whole, between two steps
    finds_microbatch: ClassVar[bool] = False  # whether microbatch_size auto works on a GPU

    def __init__(self, name: str, config: TrainConfig, ranks: int) -> None:
        self.name = name
        self.config = config
        self.ranks = ranks
        self._norm: float | Tensor = 0.0  # a tensor until it is read: that waits for the device

    @classmethod  # noqa: B027 - most engines refuse nothing
    def check(cls, config: TrainConfig) -> None:
        """Refuse settings that this engine cannot serve, when the configuration is read.

        Raises:
            ValueError: with the reason and what to say instead.
        """

    @classmethod
    def saved_types(cls) -> list[type]:
        """The classes that its checkpoints name beside arrays and plain values: nothing else is unpickled."""
        return []

    @abstractmethod
    def trainer(self, left_out: list[str], settings: dict[str, Any]) -> Trainer:
        """Composer's Trainer with the model spread over the ranks, resumed from `load_path` if that is set.

        Args:
            left_out: the keys of Composer's state that checkpoints lack.
            settings: the Trainer's own, but for `precision`.
        """

    def place(self, model: CompactVisionForConditionalGeneration) -> None:
        """Fill in the weights of the language model that have no contents yet, before the optimizer is made.

        A collective where weights are sharded here. An engine may leave it to its trainer.
        """
        from training.engines.weights import fill_whole

        fill_whole(self.config.model, model, self.device())

    def device(self) -> torch.device:
        """Where this rank computes."""
        import torch

        on_gpu = torch.cuda.is_available() and self.config.device != "cpu"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    @abstractmethod
    def memory(self, shape: ModelShape) -> Held:
        """Bytes of weights, gradients and optimizer state that one rank holds."""

    def host(self, shape: ModelShape) -> float:
        """Bytes of the model that one rank holds in its host's memory for a moment, where it trains on a GPU."""
        return 0.0

    def microbatch_size(self) -> int | str:
        """Examples per rank and forward pass; `auto` lets Composer halve it until it fits on the GPU.

        Raises:
            ValueError: if the ranks do not divide the global batch, or this engine cannot find it automatically.
        """
        import torch

        per_rank = self.config.per_rank(self.ranks)
        if self.config.microbatch_size != "auto":
            return min(self.config.microbatch_size, per_rank)
        if self.config.device == "cpu" or not torch.cuda.is_available():
            return per_rank  # a CPU's memory has no edge to try
        if not self.finds_microbatch:
            raise ValueError(
                f"microbatch_size is auto and parallelism is {self.name}: a rank that runs out of memory leaves the "
                "others waiting for its shards; give a number, e.g. microbatch_size=4"
            )
        return "auto"

    def left_out(self, model: nn.Module) -> list[str]:
        """The keys of Composer's state that checkpoints leave out: frozen weights are read anew from their source."""
        return [f"state/model/{INNER}{name}" for name, p in model.named_parameters() if not p.requires_grad]

    def clip_gradients(self, state: State) -> None:
        """Measure the whole gradient and clip it to `optimizer.clip_grad_norm`: between backward pass and step.

        `get_total_norm` is the L2 norm over all tensors; of sharded ones it is a sharded scalar, summed up by `whole`.
        """
        import torch

        learning = [p for p in state.model.parameters() if p.grad is not None]
        if not learning:
            self._norm = 0.0
            return
        norm = self.whole(torch.nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None]))
        if self.config.optimizer.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(learning, self.config.optimizer.clip_grad_norm, norm)
        self._norm = norm

    def read(self, losses: list[Tensor]) -> list[float]:
        """Tensors of shape () -> their values, and the norm with them: the host waits once for the device."""
        import torch

        if isinstance(self._norm, float):
            read: list[float] = torch.stack(losses).tolist()
            return read
        self._norm, *read = torch.stack([self._norm.to(losses[0]), *losses]).tolist()
        return read

    def gradient_norm(self, state: State) -> float:
        """L2 norm of the gradient of the step that has just ended, as it was before clipping."""
        return float(self._norm)

    def whole_weights(self, state: State, keep: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        """The weights of the multimodal model whose name is kept: each with its name, one at a time, on the CPU.

        A collective, to its end; only rank 0 is given any.
        """
        from composer.utils import dist

        for key, weight in self.unwrapped(state).state_dict().items():
            name = key.removeprefix(INNER)
            if keep(name):
                whole = self.whole(weight)
                if dist.get_global_rank() == 0:
                    yield name, whole.detach().cpu()

    @classmethod
    def saved_weights(cls, checkpoint: Path, load: str) -> dict[str, Tensor]:
        """The weights that learn, by their names in the multimodal model, whole and on the CPU, without any rank.

        Args:
            checkpoint: folder of one.
            load: what Composer loads of it.

        Raises:
            ValueError, OSError, RuntimeError: if it holds something else.
        """
        import torch

        state = torch.load(checkpoint / load, weights_only=True, mmap=True, map_location="cpu")["state"]["model"]
        return {name.removeprefix(INNER): weight for name, weight in state.items()}

    def unwrapped(self, state: State) -> nn.Module:
        """Composer's model without what was put around it to spread it."""
        model: nn.Module = state.model
        return model

    def whole(self, tensor: Tensor) -> Tensor:
        """A weight or a norm with the parts of all ranks. A collective where these have parts."""
        return tensor

    def save(self, state: State, folder: Path) -> None:  # noqa: B027 - mostly Composer holds all
        """Write into a checkpoint's folder what Composer's file does not hold. A collective."""
