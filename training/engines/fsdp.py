"""fsdp: weights, gradients and optimizer state are sharded, by Composer's FSDP2; a layer is gathered for its use."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.config import TrainConfig
from training.cost.memory import GRADIENT, MOMENTS, WEIGHT, Held, ModelShape, gathered, stored
from training.engines.base import INNER, Engine

if TYPE_CHECKING:
    from composer import Trainer
    from torch import Tensor, nn

    from training.model.model import CompactVisionForConditionalGeneration


class Fsdp(Engine):
    """PyTorch's FSDP2: each layer of the LLM and the connector are gathered before use and dropped after it."""

    on_one_rank = "ddp"
    whole_everywhere = False

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """Refuse adapters on weights of another dtype.

        Raises:
            ValueError: with what to say instead.
        """
        if config.model.lora is not None and config.model.frozen_dtype != "float32":
            raise ValueError(
                "model.lora with parallelism fsdp: FSDP shards the weights of a layer together, in one dtype, and "
                f"adapters are float32, model.frozen_dtype is {config.model.frozen_dtype}; say "
                "model.frozen_dtype=float32, or parallelism=zero2"
            )

    def place(self, model: CompactVisionForConditionalGeneration) -> None:
        """Left to the trainer, which shards the weights first: then a rank fills in its share and nothing else."""

    def trainer(self, left_out: list[str], settings: dict[str, Any]) -> Trainer:
        """Composer's Trainer with its FSDP2."""
        from composer.utils.parallelism import FSDP2Config

        from training.engines.fsdp_trainer import FillingTrainer
        from training.engines.weights import LlmWeights
        from training.model.reducers.connector import Connector

        model = settings["model"].model
        layer = type(model.llm.get_decoder().layers[0])
        weights = LlmWeights(self.config.model, model.llm)
        # Composer asks this of every module: each one it says yes to is sharded, gathered and dropped by itself.
        model.fsdp_wrap_fn = lambda module: isinstance(module, layer | Connector)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental")
            trainer = FillingTrainer(
                lambda name, weight: weights.fill(name, weight, self.device()),
                precision=self.config.precision,
                parallelism_config={"fsdp": FSDP2Config(reshard_after_forward=True)},
                load_ignore_keys=left_out or None,  # a sharded load asks for every key that it is not told of
                **settings,
            )
        if trainer.state.device.name == "cpu" and not self._gloo_averages():
            self._average_on_gloo(model)
        return trainer

    def memory(self, shape: ModelShape) -> Held:
        """A share of everything, and two layers gathered: the one in use and the one that comes next."""
        learning = float(shape.learning)
        return Held(
            weights=(WEIGHT * learning + stored(self.config) * shape.frozen) / self.ranks
            + gathered(self.config, shape),
            gradients=GRADIENT * learning / self.ranks,
            optimizer=MOMENTS * learning / self.ranks,
        )

    def whole(self, tensor: Tensor) -> Tensor:
        """The parts of all ranks together."""
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @classmethod
    def saved_weights(cls, checkpoint: Path, load: str) -> dict[str, Tensor]:
        """The weights of all ranks' shards: PyTorch's reader finds the parts of each in the files."""
        import torch
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata
        from torch.distributed.checkpoint.state_dict_loader import load as read_parts

        reader, before = FileSystemReader(checkpoint / load), f"state.model.{INNER}"
        weights = {
            key: torch.empty(known.size, dtype=known.properties.dtype)
            for key, known in reader.read_metadata().state_dict_metadata.items()
            if key.startswith(before) and isinstance(known, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # one process is what is wanted
            try:
                read_parts(weights, storage_reader=reader)
            except CheckpointException as error:  # no Exception to Python
                raise OSError(f"{checkpoint / load} cannot be read: {error}; name an older checkpoint") from error
        return {key.removeprefix(before): weight for key, weight in weights.items()}

    def _gloo_averages(self) -> bool:
        """Whether a mean over the ranks is one: gloo silently gives the sum up to PyTorch 2.10. A collective."""
        import torch

        mean, ones = torch.zeros(1), torch.ones(self.ranks)  # each rank gets the mean of its place: 1, or the sum
        torch.distributed.reduce_scatter_tensor(mean, ones, op=torch.distributed.ReduceOp.AVG)
        return float(mean) == 1.0

    def _average_on_gloo(self, model: nn.Module) -> None:
        """FSDP2 asks for the mean of gradients: divide the sum that gloo gives."""
        from torch.distributed.fsdp import FSDPModule

        def divide(gradient: Tensor) -> None:
            """In place, after the reduction over ranks; `gradient` is this rank's flat share."""
            gradient.div_(self.ranks)

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_all_reduce_hook(divide)
