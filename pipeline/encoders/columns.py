"""What the name of a feature column says: `block03` are patch tokens, `cls22` is a CLS token."""

from __future__ import annotations


def block_of(column: str) -> int:
    """The block whose output a column is: `block03` -> 3, `cls22` -> 22."""
    return int(column[-2:])


def is_cls(column: str) -> bool:
    """Whether a column is a CLS token, and no patch tokens."""
    return column.startswith("cls")
