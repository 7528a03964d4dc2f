"""What a connector declares: all that settings, runs, costs, exports, tables and pages need to know of it.

A connector makes vision tokens of an image's features, before the language model. This file needs no torch, so that
mistakes in settings are found at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .connector import Connector


@dataclass(frozen=True)
class ConnectorConfig(ABC):
    """A connector's settings, with the shapes that it stands between.

    Every family adds its settings as fields with defaults, and raises ValueError where they do not fit each other.

    Attributes:
        arm: which connector; a name of `reducers.FAMILIES`.
        grid: patch tokens along one side of the image.
        vision_width: C1, width of the vision encoder.
        llm_width: C3, width of the language model.
    """

    arm: str
    grid: int = 24
    vision_width: int = 1024
    llm_width: int = 4096

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Names of the columns it reads, in order: `block03` for patch tokens, `cls22` for a CLS token."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Vision tokens per image that it makes."""

    @abstractmethod
    def flops(self) -> int:
        """From the columns of one image to its vision tokens: 2 per multiply-add, matrix products only."""

    @abstractmethod
    def build(self) -> Connector:
        """The module, with PyTorch's initial weights, as LLaVA-1.5."""

    @property
    def reads_text(self) -> bool:
        """Whether it is given the text around each image too (`Text`)."""
        return False

    @property
    def label(self) -> str:
        """A short name for a table's row, with the settings that change the number of tokens."""
        return self.arm

    def tokens_per_layer(self, layers: int) -> tuple[int, ...]:
        """Vision tokens of an image that each of the language model's layers sees."""
        return (self.tokens,) * layers

    def published_names(self) -> dict[str, str]:
        """Layers in the authors' checkpoints -> ours; empty if the authors' code has no such connector."""
        return {}
