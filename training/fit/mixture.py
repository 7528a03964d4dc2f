"""Several stores at once: what each gives, the loss on each, and what a run has really seen of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from training.config import TrainConfig
from training.release.records import StoreSeen
from training.stream.stream import Stream


def mixture_lines(config: TrainConfig, stream: Stream) -> str:
    """The stores that are about to be learned from, and how much of each an epoch has, for a person."""
    codec, mixture = f"codec {stream.stores[0].codec}", config.data.mixture
    if not config.data.stores:
        return f"store     {mixture[0].store}: {stream.stores[0].samples} images, {codec}"
    total = sum(due for _, due in stream.due())
    lines = [
        f"store{number:<4} {entry.store}: {store.samples} samples; an epoch has {due:,} of {there:,} examples "
        f"({due / there:.3g} times each, {due / total:.1%} of the epoch), template {entry.template}"
        for number, (entry, store, (there, due)) in enumerate(zip(mixture, stream.stores, stream.due(), strict=True))
    ]
    return "\n".join([*lines, f"stores    {codec}"])


class LossByStore(Callback):  # type: ignore[misc]
    """The mean loss over each store's supervised tokens in a step's global batch; of a single store nothing.

    The sums stay on the device until the step's losses are read, and are read with them.

    Attributes:
        sums: () each, over all ranks: of each store the cross-entropies, then of each store the tokens.
        line: what a line of the log says of the step that has ended.
    """

    def __init__(self, stores: int) -> None:
        self.stores = stores
        self.sums: list[torch.Tensor] = []
        self.line: dict[str, float] = {}
        self._parts: list[torch.Tensor] = []  # (2, stores) each, of this rank's microbatches

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """A step begins, or, if memory did not suffice, begins again."""
        self._parts = []

    def after_loss(self, state: State, logger: Logger) -> None:
        """Keep the microbatch's sums: reading them here would wait for the device."""
        if self.stores > 1:
            self._parts.append(torch.stack([state.outputs.by_group, state.batch["groups"].sum(dim=0)]))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Add them up over microbatches and ranks."""
        if self.stores > 1:
            sums = torch.stack(self._parts).sum(dim=0)
            dist.all_reduce(sums, reduce_operation="SUM")
            self.sums = [*sums.flatten().unbind()]

    def take(self, read: list[float]) -> None:
        """The values of `sums`."""
        self.line = {}
        for number, (entropy, tokens) in enumerate(zip(read[: self.stores], read[self.stores :], strict=True)):
            if tokens:
                self.line |= {f"loss_store{number}": entropy / tokens, f"tokens_store{number}": round(tokens)}


def seen(config: TrainConfig, stream: Stream, steps: int, lines: Sequence[Mapping[str, float]]) -> list[StoreSeen]:
    """What a run has learned from each of several stores in `steps`: by its order, and by the lines of its log.

    A log that lacks lines, as one on the new disk of a lost node, does not tell tokens. Nothing for a single store.
    """
    if len(stream.stores) == 1:
        return []
    examples = np.zeros(len(stream.stores), dtype=np.int64)
    for epoch in range(-(-steps // len(stream))):
        batches = stream.epoch_batches(epoch)[: steps - epoch * len(stream)]
        examples += np.bincount(stream.examples.store[batches].ravel(), minlength=len(examples))
    return [
        StoreSeen(
            store=entry.store,
            examples=count,
            tokens=round(sum(line.get(f"tokens_store{number}", 0) for line in lines)) if len(lines) == steps else None,
        )
        for number, (entry, count) in enumerate(zip(config.data.mixture, examples.tolist(), strict=True))
    ]


def seen_lines(stores: Sequence[StoreSeen]) -> str:
    """The shares that were really seen, for a person."""
    examples, tokens = sum(store.examples for store in stores), sum(store.tokens or 0 for store in stores)
    lines = []
    for number, store in enumerate(stores):
        text = f"seen      store{number} {store.store}: {store.examples:,} examples ({store.examples / examples:.1%})"
        if store.tokens is not None:
            text += f", {store.tokens:,} supervised tokens ({store.tokens / max(1, tokens):.1%})"
        lines.append(text)
    return "\n".join(lines)
