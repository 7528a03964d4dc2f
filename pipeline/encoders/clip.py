"""OpenAI's CLIP (arXiv 2103.00020) and the encoders that share its architecture: LLaVA-1.5's ViT-L/14-336."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import VisionEncoder
from .columns import grid_of


class Clip(VisionEncoder):
    """A CLS token, then the patch tokens; LayerNorm before the first block."""

    model_class = "CLIPVisionModel"
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    prefix = 1

    def layers(self, tower: Any) -> nn.ModuleList:
        """The blocks, first to last."""
        layers: nn.ModuleList = tower.encoder.layers
        return layers

    def embed(self, tower: Any, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) -> (n, 1 + grid*grid, C1), after the first LayerNorm."""
        hidden: Tensor = tower.pre_layrnorm(tower.embeddings(pixels))
        return hidden

    def flops(self, config: Any, deepest: int) -> int:
        """Patch embedding, and per block attention (8 N d^2 + 4 N^2 d) and MLP (4 N d m), N = 1 + grid^2."""
        d, patches = config.hidden_size, grid_of(config) ** 2
        tokens = patches + self.prefix
        embedding = 2 * patches * 3 * config.patch_size**2 * d
        layer = 8 * tokens * d**2 + 4 * tokens * d * config.intermediate_size + 4 * tokens**2 * d
        return int(embedding + deepest * layer)
