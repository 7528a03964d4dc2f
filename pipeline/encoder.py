"""Images -> pixels -> frozen vision encoder -> the hidden states of the chosen blocks.

What differs between encoders stands in `pipeline/encoders`. CLIP's pixels are bit-equal to what LLaVA-1.5 computes (its
`image_aspect_ratio` "pad" or the plain centre crop, then CLIP's own processor), with two exceptions, where LLaVA-1.5
does not see what people see: it ignores EXIF rotation, which is applied here, and clips 16-bit images to white above
1/257 of their range, which are scaled to 8 bit here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipeline.encoders import encoder_of
from pipeline.encoders.base import VisionEncoder
from pipeline.encoders.columns import cls_column, patch_column
from pipeline.encoders.pixels import Pixels
from pipeline.schema import Aspect, Column, Compute, EncoderSpec


def family_of(name: str, revision: str | None) -> VisionEncoder:
    """How the encoder `name` (Hub id or folder) is fed and walked, from its configuration's type.

    Raises:
        ValueError: if there is no vision encoder of that name, or one of a type that is not known.
    """
    from transformers import PreTrainedConfig

    try:
        said = PreTrainedConfig.get_config_dict(name, revision=revision)[0]
    except Exception as error:  # the Hub client raises many kinds; all mean that the model is not to be had
        raise _unreadable(name, error) from error
    try:
        return encoder_of(str(said.get("model_type")))
    except ValueError as error:
        raise ValueError(f"encoder {name!r}: {error}") from error


def _unreadable(name: str, error: Exception) -> ValueError:
    """What a user is told when transformers or the Hub cannot give the encoder."""
    first = str(error).strip().partition("\n")[0]
    return ValueError(
        f"encoder {name!r}: no vision model can be read from it ({first}); name a folder that "
        "save_pretrained wrote or a Hub id, and see HF_HUB_OFFLINE and HF_HOME"
    )


def describe_encoder(name: str, revision: str | None) -> EncoderSpec:
    """Which encoder `name` (Hub id or folder) is, without loading its weights.

    Raises:
        ValueError: if there is no vision encoder of that name.
    """
    family = family_of(name, revision)
    try:
        config = family.read_config(name, revision)
    except Exception as error:  # as above
        raise _unreadable(name, error) from error
    folder = Path(name)
    digest = _folder_digest(folder) if folder.is_dir() else getattr(config, "_commit_hash", None)
    return EncoderSpec(
        id=name,
        revision=digest or revision or "unknown",
        blocks=config.num_hidden_layers,
        width=config.hidden_size,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )


def _folder_digest(folder: Path) -> str:
    """sha256 over the configuration and the weights of a local model."""
    digest = hashlib.sha256()
    files = sorted([*folder.glob("config.json"), *folder.glob("*.safetensors"), *folder.glob("*.bin")])
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def columns_of(spec: EncoderSpec, blocks: Iterable[int], cls: Iterable[int]) -> tuple[Column, ...]:
    """The columns of hidden states `blocks` (patch tokens) and `cls` (their CLS token).

    Raises:
        ValueError: naming every block that the encoder does not have.
    """
    beyond = sorted({*blocks, *cls} - set(range(spec.blocks + 1)))
    if beyond:
        raise ValueError(
            f"blocks {beyond}: encoder {spec.id} has {spec.blocks} blocks; choose from 0 (its input) to {spec.blocks}"
        )
    patches = [Column(name=patch_column(block), tokens=spec.grid**2, width=spec.width) for block in sorted(blocks)]
    return (*patches, *(Column(name=cls_column(block), tokens=1, width=spec.width) for block in sorted(cls)))


class Encoder:
    """A frozen encoder up to the deepest block that is asked for; later blocks are not even kept in memory.

    Args:
        name, revision: Hub id or folder of a model (vision part or whole).
        columns: what to compute. compute: dtype of the forward pass. device: where.

    Attributes:
        image_size: S, side of an image in pixels.
    """

    def __init__(
        self, name: str, revision: str | None, columns: tuple[Column, ...], compute: Compute, device: str = "cpu"
    ) -> None:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of every worker, in one log
        self.columns = columns
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, compute)
        self.family = family_of(name, revision)
        tower: Any = self.family.load(name, revision, dtype=self.dtype, attn_implementation="sdpa")
        self.image_size = int(tower.config.image_size)
        self.family.keep_first(tower, max(column.block for column in columns))
        self._tower = tower.requires_grad_(False).eval().to(self.device)

    def pixels(self, image: Image.Image, aspect: Aspect) -> Pixels:
        """RGB image -> float32 (3, S, S)."""
        return self.family.pixels(image, aspect, self.image_size)

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """float32 (n, 3, S, S) -> {column: (n, tokens, width)} in the compute dtype, on the device.

        `block03` is hidden state 3 (the output of block 3) without its CLS token and without the final LayerNorm.
        """
        names = [column.name for column in self.columns]
        features = self.family.columns(self._tower, pixels.to(self.device, self.dtype), names)
        for column in self.columns:
            found, expected = tuple(features[column.name].shape), (len(pixels), column.tokens, column.width)
            if found != expected:
                raise ValueError(
                    f"{column.name} has shape {found}, expected {expected}: correct {type(self.family).__name__}.prefix"
                )
        return features
