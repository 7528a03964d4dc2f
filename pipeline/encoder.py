"""Image bytes -> pixels -> frozen CLIP -> the hidden states of the chosen blocks.

Pixels are bit-equal to what LLaVA-1.5 computes (its `image_aspect_ratio` "pad" or the plain centre crop, then CLIP's
own processor), here with Pillow and numpy alone.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from pipeline.schema import Aspect, Column, Compute, EncoderSpec

Pixels = npt.NDArray[np.float32]

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])  # CLIP's, of RGB in 0..1
STD = np.array([0.26862954, 0.26130258, 0.27577711])
PAD_COLOUR = (122, 116, 104)  # int(mean * 255), as LLaVA-1.5's expand2square
MAX_PIXELS = 178_956_970  # Pillow's own bound for a decompression bomb
_ADDRESS = re.compile(r" ?<?_io\.\w+ object at 0x[0-9a-f]+>?|0x[0-9a-f]{6,}")  # Pillow's texts hold object addresses


def load_image(data: bytes) -> Image.Image:
    """Decode an image of any format and mode that Pillow reads into upright RGB.

    Palette, grey, CMYK and alpha images are converted as LLaVA-1.5 does (`convert("RGB")`), 16-bit ones scaled to 8 bit
    first; EXIF orientation is applied, so a photo is seen as its viewer sees it.

    Raises:
        ValueError: with a reason that is the same on every machine, if there is no readable image.
    """
    if not data:
        raise ValueError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd EXIF, and the bomb that is refused below
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{image.width}x{image.height} pixels: refused as a decompression bomb; make it smaller"
                )
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith(("I", "F")):
                return _from_deep(upright)
            return upright.convert("RGB")
    except ValueError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"refused as a decompression bomb: {error}; make it smaller") from error
    except Exception as error:  # Pillow's decoders raise whatever they meet: OSError, SyntaxError, struct.error, ...
        reason = _ADDRESS.sub("", str(error)).strip() or type(error).__name__
        raise ValueError(f"unreadable image: {reason}") from error


def _from_deep(image: Image.Image) -> Image.Image:
    """16 and 32 bit grey to RGB: `convert` alone would clip everything above 255 to white."""
    numbers = np.asarray(image).astype(np.float64)
    top = 255.0 if numbers.max(initial=0) <= 255 else 65535.0
    grey = np.clip(numbers * (255.0 / top), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def preprocess(image: Image.Image, aspect: Aspect, size: int) -> Pixels:
    """RGB image -> float32 (3, size, size), as LLaVA-1.5: pad or not, short side to `size`, centre crop, normalise."""
    if aspect == "pad":
        image = _padded(image)
    width, height = image.size
    short, long = min(width, height), max(width, height)
    other = int(size * long / short)
    resized = image.resize((size, other) if width <= height else (other, size), Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    cropped = np.asarray(resized.crop((left, top, left + size, top + size)))
    scaled = (cropped * (1 / 255)).astype(np.float32)
    normalised = (scaled - MEAN.astype(np.float32)) / STD.astype(np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def _padded(image: Image.Image) -> Image.Image:
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def describe_encoder(name: str, revision: str | None) -> EncoderSpec:
    """Which encoder `name` (Hub id or folder) is, without loading its weights.

    Raises:
        ValueError: if there is no CLIP vision model of that name.
    """
    from transformers import CLIPVisionConfig

    try:
        config = CLIPVisionConfig.from_pretrained(name, revision=revision)
    except Exception as error:  # the Hub client raises many kinds; all mean that the model is not to be had
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"encoder {name!r}: no CLIP vision model can be read from it ({first}); name a folder that "
            "save_pretrained wrote or a Hub id, and see HF_HUB_OFFLINE and HF_HOME"
        ) from error
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
    patches = [Column(name=f"block{block:02d}", tokens=spec.grid**2, width=spec.width) for block in sorted(blocks)]
    return (*patches, *(Column(name=f"cls{block:02d}", tokens=1, width=spec.width) for block in sorted(cls)))


class Encoder:
    """Frozen CLIP up to the deepest block that is asked for; later blocks are not even kept in memory.

    Args:
        name, revision: Hub id or folder of a CLIP model (vision part or whole).
        columns: what to compute. compute: dtype of the forward pass. device: where.
    """

    def __init__(
        self, name: str, revision: str | None, columns: tuple[Column, ...], compute: Compute, device: str = "cpu"
    ) -> None:
        from transformers import CLIPVisionModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of every worker, in one log
        self.columns = columns
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, compute)
        model = CLIPVisionModel.from_pretrained(name, revision=revision, dtype=self.dtype, attn_implementation="sdpa")
        self.image_size = int(model.config.image_size)
        del model.encoder.layers[max(column.block for column in columns) :]
        self._model: Any = model.requires_grad_(False).eval().to(self.device)

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """float32 (n, 3, S, S) -> {column: (n, tokens, width)} in the compute dtype, on the device.

        `block03` is hidden state 3 (the output of block 3) without its CLS token and without the final LayerNorm.
        """
        wanted: dict[int, list[Column]] = {}
        for column in self.columns:
            wanted.setdefault(column.block, []).append(column)
        model, features = self._model, {}
        hidden = model.pre_layrnorm(model.embeddings(pixels.to(self.device, self.dtype)))
        for block in range(len(model.encoder.layers) + 1):
            if block:
                hidden = model.encoder.layers[block - 1](hidden, None)
            for column in wanted.get(block, ()):
                features[column.name] = hidden[:, :1] if column.name.startswith("cls") else hidden[:, 1:]
        return features
