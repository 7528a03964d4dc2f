"""The model as Composer sees it: a batch of the stream in, the loss over supervised tokens out."""

from __future__ import annotations

from typing import Any

import torch
from composer.models import ComposerModel

from pipeline.codec import from_payload
from pipeline.schema import Codec, Column
from training.model.markers import IGNORE
from training.model.model import CompactVisionForConditionalGeneration
from training.stream.batch import Batch


class TrainableModel(ComposerModel):  # type: ignore[misc]
    """Decodes the store's columns on the device and runs the multimodal model on them."""

    def __init__(
        self,
        model: CompactVisionForConditionalGeneration,
        columns: tuple[Column, ...],
        codec: Codec,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.model = model
        self.columns = columns
        self.codec: Codec = codec
        self.dtype = dtype

    def forward(self, batch: Batch) -> Any:
        """Batch of (B, L) tokens and the columns of its images -> the Hugging Face output, `loss` included.

        A batch without images sends zero images through the connector, so that every rank has a gradient, of zeros, for
        each of its parameters: without one, DDP would wait for ever.
        """
        # {column: uint8 (I, bytes)} -> {column: (I, tokens, width)}
        columns = {c.name: from_payload(batch["columns"][c.name], c, self.codec, self.dtype) for c in self.columns}
        return self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            columns=columns,
            use_cache=False,
        )

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy over the supervised tokens of this microbatch, (); Composer weights the microbatches."""
        loss: torch.Tensor = outputs.loss
        return loss


def supervised_tokens(batch: Batch) -> int:
    """How many tokens of the batch are predicted: position i predicts label i + 1, so the first label never counts."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def token_counts(batch: Batch) -> dict[str, int | float]:
    """What Composer weights microbatches by: `loss_generating`; `total` is for the token clock.

    An example that teaches nothing counts 0 tokens in both. Composer divides by the global batch's sum: a tiny number
    keeps a batch without any supervised token at loss 0.
    """
    learned = (batch["labels"][:, 1:] != IGNORE).any(dim=1)  # (B,)
    total = int((batch["attention_mask"].sum(dim=1) * learned).sum())
    return {"total": total, "loss_generating": max(float(supervised_tokens(batch)), 1e-6)}
