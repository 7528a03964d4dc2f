"""Examples of the store to the text tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.schema import Conversation
from training.model.markers import IGNORE
from training.model.tokenizer import Tokenizer
from training.text.image import Turns, show_once
from training.text.labels import Labelled, ids_and_labels, with_vision_tokens
from training.text.templates import TEMPLATES


@dataclass(frozen=True)
class Example:
    """One conversation of the store: what the text side of a batch is made from."""

    key: str  # <sample key>#<number of the conversation>
    conversation: Conversation
    has_image: bool


@dataclass(frozen=True)
class Collator:
    """Turns B examples into `input_ids`, `labels` and `attention_mask`, int64 (B, L).

    Attributes:
        template: a name of `TEMPLATES`.
        max_length: most tokens of an example, vision tokens included; what is longer is cut off.
        image_tokens: how many ids `image_token_id` an image becomes.
    """

    tokenizer: Tokenizer
    template: str
    max_length: int
    image_tokens: int
    image_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """B examples -> `input_ids`, `labels` and `attention_mask`, (B, L) each.

        Raises:
            ValueError: naming the example whose turns do not fit the template, or whose image does not fit
                `max_length`.
        """
        rows = []
        for example in examples:
            try:
                rows.append(self.labelled(example.conversation.turns, example.has_image))
            except ValueError as error:
                raise ValueError(f"example {example.key}: {error}") from error
        return pad(rows, self.tokenizer.pad_id)

    def labelled(self, turns: Turns, has_image: bool) -> Labelled:
        """Ids and labels of a conversation, its image as vision tokens.

        An image is shown once: without a placeholder it goes before the first question, later ones are dropped.

        Raises:
            ValueError: if the turns do not fit the template, or the image does not fit `max_length`.
        """
        if has_image:
            turns = show_once(turns)
        example = ids_and_labels(turns, self.tokenizer, TEMPLATES[self.template], has_image, self.max_length)
        if has_image:
            example = with_vision_tokens(example, self.image_tokens, self.image_token_id, self.max_length)
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
