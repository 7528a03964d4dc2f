"""Turns to prompts, in the two templates of LLaVA-1.5.

plain   stage 1: the image and its caption, nothing else
v1      stage 2 and inference: Vicuna's, "USER: ... ASSISTANT: ...</s>"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

IMAGE = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ROLES = {"human": "USER", "gpt": "ASSISTANT"}
ANSWER = " ASSISTANT: "  # what stands before an answer
END = "</s>"

Turns = Sequence[Mapping[str, str]]  # {"from": "human" or "gpt", "value": text}, as in LLaVA's JSON


def with_image_first(turns: Turns) -> list[dict[str, str]]:
    """Move the placeholder of a turn to its beginning, on a line of its own; several in one turn become one."""
    moved = []
    for turn in turns:
        text = turn["value"]
        if IMAGE in text:
            text = f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()
        moved.append({"from": turn["from"], "value": text})
    return moved


def v1_prompt(turns: Turns) -> str:
    """The whole conversation as one text; a leading answer is dropped, an empty message leaves its role alone.

    Raises:
        ValueError: if the speakers do not take turns.
    """
    if turns and turns[0]["from"] != "human":
        turns = turns[1:]
    text = SYSTEM + " "
    for number, turn in enumerate(turns):
        expected = ("human", "gpt")[number % 2]
        if turn["from"] != expected:
            raise ValueError(f"turn {number} is of {turn['from']!r}, {expected!r} was expected: speakers alternate")
        separator = (" ", END)[number % 2]
        role = ROLES[turn["from"]]
        text += f"{role}: {turn['value']}{separator}" if turn["value"] else f"{role}:"
    return text


def plain_prompt(turns: Turns) -> str:
    """Image and caption; what the person said is discarded.

    Raises:
        ValueError: if these are not an image's question and its caption.
    """
    if len(turns) != 2 or IMAGE not in turns[0]["value"]:
        raise ValueError(
            f"the plain template takes two turns, the first with {IMAGE}; found {len(turns)} turn(s), the first "
            f"{turns[0]['value'][:60]!r}: use data.template=v1, or caption data such as CC-595K"
        )
    return f"{IMAGE}{turns[1]['value']}\n"


def prompt_for(text: str, history: Sequence[tuple[str, str]] = ()) -> str:
    """What a model is asked: earlier (question, answer) pairs, then `text`; its answer comes next."""
    turns = [
        {"from": speaker, "value": value}
        for question, answer in history
        for speaker, value in (("human", question), ("gpt", answer))
    ]
    return v1_prompt([*turns, {"from": "human", "value": text}, {"from": "gpt", "value": ""}])
