"""Names of feature columns, and what can be read off them. It needs no torch: settings are checked with it.

A column is one hidden state of the encoder: `block03` is the patch tokens behind block 3, `cls22` the CLS token behind
block 22. Block 0 is the input of the first one.
"""

from __future__ import annotations

from typing import Any

PAPER_BLOCKS = (3, 6, 9, 12, 15, 18, 21, 24)  # section 3.3: every third of ViT-L/14's 24 blocks


def patch_column(block: int) -> str:
    """The column of a block's patch tokens: 3 -> `block03`."""
    return f"block{block:02d}"


def cls_column(block: int) -> str:
    """The column of a block's CLS token: 22 -> `cls22`."""
    return f"cls{block:02d}"


def block_of(column: str) -> int:
    """The block whose output a column is: `block03` -> 3, `cls22` -> 22."""
    return int(column[-2:])


def is_cls(column: str) -> bool:
    """Whether a column is a CLS token, and no patch tokens."""
    return column.startswith("cls")


def grid_of(encoder: Any) -> int:
    """Patches along one side of the image, of any description with `image_size` and `patch_size`: 336 and 14 -> 24."""
    return int(encoder.image_size // encoder.patch_size)
