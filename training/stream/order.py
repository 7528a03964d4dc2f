"""Which examples make up each global batch of an epoch: a pure function of (examples, settings, epoch).

The scheme. Shards are permuted; shard number p of the permuted row lends its examples positions drawn uniformly from an
interval of `window_shards` shards around p (moved inwards at both ends of the epoch); examples are taken in the order
of their positions. So a batch mixes the examples of about `window_shards` shards, no two epochs alike, while a shard is
needed only from the start of its interval to the end: at most 1.5 windows of shards are in use at once, and remote data
is fetched once per epoch, evenly. With as many shards in the window as there are, this is a full shuffle.

Randomness comes from PCG64's raw bits, whose stream numpy guarantees for ever, and from stable sorts: the order of a
run does not change with the machine, the number of ranks or threads, or numpy's version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

POOL_BATCHES = 16  # global batches that are sorted by length together; more pads less and mixes lengths less


@dataclass(frozen=True)
class Examples:
    """Every conversation of a store in natural order (shard, row, conversation); all arrays have shape (examples,)."""

    sample: Ints  # row of the manifest
    conversation: Ints  # which of the sample's conversations
    shard: Ints
    words: Ints  # length, in whitespace-separated words, as LLaVA measures it
    has_image: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.sample)

    def first(self, count: int | None) -> Examples:
        """The first `count` examples (all of them for None)."""
        return Examples(*(getattr(self, name)[:count] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class OrderSettings:
    """Everything, beside the store, that decides the order. Two runs with equal settings see equal global batches."""

    global_batch_size: int
    seed: int = 0
    shuffle: bool = True
    window_shards: int = 16
    group_by_length: bool = False
    together: bool = False
    last_batch: Literal["drop", "pad"] = "drop"
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "window_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.last_batch not in ("drop", "pad"):
            raise ValueError(f"last_batch is {self.last_batch!r}; choose 'drop' or 'pad'")
        if self.together and self.group_by_length:
            raise ValueError(
                "together keeps an image's conversations adjacent, group_by_length sorts them apart: choose one"
            )

    def batches(self, examples: int) -> int:
        """Global batches in an epoch of so many examples."""
        full, rest = divmod(examples, self.global_batch_size)
        return full + (1 if rest and self.last_batch == "pad" else 0)

    def share(self, rank: int, ranks: int) -> slice:
        """The positions of a global batch that a rank takes: neighbours, which may be conversations about one image.

        A batch that is sorted by length is dealt out like cards instead: no rank gets all the long examples.
        """
        rows = self.global_batch_size // ranks
        return slice(rank, None, ranks) if self.group_by_length else slice(rank * rows, (rank + 1) * rows)


def epoch_batches(examples: Examples, settings: OrderSettings, epoch: int) -> Ints:
    """The global batches of an epoch: example indices of shape (batches, global_batch_size).

    Each example appears exactly once, save for the end of the epoch: with `drop`, the fewer than one batch that are
    left over are not seen in this epoch; with `pad`, the last batch is filled up with the examples just before them
    (the last `global_batch_size` of the order), so every example is seen and fewer than one batch are seen twice.
    """
    draw = _Draws(settings.seed, epoch)
    order = _shuffled(examples, settings, draw) if settings.shuffle else np.arange(len(examples), dtype=np.int64)
    if settings.group_by_length:
        order = _grouped(order, examples, settings.global_batch_size, draw)
    size = settings.global_batch_size
    full = len(order) // size * size
    if settings.batches(len(order)) * size > full:
        order = np.concatenate([order[:full], np.resize(order, size) if full == 0 else order[-size:]])
    else:
        order = order[:full]
    return order.reshape(-1, size)


class _Draws:
    """Independent streams of uniform numbers in [0, 1), one for each purpose."""

    def __init__(self, seed: int, epoch: int) -> None:
        self.entropy = [seed, epoch]

    def __call__(self, purpose: int, count: int) -> Floats:
        bits: Any = np.random.PCG64(np.random.SeedSequence([*self.entropy, purpose])).random_raw(count)
        uniform: Floats = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return uniform


def _shuffled(examples: Examples, settings: OrderSettings, draw: _Draws) -> Ints:
    shards = np.unique(examples.shard)
    place = np.empty(len(shards), dtype=np.int64)
    place[np.argsort(draw(0, len(shards)), kind="stable")] = np.arange(len(shards))
    window = min(settings.window_shards, len(shards))
    start = np.clip(place + 0.5 - window / 2, 0, len(shards) - window)
    # One draw per image keeps its conversations together: equal positions, and the sort is stable.
    unit = examples.sample if settings.together else np.arange(len(examples))
    _, first, inverse = np.unique(unit, return_index=True, return_inverse=True)
    position = start[np.searchsorted(shards, examples.shard[first])] + draw(1, len(first)) * window
    order: Ints = np.argsort(position[inverse], kind="stable").astype(np.int64)
    return order


def _grouped(order: Ints, examples: Examples, size: int, draw: _Draws) -> Ints:
    """Batches of one modality and of similar length, as LLaVA's group_by_modality_length.

    As there, what is left of each modality makes the last, mixed batches. Unlike there, `POOL_BATCHES` batches are
    sorted by length together, so that batches differ in length and the examples within one hardly do. Within a batch
    the longest come first, so that microbatches hardly pad, and a step that does not fit the memory fails at its start.
    """
    when = draw(3, len(order))
    batches: list[Ints] = []
    keys: list[float] = []
    rest: list[Ints] = []
    for modality in (True, False):
        positions = np.flatnonzero(examples.has_image[order] == modality)
        full = len(positions) // size * size
        rest.append(positions[full:])
        for begin in range(0, full, POOL_BATCHES * size):
            pool = positions[begin : min(begin + POOL_BATCHES * size, full)]
            sorted_pool = pool[np.argsort(examples.words[order[pool]], kind="stable")].reshape(-1, size)
            for row in sorted_pool:
                # A batch comes at a random moment of the stretch that its pool was taken from.
                keys.append(float(pool[0] + when[len(batches)] * (pool[-1] - pool[0])))
                batches.append(row[::-1])
    sequence = [batches[i] for i in np.argsort(np.array(keys), kind="stable")]
    grouped: Ints = order[np.concatenate([*sequence, np.sort(np.concatenate(rest))]).astype(np.int64)]
    return grouped


def same_shard_pairs(batches: Ints, examples: Examples) -> float:
    """How often two examples of a global batch share a shard, relative to a full shuffle (1.0; more is worse mixed)."""
    shards, size = examples.shard[batches], batches.shape[1]
    counts = np.stack([np.bincount(row, minlength=int(examples.shard.max()) + 1) for row in shards])
    within = (counts * (counts - 1)).sum() / (len(batches) * size * (size - 1))
    overall = np.bincount(examples.shard)
    expected = (overall * (overall - 1)).sum() / (len(examples) * (len(examples) - 1))
    return float(within / expected)


def use_of_shards(batches: Ints, examples: Examples, images: bool) -> tuple[Ints, Ints]:
    """First and last global batch that needs each shard, of shape (shards,); both -1 where none does.

    With `images`, only examples that have one count: those that need the shard's feature columns.
    """
    shards: Ints = examples.shard[batches].ravel()
    when: Ints = np.repeat(np.arange(len(batches), dtype=np.int64), batches.shape[1])
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
    """The most shards whose feature columns are needed at one moment: begun and not yet finished."""
    first, last = use_of_shards(batches, examples, images=True)
    used = last >= 0
    moments = np.zeros(len(batches) + 1, dtype=np.int64)
    np.add.at(moments, first[used], 1)
    np.add.at(moments, last[used] + 1, -1)
    return int(np.cumsum(moments).max(initial=0))


def padding_share(
    batches: Ints, lengths: Ints | Floats, settings: OrderSettings, ranks: int = 1, rows: int | None = None
) -> float:
    """Share of positions that are padding when every microbatch of `rows` examples is as long as its longest.

    Args:
        batches: example indices of shape (batches, global_batch_size).
        lengths: of each example, shape (examples,), in any unit.
        rows: default: a rank's part of the batch whole.
    """
    rows = rows or settings.global_batch_size // ranks
    parts = np.stack([lengths[batches[:, settings.share(rank, ranks)]] for rank in range(ranks)])
    starts = np.arange(0, parts.shape[-1], rows)
    longest = np.maximum.reduceat(parts, starts, axis=-1)
    padded = (longest * np.diff(starts, append=parts.shape[-1])).sum()
    return float(1 - parts.sum() / padded)
