"""What one can ask about a demo scene: each question has exactly one right answer, of one word.

A `Kind` is a wording (with blanks) and its possible answers. Whoever asks keeps the answers of a kind equally frequent,
so that a model that does not look can only guess: one in `len(answers)` is right by chance.
"""

from __future__ import annotations

from typing import NamedTuple

from pipeline.demo_scenes import COLORS, CORNERS, MOST, QUARTERS, SHAPES, WORDS, Scene


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
        Kind("color", "What color is the {shape}?", tuple(COLORS)),
        Kind("color", "What color is the {corner} shape?", tuple(COLORS)),
        Kind("shape", "What shape is {color}?", SHAPES),
        Kind("shape", "What shape is at the {corner}?", SHAPES),
        Kind("position", "Where is the {shape}?", CORNERS),
        Kind("position", "Where is the sign?", CORNERS),
        Kind("position", "Where is the die?", CORNERS),
        Kind("count", "How many pips are there?", tuple(map(str, range(1, MOST + 1)))),
        Kind("mark", "Where on its shape is the dot?", QUARTERS),
        Kind("mark", "Which shape has the dot?", SHAPES),
        Kind("word", "What does the sign say?", WORDS),
        Kind("yes/no", "Is there a {shape}?", _YES_NO),
        Kind("yes/no", "Is there a {color} shape?", _YES_NO),
        Kind("yes/no", "Is the dot on the {shape}?", _YES_NO),
    )
}
CATEGORIES = tuple(dict.fromkeys(kind.category for kind in KINDS.values()))


def possible_questions(scene: Scene) -> list[Question]:
    """All questions that have exactly one right answer for this scene, in a fixed order."""
    dotted = scene.things[scene.dotted]
    questions = [
        _ask("How many pips are there?", str(scene.pips)),
        _ask("Where is the sign?", scene.sign),
        _ask("Where is the die?", scene.die),
        _ask("What does the sign say?", scene.word),
        _ask("Where on its shape is the dot?", scene.quarter),
        _ask("Which shape has the dot?", dotted.shape),
    ]
    shapes, colors = {thing.shape for thing in scene.things}, {thing.color for thing in scene.things}
    questions += [_ask("Is there a {shape}?", _yes(shape in shapes), shape=shape) for shape in SHAPES]
    questions += [_ask("Is there a {color} shape?", _yes(color in colors), color=color) for color in COLORS]
    for color, shape, corner in scene.things:
        questions += [
            _ask("What color is the {shape}?", color, shape=shape),
            _ask("What color is the {corner} shape?", color, corner=corner),
            _ask("What shape is {color}?", shape, color=color),
            _ask("What shape is at the {corner}?", shape, corner=corner),
            _ask("Where is the {shape}?", corner, shape=shape),
            _ask("Is the dot on the {shape}?", _yes(shape == dotted.shape), shape=shape),
        ]
    return questions


def _ask(wording: str, answer: str, **blanks: str) -> Question:
    return Question(KINDS[wording], wording.format(**blanks), answer)


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"
