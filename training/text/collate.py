"""Examples of the store to the text tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.schema import Conversation
from training.model.markers import IGNORE
from training.model.tokenizer import Tokenizer
from training.text.image import PLACEHOLDER, Turns, show_once
from training.text.labels import Labelled, ids_and_labels, with_vision_tokens
from training.text.templates import TEMPLATES


@dataclass(frozen=True)
class Example:
    """One conversation of the store: what the text side of a batch is made from."""

    key: str  # <sample key>#<number of the conversation>
    conversation: Conversation
    has_image: bool
    image: str | None = None  # its name, for messages
    store: int = 0  # its number among the stores that are read


@dataclass(frozen=True)
class Skip:
    """An example that teaches nothing: which one, and why. What stands before the reason's `:` is its kind."""

    key: str
    image: str | None
    id: str  # of the record that the conversation comes from
    reason: str


@dataclass(frozen=True)
class Collator:
    """Turns B examples into the text side of a batch.

    Attributes:
        template: a name of `TEMPLATES`.
        max_length: most tokens of an example, vision tokens included; what is longer is cut off.
        image_tokens: how many ids `image_token_id` an image becomes.
        by_store: of several stores the template of each, instead.
    """

    tokenizer: Tokenizer
    template: str
    max_length: int
    image_tokens: int
    image_token_id: int
    by_store: tuple[str, ...] = ()

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """B examples -> `input_ids`, `labels`, `attention_mask` (B, L); `shows_image` (B,), bool; `skipped`, B long.

        An example that teaches nothing keeps its row: BOS, which is not learned, and no image. Its place in `skipped`
        says why; that of the others is None.
        """
        rows: list[Labelled] = []
        skipped: list[Skip | None] = []
        for example in examples:
            try:
                rows.append(self._learned(example))
                skipped.append(None)
            except ValueError as error:
                rows.append(Labelled([self.tokenizer.bos_id], [IGNORE]))
                skipped.append(Skip(example.key, example.image, example.conversation.id, str(error)))
        shows_image = [self.image_token_id in row.input_ids for row in rows]
        batch = pad(rows, self.tokenizer.pad_id)
        return {**batch, "shows_image": torch.tensor(shows_image), "skipped": skipped}

    def _learned(self, example: Example) -> Labelled:
        """The row of an example; ValueError with the reason if there is nothing to learn from it."""
        template = self.by_store[example.store] if self.by_store else None
        row = self.labelled(example.conversation.turns, example.has_image, template)
        if any(label != IGNORE for label in row.labels[1:]):  # the first label is never predicted
            return row
        image_cut = example.has_image and self.image_token_id not in row.input_ids
        if image_cut or len(row.input_ids) >= self.max_length:
            raise ValueError(
                f"no supervised token within data.max_length: its first answer begins beyond the {self.max_length} "
                "tokens that are read; raise data.max_length, or shorten the question"
            )
        raise ValueError(
            "no supervised token: it has no answer, or its text holds words that the template itself writes "
            "(USER, ASSISTANT:, </s>), which LLaVA-1.5 does not learn from either; correct the text, or leave it out"
        )

    def labelled(self, turns: Turns, has_image: bool, template: str | None = None) -> Labelled:
        """Ids and labels of a conversation, its image as vision tokens, cut at `max_length`.

        An image is shown once: without a placeholder it goes before the first question, later ones are dropped.

        Raises:
            ValueError: if the turns do not fit the template, or the image lies beyond `max_length`.
        """
        template = template or self.template
        if has_image:
            turns = show_once(turns)
        example = ids_and_labels(turns, self.tokenizer, TEMPLATES[template], has_image, self.max_length)
        if has_image:
            return with_vision_tokens(example, self.image_tokens, self.image_token_id, self.max_length)
        if PLACEHOLDER in example.input_ids:
            raise ValueError(
                f"it has no image, but the {template} template shows one: use data.template=v1, or leave it out"
            )
        return Labelled(example.input_ids[: self.max_length], example.labels[: self.max_length])


def pad(rows: Sequence[Labelled], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded int64 tensors (B, L) of B rows, L the longest: input_ids, labels, attention_mask.

    The mask follows the lengths: a real `<unk>`, whose id is also the padding's, stays visible.
    """
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "labels": torch.full(shape, IGNORE),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
    }
    for number, row in enumerate(rows):
        length = len(row.input_ids)
        batch["input_ids"][number, :length] = torch.tensor(row.input_ids)
        batch["labels"][number, :length] = torch.tensor(row.labels)
        batch["attention_mask"][number, :length] = 1
    return batch
