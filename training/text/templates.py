"""The templates: how a conversation becomes one text, and which of its tokens are learned.

plain   stage 1: the image and its caption, nothing else
v1      stage 2 and inference: Vicuna's, "USER: ... ASSISTANT: ...</s>"

`data.template` names one of `TEMPLATES`. A new one is a `Template` and its entry there. Settings are checked against
this file, so it imports neither torch nor a tokenizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.schema import Turn
from training.model.markers import IGNORE, IMAGE
from training.text.image import Turns, tokenize_with_image

if TYPE_CHECKING:
    from training.model.tokenizer import Tokenizer


class Template(ABC):
    """One way to write a conversation.

    Attributes:
        captions_only: whether an example is an image and its caption, and nothing else: too little to train an LLM on.
    """

    captions_only: ClassVar[bool] = False

    @abstractmethod
    def prompt(self, turns: Turns) -> str:
        """The whole conversation as one text; an empty last answer is left open, for the model to give.

        Raises:
            ValueError: if the turns do not fit the template.
        """

    @abstractmethod
    def labels(
        self, prompt: str, ids: Sequence[int], tokenizer: Tokenizer, has_image: bool, max_length: int
    ) -> list[int]:
        """A label for each of `ids`, the tokens of `prompt`: the id where it is learned, -100 elsewhere.

        Args:
            has_image: whether `<image>` in the prompt is one placeholder among the ids, rather than text.
            max_length: where a text-only example was cut.
        """


class Caption(Template):
    """Stage 1: the image and its caption; what the person said is discarded."""

    captions_only = True

    def prompt(self, turns: Turns) -> str:
        """`<image>`, the caption, the end of the line.

        Raises:
            ValueError: if these are not an image's question and its caption.
        """
        if len(turns) != 2 or IMAGE not in turns[0].value:
            raise ValueError(
                f"the plain template takes two turns, the first with {IMAGE}: found {len(turns)} turn(s), the first "
                f"{turns[0].value[:60]!r}; use data.template=v1, or caption data such as CC-595K"
            )
        return f"{IMAGE}{turns[1].value}\n"

    def labels(
        self, prompt: str, ids: Sequence[int], tokenizer: Tokenizer, has_image: bool, max_length: int
    ) -> list[int]:
        """All but BOS and the image is learned."""
        return [IGNORE, IGNORE, *ids[2:]]  # the prompt begins with the image, one placeholder


@dataclass(frozen=True)
class Vicuna(Template):
    """`<system> USER: question ASSISTANT: answer</s>USER: question ASSISTANT: answer</s>`: LLaVA's v1."""

    system: str
    user: str
    assistant: str
    end: str  # of an answer

    def prompt(self, turns: Turns) -> str:
        """The whole conversation as one text; a leading answer is dropped, an empty message leaves its role open.

        Raises:
            ValueError: if the speakers do not take turns.
        """
        if turns and turns[0].speaker != "human":
            turns = turns[1:]
        text = self.system + " "
        for number, turn in enumerate(turns):
            expected = ("human", "gpt")[number % 2]
            if turn.speaker != expected:
                raise ValueError(
                    f"speakers do not alternate: turn {number} is of {turn.speaker!r}, {expected!r} was expected; take "
                    f"the record out, or join its turns (this one begins {turn.value[:60]!r})"
                )
            role, separator = ((self.user, " "), (self.assistant, self.end))[number % 2]
            text += f"{role}: {turn.value}{separator}" if turn.value else f"{role}:"
        return text

    def labels(
        self, prompt: str, ids: Sequence[int], tokenizer: Tokenizer, has_image: bool, max_length: int
    ) -> list[int]:
        """Answers and their ends are learned; the system text, the roles and the questions are not.

        A round is a question and its answer, up to `</s>`. Its tokens are counted by tokenizing it by itself, as in
        the original, and `position` walks from round to round:

            ids     <s>  SYSTEM USER : question ASSISTANT :  answer </s>  USER : question ASSISTANT :  answer </s>
            labels   .   .      .    . .        .         .  answer </s>  .    . .        .         .  answer </s>
                         |--------- instruction ----------|               |
                         position, round 0                                position, round 1

        Where the counts do not add up to the whole, nothing of the example is learned. So does the original.
        """

        def count(text: str) -> int:
            """Tokens of `text` by itself, its BOS included."""
            return len(tokenize_with_image(text, tokenizer) if has_image else tokenizer.encode(text))

        answer_mark = f" {self.assistant}: "
        labels = [IGNORE, *ids[1:]]
        position = 1  # behind BOS
        for number, round_text in enumerate(prompt.split(self.end)):
            parts = round_text.split(answer_mark)
            if round_text == "" or len(parts) != 2:
                break
            # The round's BOS is counted and its </s>, which the split took, is not: the two cancel out.
            # Two tokens of the instruction do not count: BOS, and the space at its end. That space is a token only
            # here; in the whole text the first token of the answer holds it.
            whole, instruction = count(round_text), count(parts[0] + answer_mark) - 2
            if number > 0 and not tokenizer.legacy:  # behind </s>, this round has no space before it; by itself it has
                whole, instruction = whole - 1, instruction - 1
            _ignore(labels, position, position + instruction)
            position += whole
        _ignore(labels, position, len(labels))  # what is no whole round: a question without an answer
        # The original counts padding out, whose id <unk> has too: a text with <unk> does not add up either.
        if position < max_length and position != sum(i != tokenizer.pad_id for i in ids):
            return [IGNORE] * len(ids)
        return labels


def _ignore(labels: list[int], start: int, stop: int) -> None:
    """Set `labels[start:stop]` to -100; a cut example may end before `stop`, or before `start`."""
    for place in range(start, min(stop, len(labels))):
        labels[place] = IGNORE


TEMPLATES: dict[str, Template] = {
    "plain": Caption(),
    "v1": Vicuna(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        user="USER",
        assistant="ASSISTANT",
        end="</s>",
    ),
}
TALK = "v1"  # how a model is asked whose decoder does not say otherwise


def prompt_for(text: str, history: Sequence[tuple[str, str]] = (), template: str = TALK) -> str:
    """What a model is asked: earlier (question, answer) pairs, then `text`; its answer comes next."""
    turns: list[Turn] = []
    for question, answer in [*history, (text, "")]:
        turns += [Turn(speaker="human", value=question), Turn(speaker="gpt", value=answer)]
    return TEMPLATES[template].prompt(turns)
