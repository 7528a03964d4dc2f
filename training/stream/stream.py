"""The stream: from feature stores to this rank's part of each global batch, in an order that nothing can change.

The way of an example: source.py chooses it, index.py says where it lies, order.py when it comes, reader.py reads it
ahead of the trainer, through tars.py, and for a remote store through cache.py, which ahead.py fills. batch.py is what
comes out.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from pipeline.config import differences
from pipeline.storage import Storage
from training.stream.ahead import Ahead, Use, most_bytes_in_use, tar_uses
from training.stream.batch import Batch
from training.stream.cache import ShardCache
from training.stream.order import NEW, Bools, Epoch, Ints, Order, batches_per_epoch, due_of, epoch_of
from training.stream.reader import Collate, Reader, Reading
from training.stream.source import EVERY, Opened, Side, Source, opened
from training.stream.tars import FileTars, RangeTars, Tars, local_tars

DOWNLOADS = 4  # tars of a remote store that each rank fetches ahead at a time


class Stream(IterableDataset[Batch]):
    """This rank's batches of one epoch after another, for `DataLoader(stream, batch_size=None, num_workers=0)`.

    The global batches are a function of the stores, `order` and the epoch. Rank r of R takes B / R examples of
    each (`Order.share`), so every R that divides the global batch size B sees the same global batches, and all ranks
    have equally many. Each `iter()` starts the next epoch, or, after `load_state_dict`, goes on in the middle of one.
    Features lie in reused buffers: a batch is valid until the next one is asked for.

    Args:
        sources: what is read: stores whose features are alike, in an order that the run keeps.
        columns: which features to read; no other tar is opened.
        order: what the global batches are.
        reading: which part of them is ours, and how it is read.
        collate: makes the text tensors of a batch; called by one thread at a time.
        side: which examples of the stores; all by default.

    Attributes:
        stores: what each `store.json` says. fingerprints: of each store (of these shards), whatever its place.
        examples: those that epochs are made of, in the stores' own order; without those of the other side of a split.

    Raises:
        ValueError: if the settings contradict each other or the stores.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        columns: tuple[str, ...],
        order: Order,
        reading: Reading,
        collate: Collate,
        side: Side = EVERY,
    ) -> None:
        if order.global_batch_size % reading.world_size or reading.rank >= reading.world_size:
            raise ValueError(
                f"rank {reading.rank} of {reading.world_size} has no equal share of a global batch of "
                f"{order.global_batch_size} examples; choose a global batch size that the number of ranks divides"
            )
        self.order = order
        self._reading = reading
        self._share = order.share(reading.rank, reading.world_size)
        found = opened(sources, columns, order, side)
        self.stores, self.fingerprints, self.fingerprint = found.stores, found.fingerprints, found.fingerprint
        self._index, self.examples, self._split = found.index, found.examples, side.split
        self._length = batches_per_epoch(self.examples, order)
        self._caches = _caches(found, reading)
        self._check_room()
        rows = order.global_batch_size // reading.world_size
        tars = [_tars(*pair) for pair in zip(found.storages, self._caches, strict=True)]
        self._reader = Reader(tars, self._index, self.examples, rows, collate, reading)
        self._epoch = -1  # the epoch that the last iter() began
        self._handed_out = 0  # global batches of it that were yielded, those before a resume included
        self._resume: tuple[int, int] | None = None  # (epoch, batches) that the next iter() goes on from
        self._resumed_batches = 0
        self._running: weakref.ref[Generator[Batch, None, None]] | None = None  # weak: whoever iterates keeps it alive

    @property
    def data_wait(self) -> float:
        """Seconds that the consumer waited for the last batch."""
        return self._reader.data_wait

    def images(self) -> set[str]:
        """The names of the images of `examples`."""
        return set(self._index.images.take(np.unique(self.examples.sample[self.examples.has_image])).to_pylist())

    @property
    def global_batch_size(self) -> int:
        """Examples of all ranks together per batch."""
        return self.order.global_batch_size

    def __len__(self) -> int:
        """Global batches per epoch."""
        return self._length

    def due(self) -> list[tuple[int, int]]:
        """Of each store how many examples there are to learn from, and how many of them an epoch has."""
        return due_of(self.examples, self.order, len(self.stores))

    def filling(self) -> Bools:
        """Which rows of this rank's last batch of an epoch hold examples that an earlier row holds too, (B / R,)."""
        *before, last = self.epoch_batches(0)
        new = np.zeros(self.global_batch_size, dtype=bool)
        new[np.unique(last, return_index=True)[1]] = True
        return ~(new & ~np.isin(last, before))[self._share]

    def epoch_batches(self, epoch: int) -> Ints:
        """The order of an epoch: indices into `examples` of shape (batches, global_batch_size)."""
        return epoch_of(self.examples, self.order, epoch).batches

    def __iter__(self) -> Generator[Batch, None, None]:
        """Begin the next epoch (or the rest of one, after `load_state_dict`); ends an iteration still under way."""
        before = None if self._running is None else self._running()
        if before is not None:
            before.close()
        self._epoch, self._handed_out = self._resume or (self._epoch + 1, 0)
        self._resumed_batches, self._resume = self._handed_out, None
        running = self._batches()
        self._running = weakref.ref(running)
        return running

    def _batches(self) -> Generator[Batch, None, None]:
        """The rest of the epoch: from global batch `_handed_out` on, our share of each."""
        epoch = epoch_of(self.examples, self.order, self._epoch)
        every = epoch.batches  # (batches, global_batch_size)
        ahead = None
        if any(self._caches):
            ahead = Ahead(self._caches, self._uses(epoch), self._handed_out, DOWNLOADS)
        try:
            with contextlib.closing(self._reader.read(every[self._handed_out :, self._share])) as batches:
                for batch in batches:
                    # Counted first: what stands behind `yield` runs only when the next batch is asked for.
                    self._handed_out += 1
                    if ahead is not None:
                        ahead.at(self._handed_out - 1)
                    yield batch
        finally:
            if ahead is not None:
                ahead.close()

    def _uses(self, epoch: Epoch) -> list[Use]:
        """When each tar is needed by the global batches of an epoch: by the groups of examples that are partly ours.

        Without groups this is all of them, of which the ranks of a node fetch a part each.
        """
        part, mine = self.order.part, range(self.global_batch_size)[self._share]
        groups = slice(mine[0] // part * part, (mine[-1] // part + 1) * part)
        return tar_uses(self._index, epoch, groups, self._reading.prefetch)

    def _check_room(self) -> None:
        """Refuse an order that needs more tars at once than the cache may hold; the first epoch stands for all."""
        if not any(self._caches):
            return
        uses = self._uses(epoch_of(self.examples, self.order, 0))
        need = most_bytes_in_use([use for use in uses if self._caches[use.store] is not None])
        if need > self._reading.cache_bytes:
            raise ValueError(
                f"the cache may hold {self._reading.cache_gb:.3g} GB, but this order of examples uses tars of "
                f"{need / 1e9:.3g} GB at once, and would fetch them again and again; raise cache_gb, lower "
                f"window_shards (now {self.order.window_shards}), or leave out cache_dir to read by ranged requests"
            )

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """The position, in Composer's dataset-state protocol.

        Args:
            num_samples: examples of this epoch that all ranks together have consumed.
            from_beginning: False if `num_samples` counts from the last resume instead.

        The keys beside `epoch` and `samples` say which order this is a position of.
        """
        samples = num_samples + (0 if from_beginning else self._resumed_batches * self.global_batch_size)
        epoch = max(self._epoch, 0)
        # Between `load_state_dict` and the next `iter()`, the position is the one that was loaded.
        if self._resume is not None:
            epoch, batches = self._resume
            samples = samples or batches * self.global_batch_size
        elif samples == 0 and self._epoch >= 0 and self._handed_out == len(self):
            epoch += 1  # asked between two epochs
        split = {} if self._split is None else {"held_out": self._split.identity}
        return {"epoch": epoch, "samples": samples, "fingerprint": self.fingerprint, **self.order.identity(), **split}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state` at the next `iter()`; the number of ranks may differ from that of the saved run.

        Raises:
            ValueError: if the state belongs to another store or to another order, naming the differences.
        """
        place = ("epoch", "samples")
        # A key that only runs of another kind have is compared too: theirs against None.
        mine: dict[str, Any] = {**dict.fromkeys(("held_out", *NEW)), **self.state_dict(0, True)}
        mine = {name: value for name, value in mine.items() if name not in place}
        differing = differences(state, mine, "in the checkpoint")
        if differing:
            raise ValueError(
                "the checkpoint's position belongs to another order of examples, so going on from it would repeat "
                "some and skip others; restore these settings, or start a new run:\n  " + "\n  ".join(differing)
            )
        batches, rest = divmod(state["samples"], self.global_batch_size)
        if rest or not 0 <= batches <= len(self):
            raise ValueError(
                f"the checkpoint's position, {state['samples']} examples into an epoch, is no batch boundary of an "
                f"epoch of {len(self)} batches of {self.global_batch_size}; take another checkpoint, or start a new run"
            )
        self._resume = (state["epoch"], batches)


def _caches(found: Opened, reading: Reading) -> list[ShardCache | None]:
    """The node's cache of each store that is remote, if a folder is named; they share its bound."""
    caches = [
        None
        if reading.cache_dir is None or _is_local(storage)
        else ShardCache(storage, Path(reading.cache_dir), identity, reading.cache_bytes)
        for storage, identity in zip(found.storages, found.fingerprints, strict=True)
    ]
    beside = [cache for cache in caches if cache is not None]
    for cache in beside:
        cache.beside = beside
    return caches


def _tars(storage: Storage, cache: ShardCache | None) -> Tars:
    """Where members are read from: the cache, the disk, or by ranged requests."""
    if cache is not None:
        return FileTars(cache.open, storage.root)
    return local_tars(storage) if _is_local(storage) else RangeTars(storage)


def _is_local(storage: Storage) -> bool:
    return storage.local_path("store.json") is not None
