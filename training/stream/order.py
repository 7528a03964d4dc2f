"""Which examples make up each global batch of an epoch: a pure function of (examples, order settings, epoch).

Five steps, each a function of its own: `filtered` leaves examples out, `assigned` deals them to groups, `weighed` says
which of them are due in this epoch, `shuffled` and `grouped` put those in order. `epoch_of` is all of them in turn.

The shuffle. Shards are permuted; shard number p of the permuted row lends its examples positions drawn uniformly from
an interval of `window_shards` shards around p (moved inwards at both ends of the epoch); examples are taken in the
order of their positions. So a batch mixes the examples of about `window_shards` shards, no two epochs alike, while a
shard is needed only from the start of its interval to the end: at most 1.5 windows of shards are in use at once, and
remote data is fetched once per epoch, evenly. With as many shards in the window as there are, this is a full shuffle.

The mixture. Each store's examples come in passes without end, each pass a permutation of its shards. Epoch k takes the
items k q to (k + 1) q of that row, q being what the store's weight makes due. So every example has been seen as often
as it should, rounded down or up, at any time; few shards are needed where the weight is small; and no state is kept.

Randomness comes from PCG64's raw bits, whose stream numpy guarantees for ever, and from stable sorts: the order of a
run does not change with the machine, the number of ranks or threads, or numpy's version.

Shapes: N examples of all stores, n of them due in an epoch, S shards, G global batches of B examples in an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from training.config import DataSettings, OrderSettings

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

POOL_BATCHES = 16  # global batches that are sorted by length together; more pads less and mixes lengths less
# What a draw is for; the numbers are part of every order, so they stay.
SHARDS, EXAMPLES, BATCHES, GROUPS, PASSES = 0, 1, 3, 4, 5


# Settings that orders did not always have, and what they are in those: such an order is named as ever.
NEW: dict[str, Any] = {"groups": 1, "weights": (), "epochs": ()}


@dataclass(frozen=True)
class Examples:
    """Every conversation of the stores in natural order (store, shard, row, conversation); all arrays have shape (N,).

    Stores, samples and shards are numbered over all stores, one store after the other.
    """

    sample: Ints  # row of the manifest
    conversation: Ints  # which of the sample's conversations
    shard: Ints
    words: Ints  # length, in whitespace-separated words, as LLaVA measures it
    has_image: Bools
    store: Ints

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, chosen: Ints | Bools) -> Examples:
        """The examples of these indices, or where a mask (N,) is true."""
        return Examples(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def one_after_another(stores: Sequence[Examples], samples: Ints, shards: Ints) -> Examples:
    """The examples of several stores as one; `samples` and `shards` are the numbers that those of each begin with."""
    moved = [
        replace(of, sample=of.sample + samples[i], shard=of.shard + shards[i], store=of.store + i)
        for i, of in enumerate(stores)
    ]
    return Examples(*(np.concatenate([getattr(of, name) for of in moved]) for name in Examples.__dataclass_fields__))


class Order(OrderSettings):
    """Everything, beside the stores, that decides the order. Two runs with equal orders see equal global batches."""

    global_batch_size: int = Field(gt=0, description="examples (conversations) per optimizer step, over all ranks")
    # Of each store, or nothing: then an epoch has every example once.
    weights: tuple[float, ...] = ()
    epochs: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _equal_groups(self) -> Self:
        if self.global_batch_size % self.groups:
            raise ValueError(f"{self.groups} groups have no equal part of {self.global_batch_size} examples")
        return self

    @classmethod
    def of(cls, settings: DataSettings, global_batch_size: int) -> Order:
        """The order that `settings` (a run's `config.data`) and the size of its batches make."""
        chosen = settings.model_dump(include=set(OrderSettings.model_fields))
        weights = tuple(entry.weight for entry in settings.stores if entry.weight is not None)
        epochs = () if weights else tuple(entry.epochs or 1.0 for entry in settings.stores)
        # One store, and several of which each comes once, have the same order as ever.
        weights, epochs = (weights if len(weights) > 1 else ()), (epochs if set(epochs) != {1.0} else ())
        return cls(global_batch_size=global_batch_size, weights=weights, epochs=epochs, **chosen)

    def identity(self) -> dict[str, Any]:
        """What a position in the order is compared by; what is new stands there only where it has an effect."""
        settings = self.model_dump(exclude={name for name, unused in NEW.items() if getattr(self, name) == unused})
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}

    @property
    def part(self) -> int:
        """Examples of each group in a global batch."""
        return self.global_batch_size // self.groups

    def share(self, rank: int, ranks: int) -> slice:
        """The positions of a global batch that a rank takes: neighbours, which may be conversations about one image.

        A batch that is sorted by length is dealt out like cards instead: no rank gets all the long examples. The groups
        lie behind each other in a batch: where several ranks share a group, its part is dealt out among these.
        """
        rows = self.global_batch_size // ranks
        sharing, rest = divmod(ranks, self.groups)  # ranks of each group
        if not self.group_by_length or rest:
            return slice(rank * rows, (rank + 1) * rows)
        group, place = divmod(rank, sharing)
        return slice(group * self.part + place, (group + 1) * self.part, sharing)


@dataclass(frozen=True)
class Epoch:
    """The global batches of an epoch."""

    examples: Examples  # (n,), those that are due; `shard` counts a shard that comes again as another one
    index: Ints  # (n,), which of the stores' examples each is
    rows: Ints  # (G, B), indices into `examples`

    @property
    def batches(self) -> Ints:
        """Indices into the stores' examples, (G, B)."""
        return self.index[self.rows]


def epoch_of(examples: Examples, order: Order, epoch: int) -> Epoch:
    """The global batches of an epoch.

    Each example that is due appears exactly once, except at the end of the epoch, where fewer than B examples may be
    left over. With `drop` they are not seen in this epoch. With `pad` the last batch is the last B examples of the
    order: every example is seen, and fewer than B are seen twice. All this holds of each group and its part of B, but
    that a group may have an example more than others of each store, as often as that store comes.
    """
    found: list[Examples] = []
    indices, sequences = [], []  # of each group
    for number, members in enumerate(assigned(examples, order)):
        draw = _Draws(order.seed, epoch, number)
        index, shard = weighed(examples, members, order, epoch)
        due = replace(examples[index], shard=shard)
        sequence = shuffled(due, order, draw) if order.shuffle else np.arange(len(due), dtype=np.int64)
        if order.group_by_length:
            sequence = grouped(sequence, due, order.part, draw)
        sequences.append(sequence + sum(map(len, found)))
        found.append(due)
        indices.append(index)
    count = batches_per_epoch(examples, order)
    rows = [_cut(sequence, order.part, count) for sequence in sequences]
    index = np.concatenate(indices)
    shard = np.concatenate([due.shard for due in found])
    if order.weights or order.epochs:  # numbers of passes and shards: many, if a small store comes often
        shard = np.unique(shard, return_inverse=True)[1]
    return Epoch(replace(examples[index], shard=shard), index, np.concatenate(rows, axis=1))


def epoch_batches(examples: Examples, order: Order, epoch: int) -> Ints:
    """The global batches of an epoch: example indices (G, B)."""
    return epoch_of(examples, order, epoch).batches


def batches_per_epoch(examples: Examples, order: Order) -> int:
    """Global batches in an epoch: as many in each, however many examples are left over."""
    stores = due_of(examples, order)
    due = []  # of each group
    for members in assigned(examples, order):
        cells = np.bincount(examples.store[members], minlength=len(stores)).tolist()
        due.append(sum(_due(cell, *store) for cell, store in zip(cells, stores, strict=True)))
    if order.last_batch == "drop" or not all(due):
        return min(due) // order.part
    return max(-(-count // order.part) for count in due)  # rounded up


def _cut(sequence: Ints, size: int, count: int) -> Ints:
    """`sequence` as rows (count, size); what is missing at the end is filled up with the examples before it."""
    full = min(len(sequence) // size, count)
    rows = sequence[: full * size].reshape(-1, size)
    if full == count:
        return rows
    # The last batch is the last examples; fewer than a batch are repeated.
    last = np.resize(sequence, size) if full == 0 else sequence[-size:]
    return np.concatenate([rows, *[last[None]] * (count - full)])


def filtered(examples: Examples, limit: int | None) -> Examples:
    """Of each store the first `limit` examples in its own order; all for None.

    Which examples are held out is known by then: `source.opened` has left them out.
    """
    if limit is None:
        return examples
    first = np.searchsorted(examples.store, examples.store)  # (N,), the first example of the same store
    return examples[np.arange(len(examples)) - first < limit]


def assigned(examples: Examples, order: Order) -> list[Ints]:
    """The examples of each group, as ascending indices: in all epochs the same.

    A store's shards, in an order that the seed draws, are cut into parts of equally many examples. Two groups may share
    the shard at a cut.
    """
    if order.groups == 1:
        return [np.arange(len(examples), dtype=np.int64)]
    group = np.empty(len(examples), dtype=np.int64)
    for store in np.unique(examples.store).tolist():
        members = np.flatnonzero(examples.store == store)
        draw = _Draws(order.seed, 0, store)
        row = members[_by_shard(examples.shard[members], draw(GROUPS, _count(examples.shard[members])))]
        group[row] = np.arange(len(row)) * order.groups // len(row)
    return [np.flatnonzero(group == number) for number in range(order.groups)]


def weighed(examples: Examples, members: Ints, order: Order, epoch: int) -> tuple[Ints, Ints]:
    """Which of `members` (indices of examples, ascending) are due in an epoch, as often as they are.

    Returns: indices (n,), pass after pass, in natural order; and of each its shard (n,), another one in each pass.
    """
    if not order.weights and not order.epochs:
        return members, examples.shard[members]
    shards = int(examples.shard.max(initial=-1)) + 1
    index, shard = [members[:0]], [members[:0]]
    for store, counts in enumerate(due_of(examples, order)):
        cell = members[examples.store[members] == store]  # the store's part of this group
        size, due = len(cell), _due(len(cell), *counts)
        start, stop = epoch * due, (epoch + 1) * due
        first_pass = start // max(1, size)
        for number in range(first_pass, -(-stop // max(1, size))):
            first, last = max(0, start - number * size), min(size, stop - number * size)
            chosen = cell
            if last - first < size:  # a part of a pass: those that come first in its own order
                if order.shuffle:
                    draw = _Draws(order.seed, number, store)
                    chosen = cell[_by_shard(examples.shard[cell], draw(PASSES, _count(examples.shard[cell])))]
                chosen = np.sort(chosen[first:last])
            index.append(chosen)
            shard.append(examples.shard[chosen] + (number - first_pass) * shards)
    return np.concatenate(index), np.concatenate(shard)


def due_of(examples: Examples, order: Order, stores: int | None = None) -> list[tuple[int, int]]:
    """Of each store how many examples it has, and how many of them an epoch has.

    Args:
        stores: how many there are; by default as many as have weights, or else examples.
    """
    stores = stores or len(order.weights) or len(order.epochs)
    counts = np.bincount(examples.store, minlength=stores).tolist()
    if order.weights:
        total = sum(order.weights)
        return [(n, round(len(examples) * weight / total)) for n, weight in zip(counts, order.weights, strict=True)]
    return [(n, round(n * times)) for n, times in zip(counts, order.epochs or [1] * len(counts), strict=True)]


def shuffled(examples: Examples, order: Order, draw: _Draws) -> Ints:
    """All examples (n,), in the order of the positions that they draw within the intervals of their shards."""
    shards = np.unique(examples.shard)  # (S,), ascending
    # Permute the shards: shards[i] stands at place[i] of the row.
    place = np.empty(len(shards), dtype=np.int64)
    place[np.argsort(draw(SHARDS, len(shards)), kind="stable")] = np.arange(len(shards))
    # Each shard's interval begins half a window before its middle, but all of it lies within [0, S].
    window = min(-(-order.window_shards // order.groups), len(shards))  # all groups together have one window
    start = np.clip(place + 0.5 - window / 2, 0, len(shards) - window)  # (S,)
    # A unit draws one position. It is an example, or with `together` an image: its conversations then have equal
    # positions, and stay neighbours because the sort is stable.
    unit: Ints = np.arange(len(examples), dtype=np.int64)  # (n,)
    if order.together:
        unit = examples.shard * (1 + examples.sample.max(initial=0)) + examples.sample
    _, first, unit_of = np.unique(unit, return_index=True, return_inverse=True)  # (units,) an example each, (n,)
    shard_of = np.searchsorted(shards, examples.shard[first])  # (units,), index into `shards`
    position = start[shard_of] + draw(EXAMPLES, len(first)) * window  # (units,)
    sequence: Ints = np.argsort(position[unit_of], kind="stable").astype(np.int64)
    return sequence


def grouped(sequence: Ints, examples: Examples, size: int, draw: _Draws) -> Ints:
    """`sequence` (n,) in batches of one modality and of similar length, as LLaVA's group_by_modality_length.

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


def _due(cell: int, examples: int, due: int) -> int:
    """How many examples of a part of a store are due, if `due` of all its `examples` are; exact for a multiple."""
    return (2 * cell * due + examples) // (2 * examples) if examples else 0  # rounded


def _by_shard(shard: Ints, draws: Floats) -> Ints:
    """The order of examples (n,) whose shards, ascending, have these draws (S,): shards by draw, each in one piece."""
    unit = np.searchsorted(np.unique(shard), shard)
    order: Ints = np.argsort(draws[unit], kind="stable").astype(np.int64)
    return order


def _count(shard: Ints) -> int:
    return len(np.unique(shard))


class _Draws:
    """Independent streams of uniform numbers in [0, 1), one for each purpose (and group, or store)."""

    def __init__(self, seed: int, epoch: int, part: int = 0) -> None:
        self._before, self._behind = [seed, epoch], [part] if part else []

    def __call__(self, purpose: int, count: int) -> Floats:
        """(count,) numbers: the upper 53 bits of each raw 64, as many as a float64 holds, over 2^53."""
        entropy = np.random.SeedSequence([*self._before, purpose, *self._behind])
        bits: Any = np.random.PCG64(entropy).random_raw(count)
        uniform: Floats = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return uniform
