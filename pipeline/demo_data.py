"""Draw the embedded demo data: scenes of a few things, written in LLaVA's own formats.

    python pipeline/demo_data.py data/demo --images 2000 --heldout 200 --seed 0

`demo_scenes.py` says what a scene holds, `demo_questions.py` what is asked about it. The folder gets

    images/<name>.jpg   training scenes, numbered like COCO's, and held-out scenes named heldout_<number>.jpg
    chat.json           stage 1: one caption per training image, as CC-595K's chat.json: `<image>` first or last
    instruct.json       stage 2: many turns each, up to two conversations per image, as LLaVA-Instruct-158K
    heldout.jsonl       one question per line, each on a new scene, none of which is a training scene drawn again

Every question needs the picture: for each kind of question the answers are kept equally frequent, so that a model that
does not look can only guess. The same arguments give the same bytes.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

import argparse
import json
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from pipeline.demo_questions import CATEGORIES, KINDS, Kind, Question, possible_questions
from pipeline.demo_scenes import Scene, caption, render, sample_scene

_BRIEFS = (  # the human side of a caption, in the manner of CC-595K; stage 1 discards it
    "Provide a brief description of the given image.",
    "Describe the image concisely.",
    "Give a short and clear explanation of the image.",
    "Summarize the visual content of the image.",
)
_TURNS = (8, 12)  # questions in a conversation: at least, and below


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
    rng = np.random.default_rng([seed, 0])
    scenes = [sample_scene(rng) for _ in range(images)]
    chat, instruct = _training_set(folder, scenes, image_size, rng)
    questions = _heldout_set(folder, heldout, image_size, set(scenes), np.random.default_rng([seed, 1]))
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
    folder: Path, scenes: list[Scene], size: int, rng: np.random.Generator
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Draw the training scenes; the records of chat.json and of instruct.json."""
    chat: list[dict[str, object]] = []
    instruct: list[dict[str, object]] = []
    asked: Counter[tuple[Kind, str]] = Counter()
    for number, scene in enumerate(scenes):
        key = f"{number:012d}"
        render(scene, size, rng).save(folder / "images" / f"{key}.jpg", quality=95, subsampling=0)
        brief = _BRIEFS[rng.integers(len(_BRIEFS))]
        human = f"<image>\n{brief}" if rng.random() < 0.5 else f"{brief}\n<image>"
        chat.append(
            {
                "id": key,
                "image": f"{key}.jpg",
                "conversations": [_turn("human", human), _turn("gpt", caption(scene, rng))],
            }
        )
        for _ in range(int(rng.integers(1, 3))):
            turns: list[dict[str, str]] = []
            for question in _conversation(scene, asked, rng):
                prefix = "" if turns else "<image>\n"
                turns += [_turn("human", prefix + question.kind.text), _turn("gpt", question.answer)]
            instruct.append({"id": key, "image": f"{key}.jpg", "conversations": turns})
    order = rng.permutation(len(instruct))  # conversations that share an image do not lie side by side
    return chat, [instruct[i] for i in order]


def _heldout_set(
    folder: Path, count: int, size: int, known: Container[Scene], rng: np.random.Generator
) -> list[dict[str, object]]:
    """Draw a scene not `known` for each held-out question; the records of heldout.jsonl.

    Categories follow each other in turn, in each its kinds, and for each kind its answers.
    """
    turns = {category: [kind for kind in KINDS.values() if kind.category == category] for category in CATEGORIES}
    questions: list[dict[str, object]] = []
    for number in range(count):
        round_, place = divmod(number, len(CATEGORIES))
        kinds = turns[CATEGORIES[place]]
        kind = kinds[round_ % len(kinds)]
        answer = kind.answers[round_ // len(kinds) % len(kind.answers)]
        candidates: list[Question] = []
        while not candidates:
            scene = sample_scene(rng)
            if scene not in known:
                candidates = [q for q in possible_questions(scene) if q.kind == kind and q.answer == answer]
        question = candidates[rng.integers(len(candidates))]
        image = f"heldout_{number:06d}.jpg"
        render(scene, size, rng).save(folder / "images" / image, quality=95, subsampling=0)
        questions.append(
            {
                "question_id": number,
                "image": image,
                "text": question.kind.text,
                "answer": question.answer,
                "category": question.kind.category,
            }
        )
    return questions


def _turn(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


def _conversation(scene: Scene, asked: Counter[tuple[Kind, str]], rng: np.random.Generator) -> list[Question]:
    """Questions that go round the categories, those first whose answers were asked for least; none twice."""
    pool = possible_questions(scene)
    categories = [CATEGORIES[i] for i in rng.permutation(len(CATEGORIES))]
    chosen: list[Question] = []
    for turn in range(int(rng.integers(*_TURNS))):
        category = categories[turn % len(categories)]
        candidates = [q for q in pool if q.kind.category == category and q not in chosen]
        if candidates:
            least = min(asked[q.kind, q.answer] for q in candidates)
            rare = [q for q in candidates if asked[q.kind, q.answer] == least]
            question = rare[rng.integers(len(rare))]
            asked[question.kind, question.answer] += 1
            chosen.append(question)
    return chosen


def main() -> None:
    """Parse the command line, draw, and say what was written."""
    parser = argparse.ArgumentParser(description="Draw the demo's scenes as LLaVA-format data.")
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
