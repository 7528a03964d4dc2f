"""The demo's language model reads before it ever sees.

Where an image will stand it is given the image's caption, condensed: each phrase (what stands between commas) becomes
one token, the mean of its words' embeddings. So the model learns, from text and within a minute, what a large language
model knows long before: to find what it is asked for among tokens that hold several facts each, as vision tokens do.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from training.toy.settings import Size
from training.toy.steps import train

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM

    from training.model.tokenizer import Tokenizer
    from training.text.labels import Labelled

TOKENS = 4  # in an image's place
MAX_LENGTH = 512  # tokens of an example
_HERE = -1  # the id of a token in an image's place


class Reading(NamedTuple):
    """A text and its labels; `phrases` has the ids of each of the TOKENS in the image's place, some of them empty."""

    text: Labelled
    phrases: list[list[int]]


def reading_matter(
    captions: Mapping[str, str], conversations: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, seed: int
) -> tuple[list[Reading], list[Reading]]:
    """Every caption after itself, and every conversation about an image that has one: stages 1 and 2, without pixels.

    Args:
        captions: of each image, by its name.
        conversations: LLaVA's records that name an image.
        seed: of the order of the phrases in the image's place, where any cell of a scene may come first.
    """
    from pipeline.schema import Turn
    from training.model.markers import IGNORE, IMAGE
    from training.text.collate import Collator

    chance = random.Random(seed)
    plain, v1 = (Collator(tokenizer, template, MAX_LENGTH, TOKENS, _HERE) for template in ("plain", "v1"))
    phrases = {image: _phrases(text, tokenizer) for image, text in captions.items()}

    def matter(collator: Collator, image: str, turns: list[Turn]) -> list[Reading]:
        try:
            text = collator.labelled(turns, has_image=True)
        except ValueError:  # nothing to learn from: the stage that the record is for says which it is, and why
            return []
        whole = text.input_ids.count(_HERE) == TOKENS and any(label != IGNORE for label in text.labels)
        return [Reading(text, chance.sample(phrases[image], TOKENS))] if whole else []

    read, talk = [], []
    for image, caption in captions.items():
        read += matter(plain, image, [Turn(speaker="human", value=IMAGE), Turn(speaker="gpt", value=caption)])
    for record in conversations:
        if record["image"] in captions:
            turns = [Turn(speaker=turn["from"], value=turn["value"]) for turn in record["conversations"]]
            talk += matter(v1, record["image"], turns)
    return read, talk


def _phrases(text: str, tokenizer: Tokenizer) -> list[list[int]]:
    """TOKENS phrases as ids: the text, cut at its commas; what is more than these hold is left out."""
    cut = [tokenizer.encode(phrase.strip())[1:] for phrase in text.rstrip(" .").split(",")]
    return [*cut, *[[]] * TOKENS][:TOKENS]


def train_llm(
    llm: LlamaForCausalLM, matter: tuple[list[Reading], list[Reading]], pad_id: int, size: Size, seed: int
) -> None:
    """Ordinary language modelling of what follows the condensed tokens: captions, then answers and some captions.

    Without the latter the captions would be forgotten, with which stage 1 shows the connector what to say.
    """
    captions, talk = matter
    both = talk + captions[: len(talk) // 4]
    for name, examples, how in (("captions", captions, size["reading"]), ("talk", both, size["talking"])):
        if examples:  # your own data may have nothing for one of the two
            train(f"llm, {name}", [llm], _loss_of(llm, examples, pad_id), len(examples), how, seed)


def _loss_of(llm: LlamaForCausalLM, examples: Sequence[Reading], pad_id: int) -> Any:
    """The mean loss of the labelled tokens of the examples with these numbers."""
    import torch

    from training.model.markers import IGNORE
    from training.text.collate import pad

    def loss(chosen: list[int]) -> Tensor:
        batch = pad([examples[i].text for i in chosen], pad_id)
        ids, labels = batch["input_ids"], batch["labels"][:, 1:]
        words = llm.get_input_embeddings()
        seen = condensed(words.weight, [phrase for i in chosen for phrase in examples[i].phrases])
        embedded = words(ids.clamp(min=0)).masked_scatter((ids == _HERE)[..., None], seen)
        hidden = llm.model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).last_hidden_state[:, :-1]
        learned = labels != IGNORE  # a few in a hundred: the head computes no others
        return torch.nn.functional.cross_entropy(llm.lm_head(hidden[learned]), labels[learned])

    return loss


def condensed(words: Tensor, phrases: Sequence[Sequence[int]]) -> Tensor:
    """The mean embedding of each of n phrases, 0 of an empty one: (vocabulary, C) -> (n, C)."""
    import torch

    ids = torch.tensor([id for phrase in phrases for id in phrase], dtype=torch.long)
    lengths = torch.tensor([len(phrase) for phrase in phrases])
    return torch.nn.functional.embedding_bag(ids, words, lengths.cumsum(0) - lengths, mode="mean")
