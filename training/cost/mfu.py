"""Floating-point operations of a training step, and what share of the GPU's best they are (MFU)."""

from __future__ import annotations

from collections.abc import Collection

import torch

from training.cost.flops import head_flops, prefill_flops
from training.model.model import CompactVisionForConditionalGeneration

# Dense bf16 tensor-core FLOP/s, as the makers state them, by a part of the device's name; the first that fits counts.
_PEAK = {
    "B200": 2250e12,
    "H200": 989.5e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.5e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}


def peak_flops() -> float | None:
    """FLOP/s that this GPU can do in bf16; None without a GPU, or for one that is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAK.items() if part in name), None)


class StepFlops:
    """FLOPs (2 per multiply-add) that a step needs, forward and backward; what is computed twice counts once.

    Weights that learn cost 3 times their forward pass (forward, gradient of the input, of the weight), frozen ones 2
    times, as something before them learns; attention, a product of activations, 3 times. It counts in full, as in
    PaLM's definition of MFU (appendix B of arXiv 2204.02311); norms and activation functions do not count.
    """

    def __init__(self, model: CompactVisionForConditionalGeneration, train: Collection[str]) -> None:
        self.text = model.config.text_config
        layers = model.llm.get_decoder().layers
        learning = sum(p.numel() for p in layers.parameters() if p.requires_grad)
        # Between 2 (all frozen) and 3 (all learn): the gradient of the weights is needed only for those that learn.
        self.llm_factor = 2 + learning / sum(p.numel() for p in layers.parameters())
        self.image = model.connector.config.flops() * (3 if "connector" in train else 1)

    def __call__(self, lengths: Collection[int], images: int, supervised: int) -> float:
        """FLOPs of a step on a batch with examples of these lengths (vision tokens included)."""
        head = head_flops(self.text) * supervised
        # Q K^T and the weighted sum of V: 2 N^2 d each, in every layer.
        attention = 4 * self.text.hidden_size * self.text.num_hidden_layers * sum(n * n for n in lengths)
        matrices = sum(prefill_flops(self.text, n) for n in lengths) - attention
        return float(self.llm_factor * (matrices + head) + 3 * attention + self.image * images)
