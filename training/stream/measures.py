"""What an order is worth: how well it mixes, what it keeps in use, how much of a batch it pads."""

from __future__ import annotations

import numpy as np

from training.stream.order import Examples, Floats, Ints, Order


def same_shard_pairs(batches: Ints, examples: Examples) -> float:
    """How often two examples of a global batch share a shard, relative to a full shuffle (1.0; more is worse mixed).

    Args:
        batches: example indices (G, B).
    """
    shards, size = examples.shard[batches], batches.shape[1]
    # Of c examples in one shard, c (c - 1) ordered pairs share it.
    counts = np.stack([np.bincount(row, minlength=int(examples.shard.max()) + 1) for row in shards])  # (G, S)
    within = (counts * (counts - 1)).sum() / (len(batches) * size * (size - 1))  # share of the pairs of a batch
    overall = np.bincount(examples.shard)  # (S,)
    expected = (overall * (overall - 1)).sum() / (len(examples) * (len(examples) - 1))  # share of all pairs
    return float(within / expected)


def use_of_shards(batches: Ints, examples: Examples, images: bool) -> tuple[Ints, Ints]:
    """First and last global batch of `batches` (G, B) that needs each shard, both (S,); -1 where none does.

    With `images`, only examples that have one count: those that need the shard's feature columns.
    """
    shards: Ints = examples.shard[batches].ravel()  # (G * B,)
    when: Ints = np.repeat(np.arange(len(batches), dtype=np.int64), batches.shape[1])  # (G * B,), the batch of each
    if images:
        chosen = examples.has_image[batches].ravel()
        shards, when = shards[chosen], when[chosen]
    count = int(examples.shard.max(initial=-1)) + 1
    last = np.full(count, -1, dtype=np.int64)
    np.maximum.at(last, shards, when)
    first = np.full(count, len(batches), dtype=np.int64)
    np.minimum.at(first, shards, when)
    return np.where(last < 0, -1, first), last


def shards_in_use(batches: Ints, examples: Examples) -> int:
    """The most shards whose feature columns `batches` (G, B) need at one moment: begun and not yet finished."""
    first, last = use_of_shards(batches, examples, images=True)
    used = last >= 0
    # +1 where a shard begins and -1 behind its last batch: the running sum is how many are in use.
    changes = np.zeros(len(batches) + 1, dtype=np.int64)
    np.add.at(changes, first[used], 1)
    np.add.at(changes, last[used] + 1, -1)
    return int(np.cumsum(changes).max(initial=0))


def padding_share(
    batches: Ints, lengths: Ints | Floats, order: Order, ranks: int = 1, rows: int | None = None
) -> float:
    """Share of positions that are padding when every microbatch of `rows` examples is as long as its longest.

    Args:
        batches: example indices (G, B).
        lengths: of each example (N,), in any unit.
        rows: default: a rank's part of the batch whole.
    """
    rows = rows or order.global_batch_size // ranks
    parts = np.stack([lengths[batches[:, order.share(rank, ranks)]] for rank in range(ranks)])  # (ranks, G, B / ranks)
    starts = np.arange(0, parts.shape[-1], rows)  # of each microbatch
    longest = np.maximum.reduceat(parts, starts, axis=-1)  # (ranks, G, microbatches)
    padded = (longest * np.diff(starts, append=parts.shape[-1])).sum()
    return float(1 - parts.sum() / padded)
