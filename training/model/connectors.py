"""Connectors: columns of CLIP features in, vision tokens of the language model's width out.

    mbtf+stf      the method: Multi-Block Token Fusion (section 3.3), then Spatial Token Fusion (section 3.4)
    mbtf, stf     one of the two alone (Table 3)
    mlp           LLaVA-1.5's two-layer projector, all patch tokens
    avgpool       k x k mean, before or after that projector (Table 5)
    tokenconcat   k x k tokens joined along the channels, then a projector (Table 5)

A connector says which columns it needs, so that nothing else is read or computed. The same code works on features
from a store and on those of a CLIP that runs. This file needs torch alone: it travels with every exported model.

Notation: C1 is CLIP's width, C2 = k*k*C1, C3 the language model's width, n the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ARMS = ("mbtf+stf", "mbtf", "stf", "mlp", "avgpool", "tokenconcat")
PAPER_BLOCKS = (3, 6, 9, 12, 15, 18, 21, 24)  # section 3.3
RELEASED_BLOCKS = (23, 21, 18, 15, 12, 9, 6, 3)  # the channel order of the published weights


@dataclass(frozen=True)
class ConnectorConfig:
    """Which connector, of which shape.

    Attributes:
        arm: one of `ARMS`.
        preset: `paper` is what sections 3.3 and 3.4 define; `released` is the topology of the published weights: no
            GELU at the end of MBTF, and STF as one k x k convolution to 4*C3, GELU, and one projection to C3.
        blocks: CLIP blocks in channel order, for the arms with MBTF; None is the preset's own.
        block: the one CLIP block of the other arms; 23 of 24 is LLaVA-1.5's `select_layer=-2`.
        kernel_size: k; a window of k x k patch tokens becomes E tokens (Table 4).
        fused_tokens: E.
        pool: for avgpool, whether to pool before or after the projector.
        grid: patch tokens along one side of the image.
        vision_width: C1.
        llm_width: C3.

    Raises:
        ValueError: if the shapes do not fit each other.
    """

    arm: str = "mbtf+stf"
    preset: str = "paper"
    blocks: tuple[int, ...] | None = None
    block: int = 23
    kernel_size: int = 2
    fused_tokens: int = 1
    pool: str = "before"
    grid: int = 24
    vision_width: int = 1024
    llm_width: int = 4096

    def __post_init__(self) -> None:
        blocks = self.blocks or (RELEASED_BLOCKS if self.preset == "released" else PAPER_BLOCKS)
        object.__setattr__(self, "blocks", tuple(blocks))  # JSON has lists
        for value, known in ((self.arm, ARMS), (self.preset, ("paper", "released")), (self.pool, ("before", "after"))):
            if value not in known:
                raise ValueError(f"connector: {value!r} is unknown; expected one of {', '.join(known)}")
        if len(set(blocks)) != len(blocks):
            raise ValueError(f"connector.blocks names a block twice: {list(blocks)}")
        if self.arm not in ("mlp", "mbtf"):
            self._check_window()

    def _check_window(self) -> None:
        k, fused, grid = self.kernel_size, self.fused_tokens, self.grid
        if k < 1 or grid % k:
            divisors = [d for d in range(1, grid + 1) if grid % d == 0]
            raise ValueError(f"connector.kernel_size {k} does not divide the grid of {grid} x {grid}; use {divisors}")
        if "stf" not in self.arm:
            if fused != 1:
                raise ValueError(f"connector.fused_tokens {fused}: {self.arm} makes one token of a window; use 1")
            return
        if fused < 1 or (fused >= k * k and (k, fused) != (1, 1)):
            raise ValueError(
                f"connector.fused_tokens {fused} is not below kernel_size^2 = {k * k}: there would be no fewer tokens"
            )
        width = self.fused_width
        if width % fused:
            name = "C2 = k*k*C1" if self.preset == "paper" else "4*C3"
            raise ValueError(f"connector.fused_tokens {fused} does not divide the fused width {name} = {width}")

    @property
    def fused_width(self) -> int:
        """Channels of a fused window, which its E tokens share."""
        return self.kernel_size**2 * self.vision_width if self.preset == "paper" else 4 * self.llm_width

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns read, in channel order."""
        assert self.blocks is not None
        blocks = self.blocks if "mbtf" in self.arm else (self.block,)
        return tuple(f"block{block:02d}" for block in blocks)

    @property
    def tokens(self) -> int:
        """Vision tokens per image."""
        if self.arm in ("mlp", "mbtf"):
            return self.grid**2
        return (self.grid // self.kernel_size) ** 2 * self.fused_tokens


def build_connector(config: ConnectorConfig, available: Collection[str] | None = None) -> Connector:
    """The connector of `config`, with PyTorch's initial weights, as LLaVA-1.5.

    Raises:
        ValueError: if it needs a column that is not `available`.
    """
    missing = [name for name in config.columns if available is not None and name not in available]
    if missing:
        raise ValueError(
            f"connector {config.arm} needs {', '.join(missing)}; there is only {', '.join(sorted(available or ()))}. "
            "Choose other blocks, or add them to the store"
        )
    return Connector(config)


class Connector(nn.Module):
    """Named columns in, vision tokens out.

    Attributes:
        columns: the columns it needs, in channel order.
        tokens: vision tokens per image.
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.columns = config.columns
        self.tokens = config.tokens
        c1, c3, k = config.vision_width, config.llm_width, config.kernel_size
        self.mbtf = _mbtf(len(self.columns), c1, config.preset) if "mbtf" in config.arm else None
        self.stf = SpatialTokenFusion(config) if "stf" in config.arm else None
        # MBTF alone ends at width C1; the paper leaves open what follows, and LLaVA-1.5's projector is the least.
        self.mlp = None if self.stf is not None else _mlp(c1 * k * k if config.arm == "tokenconcat" else c1, c3)
        self._compiled: Callable[[list[Tensor]], Tensor] | None = None

    def compile(self, *args: Any, **settings: Any) -> None:
        """Let torch.compile take what is computed of two images and more: one graph for any number of them.

        None and one are computed as they are: to torch.compile 0 and 1 are constants, each with a graph of its own.
        """
        self._compiled = torch.compile(self._fused, *args, **settings)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what was compiled computes with the weights of this very connector."""
        return {**super().__getstate__(), "_compiled": None}  # type: ignore[no-untyped-call]

    def forward(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Columns of (n, grid*grid, C1) each -> (n, tokens, C3); n may be 0.

        Raises:
            ValueError: if a column is missing or has another shape.
        """
        selected = [self._column(columns, name) for name in self.columns]
        if self._compiled is None or len(selected[0]) < 2:
            return self._fused(selected)
        for column in selected:
            torch._dynamo.mark_dynamic(column, 0)  # or each number of images would be compiled anew
        return self._compiled(selected)

    def _fused(self, selected: list[Tensor]) -> Tensor:
        """Columns of (n, grid*grid, C1) each, in channel order -> (n, tokens, C3)."""
        x = selected[0] if self.mbtf is None else self.mbtf(torch.cat(selected, dim=-1))
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

    def _column(self, columns: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in columns:
            raise ValueError(f"the connector needs column {name}; given: {', '.join(columns) or 'none'}")
        column = columns[name]
        expected = (self.config.grid**2, self.config.vision_width)
        if column.shape[1:] != expected:
            raise ValueError(f"column {name} has shape {tuple(column.shape)}; expected (images, {expected})")
        device = column.device.type
        if torch.amp.autocast_mode.is_autocast_available(device) and torch.is_autocast_enabled(
            device
        ):  # the meta device has none
            return column  # autocast brings both sides to its own dtype; casting up first would cost memory
        return column.to(next(self.parameters()).dtype)


class SpatialTokenFusion(nn.Module):
    """STF (section 3.4, Table 1b): a window of k x k tokens becomes E tokens of the language model's width."""

    def __init__(self, config: ConnectorConfig) -> None:
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
        x = self.act(self.fuse(windows(x, self.grid, self.kernel_size)))
        n, count, width = x.shape
        x = x.reshape(n, count * self.fused_tokens, width // self.fused_tokens)
        return self.project(x)  # type: ignore[no-any-return]


def windows(x: Tensor, grid: int, k: int) -> Tensor:
    """(n, grid*grid, C) -> (n, (grid/k)^2, C*k*k), each window laid out (channel, dy, dx) as `F.unfold` does."""
    n, _, channels = x.shape
    side = grid // k
    x = x.reshape(n, side, k, side, k, channels).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(n, side * side, channels * k * k)


def _mean(x: Tensor, grid: int, k: int) -> Tensor:
    n, _, channels = x.shape
    side = grid // k
    return x.reshape(n, side, k, side, k, channels).mean(dim=(2, 4)).reshape(n, side * side, channels)


def _mbtf(blocks: int, c1: int, preset: str) -> nn.Sequential:
    """MBTF (section 3.3, Table 1a): 1x1 convolutions, that is Linear layers over the channels."""
    layers = [nn.Linear(blocks * c1, 4 * c1), nn.GELU(), nn.Linear(4 * c1, c1)]
    return nn.Sequential(*layers, nn.GELU()) if preset == "paper" else nn.Sequential(*layers)


def _mlp(width: int, c3: int) -> nn.Sequential:
    """LLaVA-1.5's `mlp2x_gelu` projector."""
    return nn.Sequential(nn.Linear(width, c3), nn.GELU(), nn.Linear(c3, c3))
