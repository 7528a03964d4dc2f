"""What one can ask about a demo scene: each question has exactly one right answer, of one word.

A `Kind` is a wording (with blanks) and its possible answers. Whoever asks keeps the answers of a kind equally frequent,
so that a model that does not look can only guess: one in `len(answers)` is right by chance.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from pipeline.demo_scenes import CELLS, COLORS, MOST, QUARTERS, SHAPES, WORDS, Scene, Thing


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


_FEW = tuple(map(str, range(1, 6)))  # how many of a colour or shape are asked for: more are rare
_YES_NO = ("yes", "no")
KINDS = {
    kind.wording: kind
    for kind in (
        Kind("color", "What color is {cell}?", tuple(COLORS)),
        Kind("color", "What color is the {shape}?", tuple(COLORS)),
        Kind("shape", "What shape is {cell}?", tuple(SHAPES)),
        Kind("shape", "What shape is {color}?", tuple(SHAPES)),
        Kind("position", "Where is the {shape}?", CELLS),
        Kind("position", "Where is the sign?", CELLS),
        Kind("count", "How many shapes are there?", tuple(map(str, range(1, MOST + 1)))),
        Kind("count", "How many shapes are {color}?", _FEW),
        Kind("count", "How many {shapes} are there?", _FEW),
        Kind("mark", "Where is the dot in {cell}?", QUARTERS),
        Kind("mark", "Where is the dot on the {shape}?", QUARTERS),
        Kind("word", "What does the sign say?", WORDS),
        Kind("yes/no", "Is there a {shape}?", _YES_NO),
        Kind("yes/no", "Is there a {color} shape?", _YES_NO),
        Kind("yes/no", "Is there a dot in {cell}?", _YES_NO),
    )
}
CATEGORIES = tuple(dict.fromkeys(kind.category for kind in KINDS.values()))


def possible_questions(scene: Scene) -> list[Question]:
    """All questions that have exactly one right answer for this scene, in a fixed order."""
    questions = [
        _ask("How many shapes are there?", str(len(scene.things))),
        _ask("Where is the sign?", scene.sign),
        _ask("What does the sign say?", scene.word),
    ]
    questions += [_ask("Is there a {shape}?", _yes(any(t.shape == s for t in scene.things)), shape=s) for s in SHAPES]
    questions += [
        _ask("Is there a {color} shape?", _yes(any(t.color == c for t in scene.things)), color=c) for c in COLORS
    ]
    return questions + _of_groups(scene) + [question for thing in scene.things for question in _of_one(thing, scene)]


def _of_groups(scene: Scene) -> list[Question]:
    """Of the things that share a colour, a shape or both."""
    shapes = Counter(thing.shape for thing in scene.things)
    colors = Counter(thing.color for thing in scene.things)
    pairs = {(thing.color, thing.shape) for thing in scene.things}
    questions = [_ask("How many shapes are {color}?", str(n), color=color) for color, n in sorted(colors.items())]
    questions += [
        _ask("How many {shapes} are there?", str(n), shapes=SHAPES[shape]) for shape, n in sorted(shapes.items())
    ]
    for shape in sorted(shapes):
        of_it = {color for color, other in pairs if other == shape}
        if len(of_it) == 1:
            questions.append(_ask("What color is the {shape}?", *of_it, shape=shape))
    for color in sorted(colors):
        of_it = {shape for other, shape in pairs if other == color}
        if len(of_it) == 1:
            questions.append(_ask("What shape is {color}?", *of_it, color=color))
    return [question for question in questions if question.answer in question.kind.answers]


def _of_one(thing: Thing, scene: Scene) -> list[Question]:
    """Of one thing, found by its cell or, where no other has its shape, by that."""
    color, shape, cell, dot = thing
    alone = sum(other.shape == shape for other in scene.things) == 1
    questions = [
        _ask("What color is {cell}?", color, cell=cell),
        _ask("What shape is {cell}?", shape, cell=cell),
        _ask("Is there a dot in {cell}?", _yes(dot is not None), cell=cell),
    ]
    if alone:
        questions.append(_ask("Where is the {shape}?", cell, shape=shape))
    if dot is not None:
        questions.append(_ask("Where is the dot in {cell}?", dot, cell=cell))
        if alone:
            questions.append(_ask("Where is the dot on the {shape}?", dot, shape=shape))
    return questions


def _ask(wording: str, answer: str, **blanks: str) -> Question:
    return Question(KINDS[wording], wording.format(**blanks), answer)


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"
