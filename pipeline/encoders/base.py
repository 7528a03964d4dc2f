"""What differs between vision encoders: how they are read, fed, walked, and what they cost.

Shapes: n images of S x S pixels; hidden states (n, prefix + grid*grid, C1), `prefix` tokens before the patch tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from PIL import Image
from torch import Tensor, nn

from .columns import block_of, is_cls
from .pixels import Colour, Pixels, normalised, padded_and_resized, resized_and_cropped


class VisionEncoder(ABC):
    """A family of vision encoders. It keeps no state: a tower (the module of transformers) is always given.

    Attributes:
        model_class: name of the vision part's class in transformers.
        mean, std: of RGB in 0..1, as the encoder was trained.
        prefix: tokens before the patch tokens; the first of them is the CLS token. 0 if there is none.
    """

    model_class: str
    mean: Colour
    std: Colour
    prefix: int

    @abstractmethod
    def layers(self, tower: nn.Module) -> nn.ModuleList:
        """The blocks, first to last."""

    @abstractmethod
    def embed(self, tower: nn.Module, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) -> hidden state 0, the input of the first block: (n, prefix + grid*grid, C1)."""

    @abstractmethod
    def flops(self, config: Any, deepest: int) -> int:
        """One image through the embedding and the first `deepest` blocks: 2 per multiply-add."""

    def read_config(self, name: str, revision: str | None = None) -> Any:
        """The vision part's configuration, of a Hub id or a folder; transformers' errors pass."""
        return self._model().config_class.from_pretrained(name, revision=revision)

    def load(self, name: str, revision: str | None = None, **more: Any) -> nn.Module:
        """The vision part with its weights, of a Hub id or a folder; `more` goes to transformers, whose errors pass."""
        tower: nn.Module = self._model().from_pretrained(name, revision=revision, **more)
        return tower

    def build(self, config: Any) -> nn.Module:
        """The vision part of this configuration, with initial weights."""
        tower: nn.Module = self._model()._from_config(config)
        return tower

    def _model(self) -> Any:
        import transformers

        return getattr(transformers, self.model_class)

    def hidden_states(self, tower: nn.Module, pixels: Tensor, wanted: Iterable[int]) -> dict[int, Tensor]:
        """(n, 3, S, S) -> {i: hidden state i}, (n, prefix + grid*grid, C1) each, without the final LayerNorm.

        State 0 is the embedding, state i the output of block i. No block above the deepest wanted one runs.
        """
        wanted = set(wanted)
        hidden, found = self.embed(tower, pixels), {}
        for block in range(max(wanted) + 1):
            if block > 0:
                hidden = self.layers(tower)[block - 1](hidden, None)
            if block in wanted:
                found[block] = hidden
        return found

    def columns(self, tower: nn.Module, pixels: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """(n, 3, S, S) -> {column: (n, grid*grid, C1)}, of a CLS column (n, 1, C1); in order of their blocks."""
        names = sorted(names, key=block_of)
        if not self.prefix and any(map(is_cls, names)):
            raise ValueError(f"{', '.join(filter(is_cls, names))}: {self.model_class} has no CLS token; leave it out")
        states = self.hidden_states(tower, pixels, map(block_of, names))
        # The CLS token comes first, the patch tokens after all `prefix` tokens.
        return {
            name: states[block_of(name)][:, :1] if is_cls(name) else states[block_of(name)][:, self.prefix :]
            for name in names
        }

    def keep_first(self, tower: nn.Module, blocks: int) -> None:
        """Drop the blocks behind the first `blocks`: nothing reads them."""
        del self.layers(tower)[blocks:]

    def pixels(self, image: Image.Image, aspect: str, size: int) -> Pixels:
        """RGB image -> float32 (3, size, size); `aspect` is `pad` to a square first, or `square` for the centre."""
        is_padded = aspect == "pad"
        rgb = padded_and_resized(image, size, self.mean) if is_padded else resized_and_cropped(image, size)
        return normalised(rgb, self.mean, self.std)
