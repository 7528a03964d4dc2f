"""Where the image stands in a conversation: the word `<image>` in its text, a placeholder among its ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.schema import Turn
from training.model.markers import IMAGE

if TYPE_CHECKING:
    from training.model.tokenizer import Tokenizer

PLACEHOLDER = -200  # among the ids: an image before it becomes vision tokens

Turns = Sequence[Turn]


def show_once(turns: Turns) -> Turns:
    """The same turns with exactly one `<image>`.

    The first question that holds the word keeps it, at its beginning. Without such a question, the first question
    gets it. Every other turn loses the word.
    """
    questions = [number for number, turn in enumerate(turns) if turn.speaker == "human"]
    shown = [number for number in questions if IMAGE in turns[number].value]
    if len(shown) == 1 and sum(IMAGE in turn.value for turn in turns) == 1:
        return turns
    first = (shown or questions or [0])[0]  # the turn that shows the image
    changed = []
    for number, turn in enumerate(turns):
        text = without_word(turn.value).strip()
        changed.append(_with_text(turn, f"{IMAGE}\n{text}" if number == first else text))
    return changed


def image_first(turns: Turns) -> Turns:
    """The same turns with the word of each at its beginning, on its own line; several in one turn become one."""
    return [
        _with_text(turn, f"{IMAGE}\n{without_word(turn.value).strip()}".strip()) if IMAGE in turn.value else turn
        for turn in turns
    ]


def without_word(text: str) -> str:
    """The text without `<image>`, also where one word stood within another: `<ima<image>ge>`."""
    text = text.replace(IMAGE, "")
    if IMAGE not in text:
        return text
    kept: list[str] = []  # a stack: a word goes as soon as its last letter comes, however many begin before it
    for letter in text:
        kept.append(letter)
        if letter == IMAGE[-1] and "".join(kept[-len(IMAGE) :]) == IMAGE:
            del kept[-len(IMAGE) :]
    return "".join(kept)


def tokenize_with_image(text: str, tokenizer: Tokenizer) -> list[int]:
    """BOS and the ids of `text`, with -200 for each `<image>`.

    The chunks between the images are tokenized one by one, as the original does: the ids of a chunk do not depend on
    what stands before the image. Each chunk's own BOS is dropped.
    """
    ids = [tokenizer.bos_id]
    for number, chunk in enumerate(text.split(IMAGE)):
        ids += ([PLACEHOLDER] if number else []) + tokenizer.encode(chunk)[1:]
    return ids


def _with_text(turn: Turn, text: str) -> Turn:
    """The same speaker with another text."""
    return Turn(speaker=turn.speaker, value=text)
