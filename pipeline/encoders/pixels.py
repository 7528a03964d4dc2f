"""Images to pixels, bit for bit as LLaVA-1.5, with Pillow and numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

Colour = tuple[float, float, float]
Pixels = npt.NDArray[np.float32]


def upright_rgb(image: Image.Image) -> Image.Image:
    """RGB as a viewer sees it: EXIF orientation applied, 16-bit grey scaled to 8 bit, other modes by `convert`."""
    upright: Image.Image = ImageOps.exif_transpose(image)
    return _from_deep(upright) if upright.mode.startswith(("I", "F")) else upright.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """16 and 32 bit grey to RGB: `convert` would clip everything above 255 to white."""
    numbers = np.asarray(image).astype(np.float64)  # (height, width)
    # Files do not say how many bits they use: one without a value above 255 is taken for 8 bit.
    top = 255.0 if numbers.max(initial=0) <= 255 else 65535.0
    grey = np.clip(numbers * (255.0 / top), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def padded(image: Image.Image, mean: Colour) -> Image.Image:
    """A square with the image in its middle, on the encoder's mean colour: LLaVA-1.5's expand2square."""
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    red, green, blue = (int(channel * 255) for channel in mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def resized_and_cropped(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """RGB image -> uint8 (size, size, 3): bicubic with the short side to `size`, then the centre."""
    width, height = image.size
    other = int(size * max(width, height) / min(width, height))
    resized = image.resize((size, other) if width <= height else (other, size), Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def normalised(rgb: npt.NDArray[np.uint8], mean: Colour, std: Colour) -> Pixels:
    """uint8 (H, W, 3) -> float32 (3, H, W), zero mean and unit variance over the encoder's training images."""
    # The order and the dtypes of these operations are those of CLIP's processor: the last bits depend on them.
    scaled = (rgb * (1 / 255)).astype(np.float32)
    centred = (scaled - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return np.ascontiguousarray(centred.transpose(2, 0, 1))
