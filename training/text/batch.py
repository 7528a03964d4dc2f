"""Conversations to token ids and labels, id for id as LLaVA-1.5, and lists of them to tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from training.model.tokenizer import Tokenizer
from training.text.conversation import ANSWER, END, IMAGE, Turns, plain_prompt, v1_prompt, with_image_first

IGNORE = -100  # label of a token that is not predicted
PLACEHOLDER = -200  # an image before it becomes vision tokens

Template = Literal["plain", "v1"]


@dataclass(frozen=True)
class Encoded:
    """One example: ids with the vision tokens' placeholders, and their labels, equally long."""

    input_ids: list[int]
    labels: list[int]
    has_image: bool


def tokenize_with_image(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of `text` with -200 for each `<image>`; each chunk between is tokenized as a text of its own."""
    ids = [tokenizer.bos_id]
    for number, chunk in enumerate(text.split(IMAGE)):
        ids += ([PLACEHOLDER] if number else []) + tokenizer.encode(chunk)[1:]
    return ids


def tokenize(
    turns: Turns, tokenizer: Tokenizer, template: Template, has_image: bool, max_length: int
) -> tuple[list[int], list[int]]:
    """(ids, labels) of a conversation: answers and their `</s>` are supervised, everything else is -100.

    As in the original, a text-only example is cut at `max_length` here, one with an image after its placeholder has
    become vision tokens; and an example whose parts do not add up to the whole is not supervised at all.

    Raises:
        ValueError: if the turns do not fit the template.
    """
    if has_image:
        turns = with_image_first(turns)
    if template == "plain":
        ids = tokenize_with_image(plain_prompt(turns), tokenizer)
        return ids, [IGNORE, IGNORE, *ids[2:]]  # all but BOS and the image
    prompt = v1_prompt(turns)
    ids = tokenize_with_image(prompt, tokenizer) if has_image else tokenizer.encode(prompt)[:max_length]
    return ids, _v1_labels(prompt, ids, tokenizer, has_image, max_length)


def _v1_labels(prompt: str, ids: list[int], tokenizer: Tokenizer, has_image: bool, max_length: int) -> list[int]:
    """Walk the rounds of a conversation, masking the instruction of each."""

    def length(text: str) -> int:
        return len(tokenize_with_image(text, tokenizer) if has_image else tokenizer.encode(text))

    labels = ids.copy()
    labels[0] = IGNORE
    position = 1
    for number, round_text in enumerate(prompt.split(END)):
        parts = round_text.split(ANSWER)
        if round_text == "" or len(parts) != 2:
            break
        # BOS stands where the round's </s> will: the lengths agree. The instruction ends before the space that the
        # answer's first piece begins with.
        whole, instruction = length(round_text), length(parts[0] + ANSWER) - 2
        if number > 0 and not tokenizer.legacy:  # a round alone gets a space that it does not have behind </s>
            whole, instruction = whole - 1, instruction - 1
        stop = min(position + instruction, len(labels))
        labels[position:stop] = [IGNORE] * max(0, stop - position)
        position += whole
    labels[position:] = [IGNORE] * max(0, len(labels) - position)
    total = sum(i != tokenizer.pad_id for i in ids)
    if position < max_length and position != total:
        return [IGNORE] * len(ids)
    return labels


def encode(
    turns: Turns,
    tokenizer: Tokenizer,
    template: Template,
    has_image: bool,
    image_tokens: int,
    max_length: int,
    image_token_id: int,
) -> Encoded:
    """One example as the model reads it: each image's placeholder has become `image_tokens` ids `image_token_id`.

    An image is shown once: without a placeholder it goes before the first question, later ones are dropped. What is
    longer than `max_length`, vision tokens included, is cut off.

    Raises:
        ValueError: if the turns do not fit the template, or the image does not fit `max_length`.
    """
    if has_image:
        turns = _one_image(turns)
    ids, labels = tokenize(turns, tokenizer, template, has_image, max_length)
    if has_image:
        place = ids.index(PLACEHOLDER)
        if place + image_tokens >= max_length:
            raise ValueError(
                f"data.max_length {max_length} ends before or within the image: {place} tokens stand before it, and it "
                f"has {image_tokens}; raise data.max_length"
            )
        ids[place : place + 1] = [image_token_id] * image_tokens
        labels[place : place + 1] = [IGNORE] * image_tokens
    return Encoded(ids[:max_length], labels[:max_length], has_image)


def _one_image(turns: Turns) -> Turns:
    shown = [number for number, turn in enumerate(turns) if turn["from"] == "human" and IMAGE in turn["value"]]
    questions = [number for number, turn in enumerate(turns) if turn["from"] == "human"]
    if len(shown) == 1 and sum(IMAGE in turn["value"] for turn in turns) == 1:
        return turns
    first = (shown or questions or [0])[0]
    changed = []
    for number, turn in enumerate(turns):
        text = turn["value"].replace(IMAGE, "").strip()
        changed.append({"from": turn["from"], "value": f"{IMAGE}\n{text}" if number == first else text})
    return changed


def collate(encoded: list[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded int64 tensors (B, L): input_ids, labels, attention_mask.

    The mask follows the lengths: a real `<unk>`, whose id is also the padding's, stays visible.
    """
    longest = max(len(example.input_ids) for example in encoded)
    shape = (len(encoded), longest)
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "labels": torch.full(shape, IGNORE),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
    }
    for row, example in enumerate(encoded):
        length = len(example.input_ids)
        batch["input_ids"][row, :length] = torch.tensor(example.input_ids)
        batch["labels"][row, :length] = torch.tensor(example.labels)
        batch["attention_mask"][row, :length] = 1
    return batch
