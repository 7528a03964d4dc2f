"""Upright RGB images to pixels, bit for bit as LLaVA-1.5, with Pillow and numpy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

Colour = tuple[float, float, float]
Pixels = npt.NDArray[np.float32]
BAND = 2**24  # pixels that are worked on at a time: of most images all


def padded_and_resized(image: Image.Image, size: int, mean: Colour) -> npt.NDArray[np.uint8]:
    """RGB image -> uint8 (size, size, 3): LLaVA-1.5's expand2square on the encoder's mean colour, then bicubic.

    Pillow resizes every row, then every column. So rows are padded and resized some at a time, and the square, which
    for a long image is gigabytes, never exists; the result is the same to the last bit.
    """
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    colour = (int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255))
    narrow = Image.new("RGB", (size, side), colour)  # the square after its rows are resized
    for first, last in bands(height, side):
        rows = Image.new("RGB", (side, last - first), colour)
        rows.paste(image.crop((0, first, width, last)), (left, 0))
        narrow.paste(rows.resize((size, last - first), Image.Resampling.BICUBIC), (0, top + first))
    return np.asarray(narrow.resize((size, size), Image.Resampling.BICUBIC))


def resized_and_cropped(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """RGB image -> uint8 (size, size, 3): bicubic with the short side to `size`, then the centre.

    As above, rows before columns, so that what is not seen of a long image is cut before it takes memory.
    """
    width, height = image.size
    other = int(size * max(width, height) / min(width, height))
    wide, high = (size, other) if width <= height else (other, size)
    left, top = (wide - size) // 2, (high - size) // 2
    rows = image.resize((wide, height), Image.Resampling.BICUBIC).crop((left, 0, left + size, height))
    centre = Image.new("RGB", (size, size))
    for first, last in bands(size, high):
        columns = rows.crop((first, 0, last, height)).resize((last - first, high), Image.Resampling.BICUBIC)
        centre.paste(columns.crop((0, top, last - first, top + size)), (first, 0))
    return np.asarray(centre)


def bands(count: int, length: int) -> Iterator[tuple[int, int]]:
    """`count` rows or columns of `length` pixels, as many at a time as BAND pixels hold: (first, behind the last)."""
    step = max(1, BAND // length)
    for first in range(0, count, step):
        yield first, min(first + step, count)


def normalised(rgb: npt.NDArray[np.uint8], mean: Colour, std: Colour) -> Pixels:
    """uint8 (H, W, 3) -> float32 (3, H, W), zero mean and unit variance over the encoder's training images."""
    # The order and the dtypes of these operations are those of CLIP's processor: the last bits depend on them.
    scaled = (rgb * (1 / 255)).astype(np.float32)
    centred = (scaled - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return np.ascontiguousarray(centred.transpose(2, 0, 1))
