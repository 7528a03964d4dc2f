"""What one can ask about a demo scene: each question has exactly one right answer, of one word.

A `Kind` is a wording (with blanks) and its possible answers. Whoever asks keeps the answers of a kind equally frequent,
so that a model that does not look can only guess: one in `len(answers)` is right by chance.
"""

from __future__ import annotations

from typing import NamedTuple

from pipeline.demo_scenes import COLORS, MARKS, MOST, PLACES, SHAPES, WORDS, Scene


class Kind(NamedTuple):
    """A wording with its category and all its answers, each asked for as often as the others."""

    category: str
    wording: str
    answers: tuple[str, ...]


class Question(NamedTuple):
    """A question about a scene with its one-word answer; `text` is the kind's wording, its blanks filled."""

    kind: Kind
    text: str
    answer: str


_YES_NO = ("yes", "no")
KINDS = {
    kind.wording: kind
    for kind in (
        Kind("color", "What color is the shape?", tuple(COLORS)),
        Kind("shape", "What shape is there?", SHAPES),
        Kind("position", "Where on the plate is the mark?", PLACES),
        Kind("count", "How many pips are there?", tuple(map(str, range(1, MOST + 1)))),
        Kind("mark", "What is on the plate?", MARKS),
        Kind("word", "What does the sign say?", WORDS),
        Kind("yes/no", "Is there a {shape}?", _YES_NO),
        Kind("yes/no", "Is there a {mark} on the plate?", _YES_NO),
        Kind("yes/no", "Are there more than four pips?", _YES_NO),
    )
}
CATEGORIES = tuple(dict.fromkeys(kind.category for kind in KINDS.values()))


def possible_questions(scene: Scene) -> list[Question]:
    """All questions about this scene, in a fixed order; each has exactly one right answer."""
    return [
        _ask("What color is the shape?", scene.color),
        _ask("What shape is there?", scene.shape),
        _ask("Where on the plate is the mark?", scene.place),
        _ask("How many pips are there?", str(scene.pips)),
        _ask("What is on the plate?", scene.mark),
        _ask("What does the sign say?", scene.word),
        *(_ask("Is there a {shape}?", _yes(shape == scene.shape), shape=shape) for shape in SHAPES),
        *(_ask("Is there a {mark} on the plate?", _yes(mark == scene.mark), mark=mark) for mark in MARKS),
        _ask("Are there more than four pips?", _yes(scene.pips > 4)),
    ]


def _ask(wording: str, answer: str, **blanks: str) -> Question:
    return Question(KINDS[wording], wording.format(**blanks), answer)


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"
