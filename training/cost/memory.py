"""How much memory a rank will need: weights, gradients and optimizer state exactly, activations roughly.

What is exact depends on the engine, which gives it as `Held`.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.config import TrainConfig

# Bytes per weight that learns, in fp32 under Adam, where nothing is shared between ranks.
WEIGHT, GRADIENT, MOMENTS = 4, 4, 8
CHECKPOINT = WEIGHT + MOMENTS  # what a checkpoint keeps of it, under every engine

ACTIVATION_BYTES = 36  # per token, layer and hidden channel, of a Llama layer without its MLP, in bf16 autocast
MLP_BYTES = 8  # per token, layer and channel of the MLP: gate, its SiLU, up, and their product
LOGIT_BYTES = 10  # per supervised token and word: bf16 logits, fp32 logits and their gradient


@dataclass(frozen=True)
class ModelShape:
    """What an estimate needs to know of a model; weights are counted in numbers, not bytes."""

    learning: int
    frozen: int
    layer: int
    layers: int
    hidden: int
    mlp: int
    vocabulary: int


@dataclass(frozen=True)
class Held:
    """Bytes that one rank holds from step to step."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it, without the allocator's own waste."""
        return self.weights + self.gradients + self.optimizer


def computed(config: TrainConfig) -> int:
    """Bytes of a weight as the forward pass computes with it."""
    return 2 if config.precision == "amp_bf16" else 4


def stored(config: TrainConfig) -> int:
    """Bytes of a frozen weight."""
    return 2 if config.model.frozen_dtype == "bfloat16" else 4


def gathered(config: TrainConfig, shape: ModelShape) -> float:
    """Bytes of the two layers that are whole at a time where weights are sharded: the one in use and the next."""
    return 2.0 * shape.layer * computed(config)


def activations(config: TrainConfig, shape: ModelShape, examples: int, text_tokens: int) -> float:
    """Bytes that the forward pass of a microbatch keeps for its backward pass, about.

    Args:
        examples: in the microbatch, each of `data.max_length` tokens.
        text_tokens: most supervised tokens of an example.
    """
    tokens = examples * config.data.max_length
    # The constants are of bf16, 2 bytes a number; fp32 keeps twice as much.
    layer = tokens * (ACTIVATION_BYTES * shape.hidden + MLP_BYTES * shape.mlp) * computed(config) / 2
    logits = examples * text_tokens * shape.vocabulary * LOGIT_BYTES
    if config.model.activation_checkpointing:
        # Each layer's input in fp32; beside that one layer is computed again, or the logits are there.
        return shape.layers * tokens * shape.hidden * 4 + max(layer, logits)
    return shape.layers * layer + logits
