"""The scenes of the embedded demo data: what is in one, how it is told in a caption, and how it is drawn.

Four corners, each of 2 x 2 patches, and in each one thing: a sign with a word of four letters, a die with one to nine
pips, and two shapes, one of which has a black dot in one of its quarters. All of it is detail that the mean over a
corner loses: in which quarter the dot is, how many pips there are, and which of the words of the same letters it is.
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
QUARTERS = ("upper-left", "upper-right", "lower-left", "lower-right")  # of a shape
WORDS = ("post", "spot", "stop", "tops", "east", "seat", "eats", "teas")  # each beside others of the same letters
MOST = 9  # pips

_SUPERSAMPLING = 4  # drawn four times larger, then averaged down: smooth edges
_DOT = (15, 15, 15)
_PLATE = (250, 250, 250)
_PIPS = (255, 140, 200)
_DIE = (30, 30, 60)


class Thing(NamedTuple):
    """A shape: its colour, its shape, and the corner it is in."""

    color: str
    shape: str
    corner: str


class Scene(NamedTuple):
    """What there is to see, each in another corner; the two shapes have different shapes and colours.

    `dotted` is which of the two has the dot, in its `quarter`.
    """

    things: tuple[Thing, Thing]
    dotted: int
    quarter: str
    word: str
    sign: str
    pips: int
    die: str


def sample_scene(rng: np.random.Generator) -> Scene:
    """Any scene; all are as frequent as any other."""
    first, second, sign, die = (CORNERS[i] for i in rng.permutation(4))
    colors = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[:2]]
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:2]]
    return Scene(
        things=(Thing(colors[0], shapes[0], first), Thing(colors[1], shapes[1], second)),
        dotted=int(rng.integers(2)),
        quarter=QUARTERS[rng.integers(4)],
        word=WORDS[rng.integers(len(WORDS))],
        sign=sign,
        pips=int(rng.integers(1, MOST + 1)),
        die=die,
    )


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Every corner with what is in it, in any order, in CC-595K's spelling (lower case, a space before the full stop)."""
    said = [f"{scene.sign} sign {scene.word}", f"{scene.die} die {scene.pips}"]
    for number, (color, shape, corner) in enumerate(scene.things):
        dot = f" dot {scene.quarter}" if number == scene.dotted else ""
        said.append(f"{corner} {color} {shape}{dot}")
    return " , ".join(said[i] for i in rng.permutation(len(said))) + " ."


def render(scene: Scene, size: int, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels."""
    side = size * _SUPERSAMPLING
    ground = tuple(int(level) for level in rng.integers(95, 135) + rng.integers(-8, 9, size=3))
    picture = Image.new("RGB", (side, side), ground)
    pencil = ImageDraw.Draw(picture)
    corner = side / 2
    for number, thing in enumerate(scene.things):
        x, y = _centre(thing.corner, corner, rng)
        radius = corner * rng.uniform(0.34, 0.42)
        shade = rng.integers(-12, 13, size=3).tolist()
        fill = tuple(min(max(level + more, 0), 255) for level, more in zip(COLORS[thing.color], shade, strict=True))
        _draw_shape(pencil, thing.shape, x, y, radius, fill)
        if number == scene.dotted:
            low, right = divmod(QUARTERS.index(scene.quarter), 2)
            dx, dy, r = (2 * right - 1) * 0.2 * corner, (2 * low - 1) * 0.2 * corner, 0.1 * corner
            pencil.ellipse((x + dx - r, y + dy - r, x + dx + r, y + dy + r), fill=_DOT)
    _draw_die(pencil, scene.pips, *_centre(scene.die, corner, rng), corner, rng)
    _draw_sign(picture, scene.word, *_centre(scene.sign, corner, rng), corner)
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
        picture.paste(_DOT, corner, mask)


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
