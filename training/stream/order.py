"""Which examples make up each global batch of an epoch: a pure function of (examples, order settings, epoch).

The scheme. Shards are permuted; shard number p of the permuted row lends its examples positions drawn uniformly from an
interval of `window_shards` shards around p (moved inwards at both ends of the epoch); examples are taken in the order
of their positions. So a batch mixes the examples of about `window_shards` shards, no two epochs alike, while a shard is
needed only from the start of its interval to the end: at most 1.5 windows of shards are in use at once, and remote data
is fetched once per epoch, evenly. With as many shards in the window as there are, this is a full shuffle.

Randomness comes from PCG64's raw bits, whose stream numpy guarantees for ever, and from stable sorts: the order of a
run does not change with the machine, the number of ranks or threads, or numpy's version.

Shapes: N examples of a store, S shards, G global batches of B examples in an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from training.config import OrderSettings

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

POOL_BATCHES = 16  # global batches that are sorted by length together; more pads less and mixes lengths less
SHARDS, EXAMPLES, BATCHES = 0, 1, 3  # what a draw is for; the numbers are part of every order, so they stay


@dataclass(frozen=True)
class Examples:
    """Every conversation of a store in natural order (shard, row, conversation); all arrays have shape (N,)."""

    sample: Ints  # row of the manifest
    conversation: Ints  # which of the sample's conversations
    shard: Ints
    words: Ints  # length, in whitespace-separated words, as LLaVA measures it
    has_image: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.sample)

    def first(self, count: int | None) -> Examples:
        """The first `count` examples (all of them for None)."""
        return self[slice(count)]

    def __getitem__(self, chosen: slice | Ints | npt.NDArray[np.bool_]) -> Examples:
        """The examples of a slice, of indices, or where a mask (N,) is true."""
        return Examples(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


class Order(OrderSettings):
    """Everything, beside the store, that decides the order. Two runs with equal orders see equal global batches."""

    global_batch_size: int = Field(gt=0, description="examples (conversations) per optimizer step, over all ranks")

    @classmethod
    def of(cls, settings: OrderSettings, global_batch_size: int) -> Order:
        """The order that `settings` (a run's `config.data`) and the size of its batches make."""
        chosen = settings.model_dump(include=set(OrderSettings.model_fields))
        return cls(global_batch_size=global_batch_size, **chosen)

    def batches(self, examples: int) -> int:
        """Global batches in an epoch of that many examples."""
        full, rest = divmod(examples, self.global_batch_size)
        return full + (1 if rest and self.last_batch == "pad" else 0)

    def share(self, rank: int, ranks: int) -> slice:
        """The positions of a global batch that a rank takes: neighbours, which may be conversations about one image.

        A batch that is sorted by length is dealt out like cards instead: no rank gets all the long examples.
        """
        rows = self.global_batch_size // ranks
        return slice(rank, None, ranks) if self.group_by_length else slice(rank * rows, (rank + 1) * rows)


def epoch_batches(examples: Examples, order: Order, epoch: int) -> Ints:
    """The global batches of an epoch: example indices (G, B).

    Each example appears exactly once, except at the end of the epoch, where fewer than B examples may be left over.
    With `drop` they are not seen in this epoch. With `pad` the last batch is the last B examples of the order: every
    example is seen, and fewer than B are seen twice.
    """
    draw = _Draws(order.seed, epoch)
    sequence = _shuffled(examples, order, draw) if order.shuffle else np.arange(len(examples), dtype=np.int64)  # (N,)
    if order.group_by_length:
        sequence = _grouped(sequence, examples, order.global_batch_size, draw)
    size = order.global_batch_size
    full = len(sequence) // size * size
    if order.batches(len(sequence)) * size > full:
        # The last batch is the last B examples; a store of fewer than B repeats them.
        last = np.resize(sequence, size) if full == 0 else sequence[-size:]
        sequence = np.concatenate([sequence[:full], last])
    else:
        sequence = sequence[:full]
    return sequence.reshape(-1, size)


class _Draws:
    """Independent streams of uniform numbers in [0, 1), one for each purpose."""

    def __init__(self, seed: int, epoch: int) -> None:
        self.entropy = [seed, epoch]

    def __call__(self, purpose: int, count: int) -> Floats:
        """(count,) numbers: the upper 53 bits of each raw 64, as many as a float64 holds, over 2^53."""
        bits: Any = np.random.PCG64(np.random.SeedSequence([*self.entropy, purpose])).random_raw(count)
        uniform: Floats = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return uniform


def _shuffled(examples: Examples, order: Order, draw: _Draws) -> Ints:
    """All examples (N,), in the order of the positions that they draw within the intervals of their shards."""
    shards = np.unique(examples.shard)  # (S,), ascending
    # Permute the shards: shards[i] stands at place[i] of the row.
    place = np.empty(len(shards), dtype=np.int64)
    place[np.argsort(draw(SHARDS, len(shards)), kind="stable")] = np.arange(len(shards))
    # Each shard's interval begins half a window before its middle, but all of it lies within [0, S].
    window = min(order.window_shards, len(shards))
    start = np.clip(place + 0.5 - window / 2, 0, len(shards) - window)  # (S,)
    # A unit draws one position. It is an example, or with `together` an image: its conversations then have equal
    # positions, and stay neighbours because the sort is stable.
    unit = examples.sample if order.together else np.arange(len(examples))  # (N,)
    _, first, unit_of = np.unique(unit, return_index=True, return_inverse=True)  # (units,) an example each, (N,)
    shard_of = np.searchsorted(shards, examples.shard[first])  # (units,), index into `shards`
    position = start[shard_of] + draw(EXAMPLES, len(first)) * window  # (units,)
    sequence: Ints = np.argsort(position[unit_of], kind="stable").astype(np.int64)
    return sequence


def _grouped(sequence: Ints, examples: Examples, size: int, draw: _Draws) -> Ints:
    """`sequence` (N,) in batches of one modality and of similar length, as LLaVA's group_by_modality_length.

    What is left of each modality makes the last, mixed batches, as in LLaVA. Unlike LLaVA, it sorts `POOL_BATCHES`
    batches by length together: batches differ in length, the examples of one do not differ much. The longest of a
    batch come first: microbatches pad little, and a step that does not fit the memory fails at its start.
    """
    when = draw(BATCHES, len(sequence))
    batches: list[Ints] = []  # each (B,): positions in `sequence`, the longest example first
    moments: list[float] = []  # of each batch, on the scale of those positions
    rest: list[Ints] = []
    for modality in (True, False):  # with an image, text only
        positions = np.flatnonzero(examples.has_image[sequence] == modality)  # those of this modality, ascending
        full = len(positions) // size * size
        rest.append(positions[full:])
        for begin in range(0, full, POOL_BATCHES * size):
            # A pool is a stretch of the shuffled sequence. Sort it by length and cut it into batches.
            pool = positions[begin : min(begin + POOL_BATCHES * size, full)]
            sorted_pool = pool[np.argsort(examples.words[sequence[pool]], kind="stable")].reshape(-1, size)
            for row in sorted_pool:
                # A batch comes at a random moment of the stretch that its pool was taken from.
                moments.append(float(pool[0] + when[len(batches)] * (pool[-1] - pool[0])))
                batches.append(row[::-1])
    # The batches in the order of their moments, then what filled no batch, in the order of the shuffled sequence.
    ordered = [batches[i] for i in np.argsort(np.array(moments), kind="stable")]
    grouped: Ints = sequence[np.concatenate([*ordered, np.sort(np.concatenate(rest))]).astype(np.int64)]
    return grouped


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
