"""Placeholders of vision tokens in prompts: where they stand; and kept from what takes every id for a word."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator, PromptLookupCandidateGenerator


class Places(NamedTuple):
    """Where things stand in a training batch (B, L) whose rows are padded on the right; int64 each, ascending.

    Whoever makes the batch knows them on the host. The model need not ask the device then: it waits for no answer.

    Attributes:
        rows: (n,), the rows with an image.
        vision: (n * tokens,), the placeholders, counted through all rows: b * L + l.
        learned: (targets,), the labels that are predicted, counted likewise.
        groups: float32 (targets, groups), 1 where a target is of a group, whose loss is wanted by itself; or None.
    """

    rows: Tensor
    vision: Tensor
    learned: Tensor
    groups: Tensor | None = None


def check_count(found: int, vision: Tensor | None, config: Any) -> None:
    """Refuse prompts whose placeholders are not as many as the vision tokens (n, tokens, width) of their images.

    Raises:
        ValueError: with both numbers.
    """
    images, expected = (0, 0) if vision is None else (vision.shape[0], vision.shape[0] * vision.shape[1])
    if found != expected:
        raise ValueError(
            f"input_ids hold {found} image placeholders (id {config.image_token_id}), but {images} image(s) "
            f"of {config.image_tokens} vision tokens were given, {expected} in all: let the processor write both"
        )


def within_vocabulary(input_ids: Tensor, image_token_id: int) -> Tensor:
    """(rows, length), each placeholder replaced by its row's first id: the row holds it anyway, so none is punished."""
    first = input_ids[:, :1].clamp(max=image_token_id - 1)
    return torch.where(input_ids == image_token_id, first, input_ids)


class VocabularyOnly(LogitsProcessorList):  # type: ignore[misc]
    """Logits processors that look up the scores of ids in the prompt, such as the repetition penalty's."""

    def __init__(self, processors: LogitsProcessorList, image_token_id: int) -> None:
        super().__init__(processors)
        self.image_token_id = image_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """(rows, length) and (rows, vocabulary) -> (rows, vocabulary)."""
        result: Tensor = super().__call__(within_vocabulary(input_ids, self.image_token_id), scores, **kwargs)
        return result


class ProposedText(CandidateGenerator):  # type: ignore[misc]
    """What prompt lookup proposes after a prompt without placeholders; the prompt itself stays as it is."""

    def __init__(self, lookup: PromptLookupCandidateGenerator, image_token_id: int) -> None:
        self.lookup = lookup
        self.image_token_id = image_token_id

    def get_candidates(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(1, length) -> (1, length + proposed), and no scores."""
        ids, scores = self.lookup.get_candidates(within_vocabulary(input_ids, self.image_token_id), *args, **kwargs)
        return torch.cat((input_ids, ids[:, input_ids.shape[1] :]), dim=1), scores

    def update_candidate_strategy(self, *args: Any, **kwargs: Any) -> None:
        """Lookup's own."""
        self.lookup.update_candidate_strategy(*args, **kwargs)
