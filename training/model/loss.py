"""The loss: cross-entropy of the supervised tokens, whose logits are the only ones that are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .markers import IGNORE
from .placeholders import Places


@dataclass(frozen=True)
class Loss:
    """Hidden states and labels to their loss.

    Attributes:
        head: (tokens, width) -> logits (tokens, vocabulary).
        chunks: in how many parts logits are computed. Above 1 none is kept, and the backward pass computes each again:
            2 FLOPs per head weight and token.
        training: whether nobody asks how many tokens are right.
    """

    head: Callable[[Tensor], Tensor]
    chunks: int
    training: bool

    def __call__(
        self, hidden: Tensor, labels: Tensor, vision: Tensor | None, places: Places | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, length, width), labels (batch, length), vision (n, tokens, width) -> mean cross-entropy in fp32, ().

        With it comes what `_entropy` finds aside, or None in training without groups.

        Without supervised tokens it is 0, and without images 0 is added to it, both with a graph: every parameter
        that learns then has a gradient on every rank, which DDP waits for.
        """
        # (targets,), b * length + l: predicted at the position before.
        learned = (_learned(labels) if places is None else places.learned).to(hidden.device)
        hidden = hidden.flatten(0, 1).index_select(0, learned - 1)
        targets = labels.to(hidden.device).flatten().index_select(0, learned)
        groups = () if places is None or places.groups is None or not self.training else (places.groups,)
        parts = zip(*(given.tensor_split(self.chunks) for given in (hidden, targets, *groups)), strict=True)
        if self.chunks == 1:
            sums = [self._entropy(*part) for part in parts]
        else:  # as many on every rank, however few tokens it has: a sharded head is gathered once for each
            sums = [checkpoint(self._entropy, *part, use_reentrant=False) for part in parts]
        loss = torch.stack([entropy for entropy, _ in sums]).sum() / max(1, len(targets))
        if vision is not None and vision.shape[0] == 0:
            loss = loss + vision.sum() * 0
        return loss, torch.stack([aside for _, aside in sums]).sum(dim=0) if groups or not self.training else None

    def _entropy(self, hidden: Tensor, targets: Tensor, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sum of cross-entropies over (tokens, width) and (tokens,), (), and something aside, without a gradient.

        With groups (tokens, groups) that is the sum of each, (groups,), added up without a product of matrices, which
        may be rounded (TF32). In evaluation it is how many tokens have the largest logit, (); else 0.
        """
        logits = self.head(hidden).float()  # (tokens, vocabulary)
        if groups is not None:
            each = F.cross_entropy(logits, targets, reduction="none")
            return each.sum(), (each.detach()[:, None] * groups).sum(dim=0)
        right = targets.new_zeros(()) if self.training else (logits.argmax(dim=-1) == targets).sum()
        return F.cross_entropy(logits, targets, reduction="sum"), right


def _learned(labels: Tensor) -> Tensor:
    """Labels (B, L) -> `Places.learned`; the first label of a row has nothing before it, from which to predict it."""
    return F.pad(labels[:, 1:], (1, 0), value=IGNORE).flatten().ne(IGNORE).nonzero().squeeze(1)
