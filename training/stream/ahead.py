"""Fetches a remote store's tars into the cache before the reader needs them, as far ahead as there is room."""

from __future__ import annotations

import heapq
import logging
import tarfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.schema import SAMPLES, tar_path
from training.stream.cache import ShardCache
from training.stream.index import Index
from training.stream.measures import use_of_shards
from training.stream.order import Epoch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Use:
    """A tar of the coming epoch: its bytes, the first and last global batch that needs it, and its store's number."""

    name: str
    bytes: int
    first: int
    last: int
    store: int = 0


def tar_uses(index: Index, epoch: Epoch, columns: slice, prefetch: int) -> list[Use]:
    """Every tar that an epoch needs, and from when to when.

    Args:
        columns: the positions of a global batch that count.
        prefetch: the reader is up to this many batches ahead of the trainer, so a tar is needed that much earlier.
    """
    examples, batches = epoch.examples, epoch.rows[:, columns]
    # A shard that comes again in an epoch has another number there, and its tars are needed another time. Of each such
    # number: the shard's real one.
    numbers, some = np.unique(examples.shard, return_index=True)
    shards = index.shard[examples.sample[some]].tolist()
    uses = []
    for name in index.offsets:
        # Bytes of each shard's tar of this column, (shards,): where its last member ends, and room for the archive's
        # own end, which no member's place tells. The manifest says no more; commit records would be a request each.
        size = np.zeros(int(index.shard.max()) + 1, dtype=np.int64)
        np.maximum.at(size, index.shard, index.offsets[name] + index.sizes[name])
        size += tarfile.RECORDSIZE
        # A text-only example needs its record, and no feature column.
        first, last = use_of_shards(batches, examples, images=name != SAMPLES)
        for number, shard in zip(numbers.tolist(), shards, strict=True):
            if last[number] >= 0:
                store, local = index.place(shard)
                start = max(0, int(first[number]) - prefetch)
                uses.append(Use(tar_path(name, local), int(size[shard]), start, int(last[number]), store))
    return _merged(uses)


def _merged(uses: list[Use]) -> list[Use]:
    """Uses of one tar that overlap are one use."""
    found: list[Use] = []
    for use in sorted(uses, key=lambda use: (use.store, use.name, use.first)):
        if found and (found[-1].store, found[-1].name) == (use.store, use.name) and use.first <= found[-1].last:
            found[-1] = replace(found[-1], last=max(found[-1].last, use.last))
        else:
            found.append(use)
    return found


def most_bytes_in_use(uses: Sequence[Use]) -> int:
    """The most bytes that are needed at one moment of the epoch."""
    # Add a tar's bytes where it begins to be needed and take them off behind its last batch: the largest running sum.
    changes: dict[int, int] = {}  # batch -> bytes
    for use in uses:
        changes[use.first] = changes.get(use.first, 0) + use.bytes
        changes[use.last + 1] = changes.get(use.last + 1, 0) - use.bytes
    most = now = 0
    for batch in sorted(changes):
        now += changes[batch]
        most = max(most, now)
    return most


class Ahead:
    """Fetches the tars of an epoch in the order of their first use, as far ahead as the cache has room.

    Room is what is left beside the tars that are in use: those are never pushed out by what is fetched ahead. All ranks
    of a node run one; an object that another rank is fetching is passed over, so they share the work.

    Args:
        caches: of each store; None for one that needs none, as it lies on a disk.
    """

    def __init__(self, caches: Sequence[ShardCache | None], uses: Sequence[Use], start: int, threads: int) -> None:
        self._caches = caches
        self._max_bytes = max(cache.max_bytes for cache in caches if cache is not None)
        wanted = (use for use in uses if use.last >= start and caches[use.store] is not None)
        self._uses = sorted(wanted, key=lambda use: (use.first, use.name, use.store))
        self._next = 0  # of `_uses`: the first that nobody has taken
        self._held: list[tuple[int, int, str, int]] = []  # heap of (last batch, bytes, name, store) of what was taken
        self._held_bytes = 0
        self._batch = start  # where the trainer is
        self._stop = False
        self._changed = threading.Condition()  # guards all of the above
        self._threads = [threading.Thread(target=self._run, name=f"ahead-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def at(self, batch: int) -> None:
        """The trainer has come to this global batch."""
        with self._changed:
            self._batch = batch
            self._changed.notify_all()

    def close(self) -> None:
        """Stop after the downloads under way."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for cache in self._caches:
            if cache is not None:
                cache.needed.clear()

    def _of(self, store: int) -> ShardCache:
        cache = self._caches[store]
        assert cache is not None, "only what a cache holds is fetched"
        return cache

    def _take(self) -> Use | None:
        """The next tar to fetch, as soon as there is room for it; None at the end of the epoch, or after `close`."""
        with self._changed:
            while not self._stop and self._next < len(self._uses):
                use = self._uses[self._next]
                # Let go of the tars whose last batch the trainer has passed.
                while self._held and self._held[0][0] < self._batch:
                    _, size, name, store = heapq.heappop(self._held)
                    self._held_bytes -= size
                    self._of(store).needed.discard(name)
                # What the reader waits for is fetched whatever is held: else it would wait for ever.
                if self._held_bytes + use.bytes <= self._max_bytes or use.first <= self._batch:
                    self._next += 1
                    self._held_bytes += use.bytes
                    heapq.heappush(self._held, (use.last, use.bytes, use.name, use.store))
                    self._of(use.store).needed.add(use.name)
                    return use
                self._changed.wait()
            return None

    def _run(self) -> None:
        """In a thread: fetch one tar after another. One that another rank is fetching is left to it (`wait=False`)."""
        while (use := self._take()) is not None:
            try:
                self._of(use.store).fetch(use.name, wait=False)
            except (OSError, ValueError) as error:
                # The reader that needs the tar tries again, and its error reaches the trainer.
                log.warning("fetching %s ahead failed: %s", use.name, error)
