"""Fetches a remote store's tars into the cache before the reader needs them, as far ahead as there is room."""

from __future__ import annotations

import heapq
import logging
import tarfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.schema import SAMPLES, tar_path
from training.stream.cache import ShardCache
from training.stream.index import Index
from training.stream.order import Examples, Ints, use_of_shards

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Use:
    """A tar of the coming epoch: its bytes, and the first and last global batch that needs it."""

    name: str
    bytes: int
    first: int
    last: int


def tar_uses(index: Index, examples: Examples, batches: Ints, prefetch: int) -> list[Use]:
    """Every tar that an epoch needs, and from when to when.

    Args:
        batches: example indices (batches, global batch size).
        prefetch: the reader is up to this many batches ahead of the trainer, so a tar is needed that much earlier.
    """
    uses = []
    for name in index.offsets:
        # Bytes of each shard's tar of this column, (shards,): where its last member ends, and room for the archive's
        # own end, which no member's place tells. The manifest says no more; commit records would be a request each.
        size = np.zeros(int(index.shard.max()) + 1, dtype=np.int64)
        np.maximum.at(size, index.shard, index.offsets[name] + index.sizes[name])
        size += tarfile.RECORDSIZE
        # A text-only example needs its record, and no feature column.
        first, last = use_of_shards(batches, examples, images=name != SAMPLES)
        uses += [
            Use(tar_path(name, shard), int(size[shard]), max(0, int(first[shard]) - prefetch), int(last[shard]))
            for shard in np.flatnonzero(last >= 0).tolist()
        ]
    return uses


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
    """

    def __init__(self, cache: ShardCache, uses: Sequence[Use], start: int, threads: int) -> None:
        self._cache = cache
        self._uses = sorted((use for use in uses if use.last >= start), key=lambda use: (use.first, use.name))
        self._next = 0  # of `_uses`: the first that nobody has taken
        self._held: list[tuple[int, int, str]] = []  # heap of (last batch, bytes, name) of what was taken
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
        self._cache.needed.clear()

    def _take(self) -> Use | None:
        """The next tar to fetch, as soon as there is room for it; None at the end of the epoch, or after `close`."""
        with self._changed:
            while not self._stop and self._next < len(self._uses):
                use = self._uses[self._next]
                # Let go of the tars whose last batch the trainer has passed.
                while self._held and self._held[0][0] < self._batch:
                    _, size, name = heapq.heappop(self._held)
                    self._held_bytes -= size
                    self._cache.needed.discard(name)
                # What the reader waits for is fetched whatever is held: else it would wait for ever.
                if self._held_bytes + use.bytes <= self._cache.max_bytes or use.first <= self._batch:
                    self._next += 1
                    self._held_bytes += use.bytes
                    heapq.heappush(self._held, (use.last, use.bytes, use.name))
                    self._cache.needed.add(use.name)
                    return use
                self._changed.wait()
            return None

    def _run(self) -> None:
        """In a thread: fetch one tar after another. One that another rank is fetching is left to it (`wait=False`)."""
        while (use := self._take()) is not None:
            try:
                self._cache.fetch(use.name, wait=False)
            except (OSError, ValueError) as error:
                # The reader that needs the tar tries again, and its error reaches the trainer.
                log.warning("fetching %s ahead failed: %s", use.name, error)
