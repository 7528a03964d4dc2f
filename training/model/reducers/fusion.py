"""Fusion of blocks and of windows: the paper's method, each of its two parts, and the simple reductions beside it.

    mbtf+stf      the method: Multi-Block Token Fusion (section 3.3), then Spatial Token Fusion (section 3.4)
    mbtf, stf     one of the two (Table 3)
    mlp           LLaVA-1.5's two-layer projector, all patch tokens
    avgpool       k x k mean, before or after that projector (Table 5)
    tokenconcat   k x k tokens joined along the channels, then a projector (Table 5)

`fusion_layers.py` computes them. C1 is the encoder's width, C2 = k*k*C1, C3 the language model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from pipeline.encoders.columns import PAPER_BLOCKS, patch_column

from .base import ConnectorConfig

PUBLISHED = {  # layers in the authors' checkpoints -> ours: LLaVA-STF's released topology, and LLaVA-1.5's projector
    "mbtf+stf": {
        "model.mm_projector_crosslayer.0": "mbtf.0",
        "model.mm_projector_crosslayer.2": "mbtf.2",
        "model.mm_projector.0": "stf.fuse",
        "model.mm_projector.2": "stf.project.0",
    },
    "mlp": {"model.mm_projector.0": "mlp.0", "model.mm_projector.2": "mlp.2"},
}
RELEASED_BLOCKS = (23, 21, 18, 15, 12, 9, 6, 3)  # the channel order of the published weights


def _setting(default: object, description: str, **bounds: Any) -> Any:
    """A field with what `--help` and the check of settings need: pydantic's words."""
    return field(default=default, metadata={"description": description, **bounds})


@dataclass(frozen=True)
class FusionConfig(ConnectorConfig):
    """Which of the family, of which shape.

    Attributes:
        preset: `paper` is what sections 3.3 and 3.4 define; `released` is the topology of the published weights: no
            GELU at the end of MBTF, and STF as one k x k convolution to 4*C3, GELU, and one projection to C3.
        blocks: the encoder's blocks in channel order, for the arms with MBTF; None is the preset's own.
        block: the one block of the other arms; 23 of 24 is LLaVA-1.5's `select_layer=-2`.
        kernel_size: k; a window of k x k patch tokens becomes E tokens (Table 4).
        fused_tokens: E.
        pool: for avgpool, whether to pool before or after the projector.
        hidden_width: of `released` STF, between its two layers; None is 4*C3. The authors' code has 16*C1 whatever the
            language model is: 16384, which differs from 4*C3 at 13B.

    Raises:
        ValueError: if the shapes do not fit each other.
    """

    arm: Literal["mbtf+stf", "mbtf", "stf", "mlp", "avgpool", "tokenconcat"] = "mbtf+stf"
    preset: Literal["paper", "released"] = _setting("paper", "as the paper defines it, or as released")
    blocks: tuple[int, ...] | None = _setting(
        None, "blocks, in channel order; default: the preset's eight", min_length=1
    )
    block: int = _setting(23, "the one block of arms without MBTF; 23 is LLaVA's select_layer -2", ge=0)
    kernel_size: int = _setting(2, "k: a k x k window of patch tokens is fused (Table 4)", gt=0)
    fused_tokens: int = _setting(1, "E: into E tokens (Table 4)", gt=0)
    pool: Literal["before", "after"] = _setting("before", "avgpool: before or after the MLP")
    hidden_width: int | None = _setting(None, "of released STF, instead of 4*C3; the authors' is 16*C1", gt=0)

    def __post_init__(self) -> None:
        hints = get_type_hints(FusionConfig)
        for name in ("arm", "preset", "pool"):
            known = get_args(hints[name])
            if getattr(self, name) not in known:
                raise ValueError(
                    f"connector.{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}"
                )
        blocks = self.blocks or (RELEASED_BLOCKS if self.preset == "released" else PAPER_BLOCKS)
        object.__setattr__(self, "blocks", tuple(blocks))  # JSON has lists
        if len(set(blocks)) != len(blocks):
            raise ValueError(f"connector.blocks {list(blocks)} names a block twice; name each once")
        if self.hidden_width is not None and (self.preset != "released" or "stf" not in self.arm):
            raise ValueError(
                f"connector.hidden_width {self.hidden_width} is of STF in the released preset; leave it out of "
                f"{self.arm} in the {self.preset} one"
            )
        if self.arm not in ("mlp", "mbtf"):
            self._check_window()

    def _check_window(self) -> None:
        """Raise ValueError if windows do not tile the grid, or E does not divide a fused window's channels."""
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
                f"connector.fused_tokens {fused} is not below kernel_size^2 = {k * k}: there would be no fewer tokens; "
                "lower it, or raise kernel_size"
            )
        width = self.fused_width
        if width % fused:
            name = "C2 = k*k*C1" if self.preset == "paper" else "hidden_width, or 4*C3,"
            raise ValueError(
                f"connector.fused_tokens {fused} does not divide the fused width {name} = {width}; use a divisor of it"
            )

    @property
    def fused_width(self) -> int:
        """Channels of a fused window, which its E tokens share."""
        if self.preset == "paper":
            return self.kernel_size**2 * self.vision_width
        return self.hidden_width or 4 * self.llm_width

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns read, in channel order."""
        assert self.blocks is not None
        blocks = self.blocks if "mbtf" in self.arm else (self.block,)
        return tuple(map(patch_column, blocks))

    @property
    def tokens(self) -> int:
        """Vision tokens per image."""
        if self.arm in ("mlp", "mbtf"):
            return self.grid**2
        return (self.grid // self.kernel_size) ** 2 * self.fused_tokens

    @property
    def label(self) -> str:
        """The arm, with k and E where windows are fused."""
        return self.arm if self.arm in ("mlp", "mbtf") else f"{self.arm} k={self.kernel_size} E={self.fused_tokens}"

    def flops(self) -> int:
        """The columns of one image to its vision tokens: every Linear layer of `Fusion`."""
        c1, c3, k, patches = self.vision_width, self.llm_width, self.kernel_size, self.grid**2
        products = 0  # multiply-adds
        if "mbtf" in self.arm:  # blocks * C1 -> 4 C1 -> C1, at every patch
            products += patches * (len(self.columns) * c1 * 4 * c1 + 4 * c1 * c1)
        if "stf" in self.arm:
            narrow = self.fused_width // self.fused_tokens
            # k*k*C1 -> the fused width, once per window; then each of its E tokens -> (4 C3 ->) C3.
            products += patches // k**2 * k**2 * c1 * self.fused_width
            products += self.tokens * (narrow * 4 * c3 + 4 * c3 * c3 if self.preset == "paper" else narrow * c3)
        else:  # the two-layer projector, on as many tokens as are left before it
            width = k * k * c1 if self.arm == "tokenconcat" else c1
            projected = patches if self.arm == "avgpool" and self.pool == "after" else self.tokens
            products += projected * (width * c3 + c3 * c3)
        return 2 * products

    def published_names(self) -> dict[str, str]:
        """The released topology with E = 1, and LLaVA-1.5's projector."""
        as_released = self.arm == "mlp" or (self.preset, self.fused_tokens) == ("released", 1)
        return PUBLISHED.get(self.arm, {}) if as_released else {}


def published_config(shapes: Mapping[str, Sequence[int]], grid: int, vision_width: int | None = None) -> FusionConfig:
    """The connector whose weights have these published names and shapes: widths, blocks and k are read off them.

    Args:
        shapes: of each weight and bias.
        grid: patch tokens along one side of the image.
        vision_width: C1, which the plain projector's shapes do not tell from k*k*C1; None takes its input for C1.

    Raises:
        ValueError: naming every key that is missing, and every one that was not used; or what the shapes do not fit.
    """
    arm: Literal["mbtf+stf", "mlp"] = "mbtf+stf" if any("crosslayer" in name for name in shapes) else "mlp"
    wanted = {f"{layer}.{kind}" for layer in PUBLISHED[arm] for kind in ("weight", "bias")}
    missing, unused = sorted(wanted - shapes.keys()), sorted(shapes.keys() - wanted)
    if missing or unused:
        raise ValueError(f"missing {missing or 'nothing'}, not used {unused or 'nothing'}")
    # A weight is (out, in): MBTF's first layer reads blocks * C1, STF's k*k*C1, the plain projector's C1.
    hidden, width = shapes["model.mm_projector.0.weight"][:2]
    c3, narrow = shapes["model.mm_projector.2.weight"][:2]
    c1 = shapes["model.mm_projector_crosslayer.2.bias"][0] if arm == "mbtf+stf" else vision_width or width
    if arm == "mlp" and width == c1:
        return FusionConfig(arm, grid, width, c3, preset="released")
    k = _kernel_size(width, c1, hidden, narrow)
    if arm == "mlp":
        raise ValueError(
            f"without MBTF, its projector reads {width} channels of an encoder of {c1}: stf and tokenconcat of "
            f"kernel_size {k} have these shapes both, and only mbtf+stf and mlp are published; give a projector with "
            "mm_projector_crosslayer, or the encoder that it reads"
        )
    blocks = shapes["model.mm_projector_crosslayer.0.weight"][1] // c1
    if blocks != len(RELEASED_BLOCKS):
        raise ValueError(f"it reads {blocks} blocks, the published one {len(RELEASED_BLOCKS)}; take one that does")
    own = None if hidden == 4 * c3 else hidden
    return FusionConfig(arm, grid, c1, c3, preset="released", kernel_size=k, hidden_width=own)


def _kernel_size(width: int, c1: int, hidden: int, narrow: int) -> int:
    """k of a projector that reads k*k*C1 channels.

    Raises:
        ValueError: if it reads another number, or its second layer does not read all that its first one writes.
    """
    k = math.isqrt(width // c1)
    if k * k * c1 != width:
        raise ValueError(f"its projector reads {width} channels, no k*k of the encoder's {c1}; take another encoder")
    if narrow != hidden:
        raise ValueError(
            f"its first layer writes {hidden} channels and its second reads {narrow}: kernel_size {k} with "
            f"fused_tokens {hidden / narrow:g}, where the published one has 1; take one of one token per window"
        )
    return k
