"""The scenes of the embedded demo data: what is in one, how it is told in a caption, and how it is drawn.

Four corners, each of 2 x 2 patches, and in each one thing: a sign with a word of four letters, a die with one to nine
pips, a coloured shape, and a plate with a small mark on one of nine places. Nearly all of it is detail that the mean
over a corner loses: which of the words of the same letters it is, how many pips there are, what the mark is and where.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 215, 50),
    "purple": (160, 60, 190),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
CORNERS = ("northwest", "northeast", "southwest", "southeast")  # of a scene, in reading order
MARKS = ("ring", "dot", "bar", "stick")
PLACES = (  # of a plate, in reading order
    "top-left", "top", "top-right",
    "left", "middle", "right",
    "bottom-left", "bottom", "bottom-right",
)  # fmt: skip
WORDS = ("post", "spot", "stop", "tops", "east", "seat", "eats", "teas")  # each beside others of the same letters
MOST = 9  # pips

_SUPERSAMPLING = 4  # drawn four times larger, then averaged down: smooth edges
_INK = (15, 15, 15)
_PLATE = (250, 250, 250)
_PIPS = (255, 140, 200)
_DIE = (30, 30, 60)
_TILE = (200, 185, 150)


class Scene(NamedTuple):
    """What there is to see: what each thing shows, and the corners of sign, die, shape and plate, in this order."""

    word: str
    pips: int
    color: str
    shape: str
    mark: str
    place: str
    corners: tuple[str, ...]


def sample_scene(rng: np.random.Generator) -> Scene:
    """Any scene; all are as frequent as any other."""
    return Scene(
        word=WORDS[rng.integers(len(WORDS))],
        pips=int(rng.integers(1, MOST + 1)),
        color=list(COLORS)[rng.integers(len(COLORS))],
        shape=SHAPES[rng.integers(len(SHAPES))],
        mark=MARKS[rng.integers(len(MARKS))],
        place=PLACES[rng.integers(len(PLACES))],
        corners=tuple(CORNERS[i] for i in rng.permutation(len(CORNERS))),
    )


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Everything with its corner, in any order, in CC-595K's spelling (lower case, a space before the full stop).

    The corner stands before the thing or behind it: what is where, and where is what.
    """
    things = (
        f"sign {scene.word}",
        f"die {scene.pips}",
        f"{scene.color} {scene.shape}",
        f"{scene.mark} {scene.place}",
    )
    said = [
        f"{corner} {thing}" if rng.random() < 0.5 else f"{thing} {corner}"
        for thing, corner in zip(things, scene.corners, strict=True)
    ]
    return " , ".join(said[i] for i in rng.permutation(len(said))) + " ."


def render(scene: Scene, size: int, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels."""
    side = size * _SUPERSAMPLING
    ground = tuple(int(level) for level in rng.integers(95, 135) + rng.integers(-8, 9, size=3))
    picture = Image.new("RGB", (side, side), ground)
    pencil = ImageDraw.Draw(picture)
    corner = side / 2
    sign, die, shape, plate = (_centre(name, corner, rng) for name in scene.corners)
    shade = rng.integers(-12, 13, size=3).tolist()
    fill = tuple(min(max(level + more, 0), 255) for level, more in zip(COLORS[scene.color], shade, strict=True))
    _draw_shape(pencil, scene.shape, *shape, corner * rng.uniform(0.34, 0.42), fill)
    _draw_die(pencil, scene.pips, *die, corner, rng)
    _draw_plate(pencil, scene.mark, scene.place, *plate, corner)
    _draw_sign(picture, scene.word, *sign, corner)
    return picture.reduce(_SUPERSAMPLING)


def _centre(name: str, corner: float, rng: np.random.Generator) -> tuple[float, float]:
    """About the middle of the corner of that name, moved by up to a twentieth of its side."""
    row, column = divmod(CORNERS.index(name), 2)
    dx, dy = rng.uniform(-0.05, 0.05, size=2).tolist()
    return (column + 0.5 + dx) * corner, (row + 0.5 + dy) * corner


def _draw_die(
    pencil: ImageDraw.ImageDraw, pips: int, x: float, y: float, corner: float, rng: np.random.Generator
) -> None:
    """A dark face around `x`, `y` with so many pips on any of the nine places of a 3 x 3 grid."""
    half, r = 0.44 * corner, 0.085 * corner
    pencil.rectangle((x - half, y - half, x + half, y + half), fill=_DIE)
    for place in rng.permutation(9)[:pips].tolist():
        row, column = divmod(place, 3)
        at_x, at_y = x + (column - 1) * 0.28 * corner, y + (row - 1) * 0.28 * corner
        pencil.ellipse((at_x - r, at_y - r, at_x + r, at_y + r), fill=_PIPS)


def _draw_plate(pencil: ImageDraw.ImageDraw, mark: str, place: str, x: float, y: float, corner: float) -> None:
    """A light plate around `x`, `y` with a black mark on one of its places."""
    row, column = divmod(PLACES.index(place), 3)
    half, r = 0.44 * corner, 0.13 * corner
    pencil.rectangle((x - half, y - half, x + half, y + half), fill=_TILE)
    x, y = x + (column - 1) * 0.28 * corner, y + (row - 1) * 0.28 * corner
    if mark == "ring":
        pencil.ellipse((x - r, y - r, x + r, y + r), outline=_INK, width=round(r / 3))
    elif mark == "dot":
        pencil.ellipse((x - r, y - r, x + r, y + r), fill=_INK)
    elif mark == "bar":
        pencil.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=_INK)
    else:  # stick
        pencil.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=_INK)


def _draw_shape(
    pencil: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, ...]
) -> None:
    """Draw one shape. `x`, `y` (its centre) and `radius` are pixels of the supersampled picture."""
    r = radius
    if shape == "circle":
        pencil.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        pencil.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=fill)
    elif shape == "triangle":
        pencil.polygon(((x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)), fill=fill)
    else:  # cross
        arm = 0.36 * r
        pencil.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        pencil.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


def _draw_sign(picture: Image.Image, word: str, x: float, y: float, cell: float) -> None:
    """A white plate around `x`, `y` with the word's letters in two lines of two, each letter in its quarter."""
    half = round(0.48 * cell)
    left, top = round(x) - half, round(y) - half
    picture.paste(_PLATE, (left, top, left + 2 * half, top + 2 * half))
    for place, letter in enumerate(word.upper()):
        mask = _LETTERS[letter].resize((round(0.78 * half), round(0.88 * half)), Image.Resampling.NEAREST)
        corner = (left + round((place % 2 + 0.11) * half), top + round((place // 2 + 0.06) * half))
        picture.paste(_INK, corner, mask)


def _letters() -> dict[str, Image.Image]:
    """Each letter of WORDS as Pillow's own bitmap font has it, which is the same on every machine, without margins."""
    font = ImageFont.load_default_imagefont()
    masks = {}
    for letter in sorted(set("".join(WORDS).upper())):
        mask = Image.new("1", (12, 16))
        ImageDraw.Draw(mask).text((2, 2), letter, fill=1, font=font)
        masks[letter] = mask.crop(mask.getbbox())
    return masks


_LETTERS = _letters()
