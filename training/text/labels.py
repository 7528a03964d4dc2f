"""Conversations to token ids and labels, id for id as LLaVA-1.5."""

from __future__ import annotations

from typing import NamedTuple

from training.model.markers import IGNORE
from training.model.tokenizer import Tokenizer
from training.text.image import PLACEHOLDER, Turns, image_first, tokenize_with_image
from training.text.templates import Template


class Labelled(NamedTuple):
    """Token ids, and a label for each: the id itself where it is learned, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def ids_and_labels(
    turns: Turns, tokenizer: Tokenizer, template: Template, has_image: bool, max_length: int
) -> Labelled:
    """A conversation's ids and labels; an image is still one placeholder, -200.

    As in the original, a text-only example is cut at `max_length` here, one with an image only when its placeholder
    has become vision tokens.

    Raises:
        ValueError: if the turns do not fit the template.
    """
    if has_image:
        turns = image_first(turns)
    prompt = template.prompt(turns)
    if has_image or template.captions_only:
        ids = tokenize_with_image(prompt, tokenizer)
    else:
        ids = tokenizer.encode(prompt)[:max_length]
    return Labelled(ids, template.labels(prompt, ids, tokenizer, has_image, max_length))


def with_vision_tokens(example: Labelled, image_tokens: int, image_token_id: int, max_length: int) -> Labelled:
    """The placeholder becomes `image_tokens` ids `image_token_id`, which are not learned; then all is cut.

    An image that `max_length` cuts is left out whole. LLaVA-1.5 keeps its first vision tokens, but they would be the
    last of the example: no token after them learns from them, and those before do not see them.

    Raises:
        ValueError: if the image lies beyond `max_length`.
    """
    ids, labels = example
    place = ids.index(PLACEHOLDER)
    if place >= max_length:
        raise ValueError(
            f"its image lies beyond data.max_length {max_length}: {place} tokens stand before it; raise "
            "data.max_length, or shorten the text before the image"
        )
    if place + image_tokens >= max_length:
        return Labelled(ids[:place], labels[:place])
    return Labelled(
        (ids[:place] + [image_token_id] * image_tokens + ids[place + 1 :])[:max_length],
        (labels[:place] + [IGNORE] * image_tokens + labels[place + 1 :])[:max_length],
    )
