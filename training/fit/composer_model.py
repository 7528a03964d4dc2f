"""The model as Composer sees it: a batch of the stream in, the loss over supervised tokens out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from composer.models import ComposerModel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.codec import from_payload
from pipeline.schema import Codec, Column
from training.model.decoders import decoder_of
from training.model.markers import IGNORE
from training.model.model import CompactVisionForConditionalGeneration
from training.model.placeholders import Places
from training.stream.batch import Batch, split

# PyTorch's attention for causal models, without a mask. Before an attention that is its own, transformers reads the
# mask, or the positions, from the device in every pass, to find out whether it needs a mask at all.
UNMASKED = "unmasked_sdpa"
AttentionInterface.register(UNMASKED, sdpa_attention_forward)


class TrainableModel(ComposerModel):  # type: ignore[misc]
    """Decodes the store's columns on the device and runs the multimodal model on them.

    The stream pads rows on the right, where no token of a causal model sees the padding: it goes without a mask.
    """

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
        text = model.llm.config
        if decoder_of(text.model_type).sees_all_before and text._attn_implementation == "sdpa":
            model.llm.set_attn_implementation(UNMASKED)

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
            places=_places(batch),
            use_cache=False,
        )

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy over the supervised tokens of this microbatch, (); Composer weights the microbatches."""
        loss: torch.Tensor = outputs.loss
        return loss


def _places(batch: Batch) -> Places | None:
    """What is known of a microbatch; None if it was not asked on the host."""
    if "learned" not in batch:
        return None
    return Places(batch["image_rows"], batch["vision"], batch["learned"], batch.get("groups"))


def microbatches(batch: Batch, size: int | float, image_token_id: int, pin: bool, stores: int = 1) -> list[Batch]:
    """`split`, and all that a step would otherwise ask the device for, while the batch is on the host.

    Each part has `tokens` (`token_counts`), and the places `vision` and `learned` (model.placeholders.Places); with
    several `stores` also `groups`, each target's store. With `pin` its tensors are page-locked: the host goes on while
    they are copied to the GPU.
    """
    parts = split(batch, size)
    for part in parts:
        part["tokens"] = token_counts(part)
        places = {"vision": part["input_ids"].numpy() == image_token_id, "learned": _learned(part)}  # (B, L) each
        part |= {name: torch.from_numpy(np.flatnonzero(found)) for name, found in places.items()}
        if stores > 1:
            of_target = part["stores"].numpy()[part["learned"].numpy() // part["input_ids"].shape[1]]  # (targets,)
            part["groups"] = torch.from_numpy(np.eye(stores, dtype=np.float32)[of_target])
        if pin:
            part |= {name: value.pin_memory() for name, value in part.items() if isinstance(value, torch.Tensor)}
    return parts


def _learned(batch: Batch) -> Any:
    """Which labels are predicted, bool (B, L), as a NumPy array: the first never is, as nothing stands before it."""
    learned = batch["labels"].numpy() != IGNORE
    learned[:, 0] = False
    return learned


def token_counts(batch: Batch) -> dict[str, Any]:
    """How many tokens a batch on the host, or a microbatch anywhere, has.

    Returns: `loss_generating`, what Composer weights microbatches by; `total`, for its token clock; `predicted`, which
        is `loss_generating` without its bound; `lengths`, of each example.

    An example that teaches nothing counts 0 tokens in the first two. Composer divides by the global batch's sum: a tiny
    number keeps a batch without any supervised token at loss 0.
    """
    if "tokens" in batch:  # counted before the microbatch went to its device
        counts: dict[str, Any] = batch["tokens"]
        return counts
    lengths, learned = batch["attention_mask"].numpy().sum(axis=1), _learned(batch)  # (B,), (B, L)
    predicted = int(learned.sum())
    return {
        "total": int((lengths * learned.any(axis=1)).sum()),
        "loss_generating": max(float(predicted), 1e-6),
        "predicted": predicted,
        "lengths": lengths.tolist(),
    }
