"""How much memory a rank will need: weights, gradients and optimizer state exactly, activations roughly."""

from __future__ import annotations

from dataclasses import dataclass

from training.config import TrainConfig

CHECKPOINT_BYTES = 12  # per learning weight: fp32, and Adam's two moments
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
class Estimate:
    """Bytes on one rank's device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of it, without the allocator's own waste."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate(config: TrainConfig, shape: ModelShape, ranks: int, examples: int, text_tokens: int) -> Estimate:
    """Memory of one rank at its peak, with `examples` of `data.max_length` in a microbatch.

    DDP keeps everything whole and gradients twice, once in the buckets that are reduced; FSDP shards all of it and
    gathers two layers; ZeRO-1 shards the optimizer's state, with it the fp32 weights (the engine computes in bf16),
    ZeRO-2 gradients too, ZeRO-3 weights too (Rajbhandari et al., 2020, figure 1).

    Args:
        text_tokens: most supervised tokens of an example.
    """
    engine: str = config.parallelism
    half = 2 if config.precision == "amp_bf16" else 4
    frozen_bytes = 2 if config.model.frozen_dtype == "bfloat16" else 4
    learning, frozen = float(shape.learning), float(shape.frozen * frozen_bytes)
    gathered = 2 * shape.layer * half
    if engine == "ddp":
        cast = half * learning if half == 2 else 0.0  # autocast keeps the bf16 copies from forward to backward
        parts = (4 * learning + cast + frozen, 4 * learning * min(ranks, 2), 8 * learning)
    elif engine == "fsdp":
        parts = ((4 * learning + frozen) / ranks + gathered, 4 * learning / ranks, 8 * learning / ranks)
    else:
        stage = int(engine[-1])
        weights = half * learning + half * shape.frozen
        parts = (
            weights / ranks + gathered if stage == 3 else weights,
            half * learning / (ranks if stage >= 2 else 1),
            CHECKPOINT_BYTES * learning / ranks,
        )
    return Estimate(*parts, _activations(config, shape, examples, text_tokens, half / 2))


def _activations(config: TrainConfig, shape: ModelShape, examples: int, text_tokens: int, wide: float) -> float:
    tokens = examples * config.data.max_length
    layer = tokens * (ACTIVATION_BYTES * shape.hidden + MLP_BYTES * shape.mlp) * wide
    logits = examples * text_tokens * shape.vocabulary * LOGIT_BYTES
    if config.model.activation_checkpointing:
        return shape.layers * tokens * shape.hidden * 4 + max(layer, logits)
    return shape.layers * layer + logits
