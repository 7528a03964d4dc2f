"""A node's cache of remote tars: each object is fetched once per node, whole, checked, and never seen half-written.

    <folder>/<store>/block03/00007.tar        a complete, checked object
    <folder>/<store>/block03/00007.tar.part   on its way
    <folder>/<store>/block03/00007.tar.lock   held (flock) by who fetches it; holds the bytes it has reserved
    <folder>/room.lock                        held while room is made

Locks are the kernel's, so those of a killed process are free at once; what it left behind is swept by the next one
that needs room. The bound is over the whole folder. The objects that came first go first, except that those which the
epoch still needs are spared while others are left. The folder must be on a disk of the node, not on NFS.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import heapq
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.schema import Commit, commit_path
from pipeline.storage import Storage, sync

log = logging.getLogger(__name__)


class ShardCache:
    """Opens tars of a remote store through `folder`, fetching what is not there.

    Args:
        storage: the remote store. identity: names the store within the folder (its fingerprint).
        max_bytes: most bytes of the whole folder; None for no bound.
    """

    def __init__(self, storage: Storage, folder: Path, identity: str, max_bytes: int | None) -> None:
        self.storage = storage
        self.folder = folder
        self.root = folder / identity[:16]
        self.max_bytes = max_bytes
        self.needed: set[str] = set()  # fetched ahead or in use: evicted last
        self._commits: dict[str, Commit] = {}

    def open(self, name: str) -> int:
        """A descriptor of the tar `name`, fetched first if needed; it stays readable even if the tar is evicted.

        Raises:
            ValueError: if the object's bytes are wrong twice, or one object is larger than the cache.
            OSError: if it cannot be fetched.
        """
        while True:
            try:
                return os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.fetch(name, wait=True)

    def fetch(self, name: str, wait: bool) -> None:
        """Make sure that `name` is here; without `wait`, leave it to whoever is fetching it already."""
        path = self.root / name
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock"), wait) as lock:
            if lock is None or path.exists():
                return
            os.ftruncate(lock, 0)  # a reservation that a killed process left
            size, sha256 = self._expected(name)
            self._make_room(lock, size, name)
            try:
                self._download(name, path, size, sha256)
            finally:
                os.ftruncate(lock, 0)  # the object counts by itself from now on

    def _expected(self, name: str) -> tuple[int, str]:
        """Bytes and checksum from the commit record of the tar's shard, or of the column if it was added later."""
        column, _, file = name.partition("/")
        shard = int(file.removesuffix(".tar"))
        for path in (commit_path(shard), commit_path(shard, column)):
            if path not in self._commits:
                self._commits[path] = Commit.model_validate_json(self.storage.read(path))
            if column in self._commits[path].files:
                break
        return self._commits[path].files[column].bytes, self._commits[path].files[column].sha256

    def _download(self, name: str, path: Path, size: int, sha256: str) -> None:
        part = path.with_name(path.name + ".part")
        found = ""
        for attempt in (1, 2):
            self.storage.download(name, part)
            with part.open("rb") as file:
                found = _sha256(file.fileno())
                if found == sha256:
                    os.fsync(file.fileno())
                    part.rename(path)
                    sync(path.parent)
                    return
            log.warning("%s came with wrong bytes (attempt %d of 2)", name, attempt)
        got = part.stat().st_size
        part.unlink()
        raise ValueError(
            f"{name} came twice with wrong bytes ({got} bytes, sha256 {found[:16]}...; its commit record says {size} "
            f"bytes, {sha256[:16]}...): the object in the store is damaged; rebuild that shard with "
            "pipeline/build_shards.py, or look for a broken proxy on the way"
        )

    def _make_room(self, lock: int, size: int, name: str) -> None:
        """Reserve `size` bytes, evicting the oldest objects first."""
        if self.max_bytes is not None and size > self.max_bytes:
            raise ValueError(f"{name} has {size} bytes, the whole cache may hold {self.max_bytes}; raise cache_bytes")
        with _locked(self.folder / "room.lock", wait=True):
            reserved = _reservations(self.folder)
            os.pwrite(lock, str(size).encode(), 0)
            if self.max_bytes is None:
                return
            objects: list[tuple[bool, int, int, Path]] = []
            needed = {self.root / other for other in self.needed.copy()}
            for path in self.folder.glob("*/*/*.tar"):
                with contextlib.suppress(FileNotFoundError):  # replaced or removed by hand since it was listed
                    status = path.stat()
                    objects.append((path in needed, status.st_mtime_ns, status.st_size, path))
            # What was just fetched is there while its reservation still stands: it counts once.
            there = {path for *_, path in objects}
            total = size + sum(length for *_, length, _ in objects)
            total += sum(length for path, length in reserved.items() if path not in there)
            for *_, length, path in sorted(objects):
                if total <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= length


def _reservations(folder: Path) -> dict[Path, int]:
    """The objects that live processes are fetching, and the bytes reserved for each; what dead ones left is removed."""
    reserved: dict[Path, int] = {}
    for path in folder.glob("*/*/*.lock"):
        if not path.stat().st_size:
            continue
        with _locked(path, wait=False) as lock:
            if lock is None:
                reserved[path.with_name(path.name.removesuffix(".lock"))] = int(path.read_text() or 0)
            else:
                path.with_name(path.name.removesuffix(".lock") + ".part").unlink(missing_ok=True)
                os.ftruncate(lock, 0)
    return reserved


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[int | None]:
    """Hold the lock file `path`; yields its descriptor, or None if it is held by another and we do not wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)  # and with it the lock


def _sha256(descriptor: int) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(1 << 20)
    offset = 0
    while got := os.preadv(descriptor, [buffer], offset):
        digest.update(memoryview(buffer)[:got])
        offset += got
    return digest.hexdigest()


@dataclass(frozen=True)
class Use:
    """A tar of the coming epoch: its bytes, and the first and last global batch that needs it."""

    name: str
    bytes: int
    first: int
    last: int


class Ahead:
    """Fetches the tars of an epoch in the order of their first use, as far ahead as the cache has room.

    Room is what is left beside the tars that are in use: those are never pushed out by what is fetched ahead. All ranks
    of a node run one; an object that another rank is fetching is passed over, so they share the work.
    """

    def __init__(self, cache: ShardCache, uses: Sequence[Use], start: int, threads: int) -> None:
        self._cache = cache
        self._uses = sorted((use for use in uses if use.last >= start), key=lambda use: (use.first, use.name))
        self._next = 0
        self._held: list[tuple[int, int, str]] = []  # heap of (last batch, bytes, name) of what was taken
        self._held_bytes = 0
        self._batch = start
        self._stop = False
        self._changed = threading.Condition()
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
        with self._changed:
            while not self._stop and self._next < len(self._uses):
                use = self._uses[self._next]
                while self._held and self._held[0][0] < self._batch:
                    _, size, name = heapq.heappop(self._held)
                    self._held_bytes -= size
                    self._cache.needed.discard(name)
                limit = self._cache.max_bytes
                if limit is None or self._held_bytes + use.bytes <= limit or use.first <= self._batch:
                    self._next += 1
                    self._held_bytes += use.bytes
                    heapq.heappush(self._held, (use.last, use.bytes, use.name))
                    self._cache.needed.add(use.name)
                    return use
                self._changed.wait()
            return None

    def _run(self) -> None:
        while (use := self._take()) is not None:
            try:
                self._cache.fetch(use.name, wait=False)
            except (OSError, ValueError) as error:
                # The reader that needs the tar tries again, and its error reaches the trainer.
                log.warning("fetching %s ahead failed: %s", use.name, error)


def most_bytes_in_use(uses: Sequence[Use]) -> int:
    """The most bytes that are needed at one moment of the epoch."""
    steps: dict[int, int] = {}
    for use in uses:
        steps[use.first] = steps.get(use.first, 0) + use.bytes
        steps[use.last + 1] = steps.get(use.last + 1, 0) - use.bytes
    most = now = 0
    for batch in sorted(steps):
        now += steps[batch]
        most = max(most, now)
    return most
