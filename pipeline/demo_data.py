"""Draw the embedded demo data: scenes of coloured shapes, written in LLaVA's own formats.

    python pipeline/demo_data.py data/demo --images 2000 --heldout 200 --seed 0

A scene holds one to three shapes, each in another corner, jittered in place and size over a grey ground. The
folder gets

    images/<name>.jpg   training scenes, numbered like COCO's, and held-out scenes named heldout_<number>.jpg
    chat.json           stage 1: one caption per training image, as CC-595K's chat.json: `<image>` first or last
    instruct.json       stage 2: several turns each, several conversations per image, as LLaVA-Instruct-158K
    heldout.jsonl       one question per line, each on a new scene that neither of the above has

Every question needs the picture: for each wording the answers are kept equally frequent, so that a model that does not
look can only guess. The same arguments give the same bytes.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 215, 50),
    "purple": (160, 60, 190),
    "white": (245, 245, 245),
}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}  # with the plural
CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")
CATEGORIES = ("color", "shape", "position", "count", "yes/no")

_BRIEFS = (  # the human side of a caption, in the manner of CC-595K; stage 1 discards it
    "Provide a brief description of the given image.",
    "Describe the image concisely.",
    "Give a short and clear explanation of the image.",
    "Summarize the visual content of the image.",
)
_SUPERSAMPLING = 4  # drawn four times larger, then averaged down: smooth edges


class Thing(NamedTuple):
    """One shape of a scene; `corner` is its place in words."""

    color: str
    shape: str
    corner: str


class Question(NamedTuple):
    """A question about a scene with its one-word answer; `category` is one of CATEGORIES."""

    category: str
    text: str
    answer: str


@dataclass(frozen=True)
class DemoData:
    """What `draw` wrote: the folder's files and how many there are of each."""

    images: Path
    chat: Path
    instruct: Path
    heldout: Path
    training_images: int
    conversations: int
    questions: int


def draw(folder: str | Path, images: int, heldout: int, seed: int = 0, image_size: int = 64) -> DemoData:
    """Write `images` training scenes with their texts and `heldout` questions, each on another new scene.

    `image_size` is the side of the square pictures in pixels. Raises ValueError when `images` is below 1, `heldout` is
    negative or `image_size` is below 32 (the shapes would no longer be told apart).
    """
    if images < 1 or heldout < 0:
        raise ValueError(f"images={images}, heldout={heldout}: need at least 1 image and no negative number")
    if image_size < 32:
        raise ValueError(f"image_size={image_size}: below 32 pixels the shapes cannot be told apart; use 32 or more")
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    chat, instruct = _training_set(folder, images, image_size, np.random.default_rng([seed, 0]))
    questions = _heldout_set(folder, heldout, image_size, np.random.default_rng([seed, 1]))
    result = DemoData(
        folder / "images",
        folder / "chat.json",
        folder / "instruct.json",
        folder / "heldout.jsonl",
        images,
        len(instruct),
        heldout,
    )
    result.chat.write_text(json.dumps(chat, indent=1) + "\n", encoding="utf-8")
    result.instruct.write_text(json.dumps(instruct, indent=1) + "\n", encoding="utf-8")
    result.heldout.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    return result


def _training_set(
    folder: Path, images: int, size: int, rng: np.random.Generator
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Draw the training scenes; the records of chat.json and of instruct.json."""
    chat: list[dict[str, object]] = []
    instruct: list[dict[str, object]] = []
    asked: Counter[tuple[str, str]] = Counter()
    for number in range(images):
        things = sample_scene(rng)
        key = f"{number:012d}"
        render(things, size, rng).save(folder / "images" / f"{key}.jpg", quality=95, subsampling=0)
        brief = _BRIEFS[rng.integers(len(_BRIEFS))]
        human = f"<image>\n{brief}" if rng.random() < 0.5 else f"{brief}\n<image>"
        chat.append(
            {"id": key, "image": f"{key}.jpg", "conversations": [_turn("human", human), _turn("gpt", caption(things))]}
        )
        for _ in range(int(rng.integers(1, 4))):  # two conversations per image in the mean, as LLaVA-Instruct-158K
            turns: list[dict[str, str]] = []
            for question in _conversation(things, asked, rng):
                prefix = "" if turns else "<image>\n"
                turns += [_turn("human", prefix + question.text), _turn("gpt", question.answer)]
            instruct.append({"id": key, "image": f"{key}.jpg", "conversations": turns})
    order = rng.permutation(len(instruct))  # conversations that share an image do not lie side by side
    return chat, [instruct[i] for i in order]


def _heldout_set(folder: Path, count: int, size: int, rng: np.random.Generator) -> list[dict[str, object]]:
    """Draw a new scene for each held-out question; the records of heldout.jsonl, category after category in turn."""
    asked: Counter[tuple[str, str]] = Counter()
    questions: list[dict[str, object]] = []
    for number in range(count):
        candidates: list[Question] = []
        while not candidates:  # a few scenes (four equal things) have no position to ask for
            things = sample_scene(rng)
            category = CATEGORIES[number % len(CATEGORIES)]
            candidates = [question for question in possible_questions(things) if question.category == category]
        question = _rarest(candidates, asked, rng)
        image = f"heldout_{number:06d}.jpg"
        render(things, size, rng).save(folder / "images" / image, quality=95, subsampling=0)
        questions.append(
            {
                "question_id": number,
                "image": image,
                "text": question.text,
                "answer": question.answer,
                "category": question.category,
            }
        )
    return questions


def _turn(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


def _conversation(things: list[Thing], asked: Counter[tuple[str, str]], rng: np.random.Generator) -> list[Question]:
    """Four to six questions that go round the categories; no wording twice."""
    pool = possible_questions(things)
    categories = [CATEGORIES[i] for i in rng.permutation(len(CATEGORIES))]
    chosen: list[Question] = []
    for turn in range(int(rng.integers(4, 7))):
        texts = {question.text for question in chosen}
        category = categories[turn % len(categories)]
        candidates = [q for q in pool if q.category == category and q.text not in texts]
        if candidates:
            chosen.append(_rarest(candidates, asked, rng))
    return chosen


def _rarest(candidates: list[Question], asked: Counter[tuple[str, str]], rng: np.random.Generator) -> Question:
    """The candidate whose (wording, answer) was asked least so far: so a wording's answers stay equally frequent."""
    least = min(asked[(q.text, q.answer)] for q in candidates)
    rare = [q for q in candidates if asked[(q.text, q.answer)] == least]
    question = rare[rng.integers(len(rare))]
    asked[(question.text, question.answer)] += 1
    return question


def sample_scene(rng: np.random.Generator) -> list[Thing]:
    """One to three things in reading order, each in another corner.

    Shapes and colours come from a small pool per scene, so that repetitions (counts above one) are common.
    """
    count = int(rng.integers(1, 4))
    corners = sorted(rng.permutation(len(CORNERS))[:count])
    shapes = rng.permutation(list(SHAPES))[: rng.integers(1, len(SHAPES) + 1)]
    colors = rng.permutation(list(COLORS))[: rng.integers(1, len(COLORS) + 1)]
    return [Thing(str(rng.choice(colors)), str(rng.choice(shapes)), CORNERS[corner]) for corner in corners]


def caption(things: list[Thing]) -> str:
    """Every thing of the scene in reading order, in CC-595K's spelling (lower case, a space before the full stop)."""
    return " , ".join(f"a {thing.color} {thing.shape} at the {thing.corner}" for thing in things) + " ."


def possible_questions(things: list[Thing]) -> list[Question]:
    """All questions that have exactly one right answer for this scene, in a fixed order."""
    shapes = Counter(thing.shape for thing in things)
    colors = Counter(thing.color for thing in things)
    pairs = Counter((thing.color, thing.shape) for thing in things)
    questions = [Question("count", "How many shapes are there?", str(len(things)))]
    questions += [
        Question("count", f"How many {SHAPES[shape]} are there?", str(n)) for shape, n in sorted(shapes.items())
    ]
    questions += [
        Question("count", f"How many {color} shapes are there?", str(n)) for color, n in sorted(colors.items())
    ]
    for color, shape, corner in things:
        questions.append(Question("color", f"What color is the {corner} shape?", color))
        questions.append(Question("shape", f"What shape is at the {corner}?", shape))
        if shapes[shape] == 1:
            questions.append(Question("color", f"What color is the {shape}?", color))
            questions.append(Question("position", f"Where is the {shape}?", corner))
        if colors[color] == 1:
            questions.append(Question("shape", f"What shape is {color}?", shape))
            questions.append(Question("position", f"Where is the {color} shape?", corner))
        if pairs[color, shape] == 1:
            questions.append(Question("position", f"Where is the {color} {shape}?", corner))
    for color, shape in product(COLORS, SHAPES):
        if color in colors or shape in shapes:  # a "no" is a near miss: half of the pair is in the picture
            answer = "yes" if (color, shape) in pairs else "no"
            questions.append(Question("yes/no", f"Is there a {color} {shape}?", answer))
    return questions


def render(things: list[Thing], size: int, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels."""
    side = size * _SUPERSAMPLING
    ground = tuple(int(level) for level in rng.integers(60, 100) + rng.integers(-8, 9, size=3))
    picture = Image.new("RGB", (side, side), ground)
    pencil = ImageDraw.Draw(picture)
    for color, shape, corner in things:
        radius = side * rng.uniform(0.13, 0.19)
        # The centre lies at a quarter or at three quarters of the side, moved by up to a twentieth.
        column, row = CORNERS.index(corner) % 2, CORNERS.index(corner) // 2
        x, y = (side * (0.25 + 0.5 * place + rng.uniform(-0.05, 0.05)) for place in (column, row))
        shade = rng.integers(-12, 13, size=3)
        fill = tuple(int(level) for level in np.clip(np.array(COLORS[color]) + shade, 0, 255))
        _draw_shape(pencil, shape, x, y, radius, fill)
    return picture.reduce(_SUPERSAMPLING)


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
        arm = 0.32 * r
        pencil.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        pencil.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


def main() -> None:
    """Parse the command line, draw, and say what was written."""
    parser = argparse.ArgumentParser(description="Draw scenes of coloured shapes as LLaVA-format data.")
    parser.add_argument("folder", type=Path, help="where to write images/, chat.json, instruct.json and heldout.jsonl")
    parser.add_argument("--images", type=int, default=2000, help="training images (default %(default)s)")
    parser.add_argument(
        "--heldout", type=int, default=200, help="held-out questions, one image each (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default %(default)s)")
    parser.add_argument(
        "--image-size", type=int, default=64, help="side of the pictures in pixels (default %(default)s)"
    )
    args = parser.parse_args()
    try:
        data = draw(args.folder, args.images, args.heldout, args.seed, args.image_size)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"{data.training_images} images, {data.conversations} conversations, {data.questions} held-out questions "
        f"in {args.folder}"
    )


if __name__ == "__main__":
    main()
