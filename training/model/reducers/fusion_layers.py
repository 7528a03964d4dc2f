"""The layers of `fusion.py`'s connectors.

Notation: C1 is the encoder's width, C2 = k*k*C1, C3 the language model's width, n the number of images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .connector import Connector, Text
from .fusion import FusionConfig


class Fusion(Connector):
    """MBTF, STF, both, or one of the simple reductions."""

    config: FusionConfig

    def __init__(self, config: FusionConfig) -> None:
        super().__init__(config)
        c1, c3, k = config.vision_width, config.llm_width, config.kernel_size
        self.mbtf = _mbtf(len(self.columns), c1, config.preset) if "mbtf" in config.arm else None
        self.stf = SpatialTokenFusion(config) if "stf" in config.arm else None
        # MBTF without STF ends at width C1; the paper leaves open what follows, and LLaVA-1.5's projector is the least.
        self.mlp = None if self.stf is not None else _mlp(c1 * k * k if config.arm == "tokenconcat" else c1, c3)

    def reduce(self, columns: list[Tensor], text: Text | None = None) -> Tensor:
        """Columns of (n, grid*grid, C1) each, in channel order -> (n, tokens, C3)."""
        # MBTF joins the blocks along the channels: (n, grid*grid, blocks * C1) -> (n, grid*grid, C1).
        x = columns[0] if self.mbtf is None else self.mbtf(torch.cat(columns, dim=-1))
        if self.stf is not None:
            return self.stf(x)  # type: ignore[no-any-return]
        assert self.mlp is not None
        arm, grid, k = self.config.arm, self.config.grid, self.config.kernel_size
        if arm == "tokenconcat":
            x = windows(x, grid, k)
        elif arm == "avgpool" and self.config.pool == "before":
            x = _mean(x, grid, k)
        x = self.mlp(x)
        return _mean(x, grid, k) if arm == "avgpool" and self.config.pool == "after" else x


class SpatialTokenFusion(nn.Module):
    """STF (section 3.4, Table 1b): a window of k x k tokens becomes E tokens of the language model's width."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        k, c1, c3 = config.kernel_size, config.vision_width, config.llm_width
        self.grid, self.kernel_size, self.fused_tokens = config.grid, k, config.fused_tokens
        # A stride-k convolution sees each number once: it is a matrix product of unfolded windows. As a Linear it is
        # one large GEMM in any dtype and layout, and its weight is both `conv.weight.flatten(1)` and, unpermuted, the
        # published one. nn.Linear and nn.Conv2d also start from the same distribution.
        self.fuse = nn.Linear(k * k * c1, config.fused_width)
        narrow = config.fused_width // config.fused_tokens
        if config.preset == "paper":
            self.project = nn.Sequential(nn.Linear(narrow, 4 * c3), nn.GELU(), nn.Linear(4 * c3, c3), nn.GELU())
        else:
            self.project = nn.Sequential(nn.Linear(narrow, c3))
        self.act = nn.GELU()  # the exact erf form, here and everywhere

    def forward(self, x: Tensor) -> Tensor:
        """(n, grid*grid, C1) -> (n, (grid/k)^2 * E, C3): windows in reading order, the E tokens of each together.

        The E tokens are contiguous slices of the fused channels.
        """
        x = self.act(self.fuse(windows(x, self.grid, self.kernel_size)))  # (n, windows, fused width)
        n, count, width = x.shape
        x = x.reshape(n, count * self.fused_tokens, width // self.fused_tokens)
        return self.project(x)  # type: ignore[no-any-return]


def windows(x: Tensor, grid: int, k: int) -> Tensor:
    """(n, grid*grid, C) -> (n, (grid/k)^2, C*k*k), each window laid out (channel, dy, dx) as `F.unfold` does."""
    n, _, channels = x.shape
    side = grid // k
    # (n, window row, dy, window column, dx, channel) -> (n, window row, window column, channel, dy, dx)
    x = x.reshape(n, side, k, side, k, channels).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(n, side * side, channels * k * k)


def _mean(x: Tensor, grid: int, k: int) -> Tensor:
    """(n, grid*grid, C) -> (n, (grid/k)^2, C): the mean of each window."""
    n, _, channels = x.shape
    side = grid // k
    by_window = x.reshape(n, side, k, side, k, channels)  # rows and columns of windows, each with its k places
    return by_window.mean(dim=(2, 4)).reshape(n, side * side, channels)


def _mbtf(blocks: int, c1: int, preset: str) -> nn.Sequential:
    """MBTF (section 3.3, Table 1a), 1x1 convolutions as Linear layers: (n, tokens, blocks * C1) -> (n, tokens, C1)."""
    layers = [nn.Linear(blocks * c1, 4 * c1), nn.GELU(), nn.Linear(4 * c1, c1)]
    return nn.Sequential(*layers, nn.GELU()) if preset == "paper" else nn.Sequential(*layers)


def _mlp(width: int, c3: int) -> nn.Sequential:
    """LLaVA-1.5's `mlp2x_gelu` projector: (n, tokens, width) -> (n, tokens, C3)."""
    return nn.Sequential(nn.Linear(width, c3), nn.GELU(), nn.Linear(c3, c3))
