"""The scenes of the embedded demo data: what is in one, how it is told in a caption, and how it is drawn.

A board of four rows (a to d) and four columns (w to z). One to nine shapes stand on it, each in a cell, some with a
small black dot in one of their quarters; one more cell holds a sign with a word of four letters in two lines. All of
it is detail that the mean over a cell loses: in which quarter a dot is, and which of the words of the same letters.
"""

from __future__ import annotations

from collections import Counter
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
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}  # with the plural
QUARTERS = ("northwest", "northeast", "southwest", "southeast")
WORDS = (  # each beside others of the same letters
    "post", "spot", "stop",
    "east", "seat", "eats",
    "team", "meat", "mate",
    "pale", "leap", "plea",
)  # fmt: skip
SIDE = 4  # cells in a row, and rows
CELLS = tuple(row + column for row in "abcd" for column in "wxyz")  # in reading order
MOST = 9  # shapes in a scene

_SUPERSAMPLING = 4  # drawn four times larger, then averaged down: smooth edges
_DOT = (15, 15, 15)
_PLATE = (250, 250, 250)


class Thing(NamedTuple):
    """One shape of a scene: its colour, its shape, the cell it stands in, and the quarter its dot is in, if any."""

    color: str
    shape: str
    cell: str
    dot: str | None = None


class Scene(NamedTuple):
    """What there is to see: things in reading order, and a sign with a word in a cell where no thing stands."""

    things: tuple[Thing, ...]
    word: str
    sign: str


def sample_scene(rng: np.random.Generator) -> Scene:
    """Any scene; every number of things is as frequent as any other.

    Shapes and colours come from a small pool per scene, so that repetitions (counts above one) are common.
    """
    count = int(rng.integers(1, MOST + 1))
    cells = rng.permutation(len(CELLS))[: count + 1].tolist()
    shapes = _some(list(SHAPES), rng)
    colors = _some(list(COLORS), rng)
    drawn = rng.integers((len(colors), len(shapes), 2 * len(QUARTERS)), size=(count, 3)).tolist()
    things = tuple(
        Thing(colors[color], shapes[shape], CELLS[cell], QUARTERS[dot] if dot < len(QUARTERS) else None)
        for cell, (color, shape, dot) in zip(sorted(cells[1:]), drawn, strict=True)
    )
    return Scene(things, WORDS[rng.integers(len(WORDS))], CELLS[cells[0]])


def _some(names: list[str], rng: np.random.Generator) -> list[str]:
    """At least one of the names."""
    return [names[i] for i in rng.permutation(len(names))[: rng.integers(1, len(names) + 1)]]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Everything in the scene, in CC-595K's spelling (lower case, a space before the full stop).

    First how many shapes there are, and how many of each colour or of each kind; then each cell with what is in it, or
    what is somewhere with its cell, in any order.
    """
    count = len(scene.things)
    counted = [f"{count} shape{'s' if count > 1 else ''}"]
    if rng.random() < 0.5:
        counted += [f"{n} {color}" for color, n in Counter(thing.color for thing in scene.things).items()]
    else:
        shapes = Counter(thing.shape for thing in scene.things)
        counted += [f"{n} {SHAPES[shape] if n > 1 else shape}" for shape, n in shapes.items()]
    said = [(cell, f"{color} {shape}{f' dot {dot}' if dot else ''}") for color, shape, cell, dot in scene.things]
    said.append((scene.sign, f"sign {scene.word}"))
    listed = [" ".join(said[i] if rng.random() < 0.5 else said[i][::-1]) for i in rng.permutation(len(said))]
    return f"{' , '.join(counted)} : {' , '.join(listed)} ."


def render(scene: Scene, size: int, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels."""
    side = size * _SUPERSAMPLING
    ground = tuple(int(level) for level in rng.integers(95, 135) + rng.integers(-8, 9, size=3))
    picture = Image.new("RGB", (side, side), ground)
    pencil = ImageDraw.Draw(picture)
    cell = side / SIDE
    for thing in scene.things:
        x, y = _centre(thing.cell, cell, rng)
        radius = cell * rng.uniform(0.36, 0.43)
        shade = rng.integers(-12, 13, size=3).tolist()
        fill = tuple(min(max(level + more, 0), 255) for level, more in zip(COLORS[thing.color], shade, strict=True))
        _draw_shape(pencil, thing.shape, x, y, radius, fill)
        if thing.dot is not None:
            right, low = QUARTERS.index(thing.dot) % 2, QUARTERS.index(thing.dot) // 2
            dx, dy, r = (2 * right - 1) * 0.2 * cell, (2 * low - 1) * 0.2 * cell, 0.11 * cell
            pencil.ellipse((x + dx - r, y + dy - r, x + dx + r, y + dy + r), fill=_DOT)
    _draw_sign(picture, scene.word, *_centre(scene.sign, cell, rng), cell)
    return picture.reduce(_SUPERSAMPLING)


def _centre(name: str, cell: float, rng: np.random.Generator) -> tuple[float, float]:
    """About the middle of the cell of that name, moved by up to a twentieth of its side."""
    row, column = divmod(CELLS.index(name), SIDE)
    dx, dy = rng.uniform(-0.05, 0.05, size=2).tolist()
    return (column + 0.5 + dx) * cell, (row + 0.5 + dy) * cell


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
