"""What one can ask about a demo scene: each question has exactly one right answer, of one word.

Whoever asks keeps the answers of a question equally frequent, so that a model that does not look can only guess: one in
`len(answers)` is right by chance.
"""

from __future__ import annotations

from typing import NamedTuple

from pipeline.demo_scenes import COLORS, MARKS, MOST, PLACES, SHAPES, WORDS, Scene


class Kind(NamedTuple):
    """A question with its category and all its answers, each asked for as often as the others."""

    category: str
    text: str
    answers: tuple[str, ...]


class Question(NamedTuple):
    """A kind of question, asked about a scene, with its answer."""

    kind: Kind
    answer: str


_YES_NO = ("yes", "no")
KINDS = {
    kind.text: kind
    for kind in (
        Kind("color", "What color is the shape?", tuple(COLORS)),
        Kind("shape", "What shape is there?", SHAPES),
        Kind("position", "Where on the plate is the mark?", PLACES),
        Kind("count", "How many pips are there?", tuple(map(str, range(1, MOST + 1)))),
        Kind("mark", "What is on the plate?", MARKS),
        Kind("word", "What does the sign say?", WORDS),
        Kind("yes/no", "Are there more than four pips?", _YES_NO),
        Kind("yes/no", "Is the shape round?", _YES_NO),
        Kind("yes/no", "Is the mark in the top row?", _YES_NO),
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
        _ask("Are there more than four pips?", _yes(scene.pips > 4)),
        _ask("Is the shape round?", _yes(scene.shape == "circle")),
        _ask("Is the mark in the top row?", _yes(scene.place in PLACES[:3])),
    ]


def _ask(text: str, answer: str) -> Question:
    return Question(KINDS[text], answer)


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"
