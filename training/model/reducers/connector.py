"""What a connector computes: the module that every family's is made from.

Shapes: n images; grid*grid patch tokens of width C1 in a column; vision tokens of the language model's width C3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pipeline.encoders.columns import block_of, grid_of, is_cls

from .base import ConnectorConfig


class Text(NamedTuple):
    """The text around each image, for a connector that reads it: embeddings (n, L, C3), mask (n, L), True for text."""

    embeds: Tensor
    mask: Tensor


class Connector(nn.Module, ABC):
    """Named columns in, vision tokens out: the same on features from a store and on those of an encoder that runs.

    Attributes:
        config: its declaration.
        columns: the columns it needs, in order.
        tokens: vision tokens per image.
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.columns = config.columns
        self.tokens = config.tokens
        self._compiled: Callable[..., Tensor] | None = None

    @abstractmethod
    def reduce(self, columns: list[Tensor], text: Text | None) -> Tensor:
        """Columns in order, (n, grid*grid, C1) each and (n, 1, C1) for CLS -> (n, tokens, C3); n may be 0."""

    def compile(self, *args: Any, **settings: Any) -> None:
        """Let torch.compile take what is computed of two images and more: one graph for any number of them.

        None and one are computed as they are: to torch.compile 0 and 1 are constants, each with its own graph.
        """
        self._compiled = torch.compile(self.reduce, *args, **settings)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what was compiled computes with the weights of this very connector."""
        return {**super().__getstate__(), "_compiled": None}  # type: ignore[no-untyped-call]

    def forward(self, columns: Mapping[str, Tensor], text: Text | None = None) -> Tensor:
        """Columns by name, (n, grid*grid, C1) or (n, 1, C1) each -> (n, tokens, C3).

        Raises:
            ValueError: if a column is missing or has another shape.
        """
        selected = [self._column(columns, name) for name in self.columns]
        if self._compiled is None or len(selected[0]) < 2:
            return self.reduce(selected, text)
        for column in selected:
            torch._dynamo.mark_dynamic(column, 0)  # or each number of images would be compiled anew
        return self._compiled(selected, text)

    def _column(self, columns: Mapping[str, Tensor], name: str) -> Tensor:
        """A column, (n, grid*grid, C1) or (n, 1, C1), in the dtype of the weights."""
        if name not in columns:
            raise ValueError(
                f"the connector needs column {name}; given: {', '.join(columns) or 'none'}; build the store with it"
            )
        column = columns[name]
        expected = (1 if is_cls(name) else self.config.grid**2, self.config.vision_width)
        if column.shape[1:] != expected:
            raise ValueError(
                f"column {name} has shape {tuple(column.shape)}; expected (images, {expected[0]}, {expected[1]}): it "
                "is of another encoder than the connector was made for"
            )
        device = column.device.type
        knows_autocast = torch.amp.autocast_mode.is_autocast_available(device)  # the meta device does not
        if knows_autocast and torch.is_autocast_enabled(device):
            return column  # autocast brings both sides to its own dtype; casting up first would cost memory
        return column.to(self._computed_in(column.dtype))

    def _computed_in(self, otherwise: torch.dtype) -> torch.dtype:
        """The floating dtype of most weights; `otherwise` if there is none: what is quantised takes what comes.

        Packed weights are bytes or no parameters at all. Their biases, and what was left whole, say it then.
        """
        found: Counter[torch.dtype] = Counter()
        for weight in self.parameters():
            if weight.dtype in (torch.float32, torch.bfloat16, torch.float16):
                found[weight.dtype] += 1 + weight.numel()  # 1: a sharded weight may have no numbers here
        return max(found, key=found.__getitem__, default=otherwise)


def check_tower(vision: PreTrainedConfig, connector: Connector) -> None:
    """Raise ValueError if the tower's grid, width or depth is not what the connector was made for."""
    found = (grid_of(vision), vision.hidden_size)
    expected = (connector.config.grid, connector.config.vision_width)
    if found != expected:
        raise ValueError(
            f"the vision tower makes {found[0]} x {found[0]} tokens of width {found[1]}; the connector expects "
            f"{expected[0]} x {expected[0]} of width {expected[1]}: give it the encoder of its store"
        )
    deepest = max(map(block_of, connector.columns))
    if deepest > vision.num_hidden_layers:
        raise ValueError(
            f"the connector needs block {deepest}; the vision tower has {vision.num_hidden_layers}: give it the "
            "encoder of its store"
        )
