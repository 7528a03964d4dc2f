"""Several stores at once: what each gives, and what a run has really seen of it."""

from __future__ import annotations

from training.config import TrainConfig
from training.stream.stream import Stream


def mixture_lines(config: TrainConfig, stream: Stream) -> str:
    """The stores that are about to be learned from, and how much of each an epoch has, for a person."""
    codec, mixture = f"codec {stream.stores[0].codec}", config.data.mixture
    if len(mixture) == 1:
        return f"store     {mixture[0].store}: {stream.stores[0].samples} images, {codec}"
    total = sum(due for _, due in stream.due())
    lines = [
        f"store{number:<4} {entry.store}: {store.samples} images; an epoch has {due:,} of {there:,} examples "
        f"({due / there:.3g} times each, {due / total:.1%} of the epoch), template {entry.template}"
        for number, (entry, store, (there, due)) in enumerate(zip(mixture, stream.stores, stream.due(), strict=True))
    ]
    return "\n".join([*lines, f"stores    {codec}"])
