"""A node's cache of remote tars: each object is fetched once per node, whole, checked, and never seen half-written.

    <folder>/<store>/block03/00007.tar        a complete, checked object
    <folder>/<store>/block03/00007.tar.part   on its way
    <folder>/<store>/block03/00007.tar.lock   held (flock) by who fetches it; holds the bytes it has reserved
    <folder>/room.lock                        held while room is made

Locks are the kernel's, so those of a killed process are free at once; the next process that needs room sweeps what it
left behind. The folder must be on a disk of the node, not on NFS.

The bound is over the whole folder, for all processes together:

    bytes of the complete objects + bytes reserved for those on their way <= max_bytes

Whoever fetches an object reserves its bytes before, under room.lock. To make room for them, a process evicts objects
that it neither uses nor has fetched ahead, then the others; the oldest of each kind goes first. Only complete objects
are evicted: a cache that is smaller than what is on its way at one moment exceeds its bound.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.schema import Commit, commit_path
from pipeline.storage import Storage, sync

log = logging.getLogger(__name__)


class ShardCache:
    """Opens tars of a remote store through `folder`, fetching what is not there.

    Args:
        storage: the remote store. identity: names the store within the folder (its fingerprint).
        max_bytes: most bytes of the whole folder.
    """

    def __init__(self, storage: Storage, folder: Path, identity: str, max_bytes: int) -> None:
        self.storage = storage
        self.folder = folder
        self.root = folder / identity[:16]
        self.max_bytes = max_bytes
        self.needed: set[str] = set()  # fetched ahead or in use: evicted last
        self.beside: list[ShardCache] = [self]  # those of all stores that a stream reads: what they need stays as well
        self._commits: dict[str, Commit] = {}

    def open(self, name: str) -> int:
        """A descriptor of the tar `name`, fetched first if needed; it stays readable even if the tar is evicted.

        Raises:
            ValueError: if the object's bytes are wrong twice, or one object is larger than the cache.
            OSError: if it cannot be fetched.
        """
        # Open first: most tars are there. One that was fetched may be evicted before it is opened, so try again then.
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
        # The lock of the object keeps every other process of the node from fetching it too.
        with _locked(path.with_name(path.name + ".lock"), wait) as lock:
            if lock is None or path.exists():  # being fetched, or fetched while we waited for the lock
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
        column, _, file = name.partition("/")  # block03/00007.tar
        shard = int(file.removesuffix(".tar"))
        # A column of the first build stands in the shard's own record, one added later in a record beside it.
        for path in (commit_path(shard), commit_path(shard, column)):
            if path not in self._commits:
                self._commits[path] = Commit.model_validate_json(self.storage.read(path))
            if column in self._commits[path].files:
                break
        return self._commits[path].files[column].bytes, self._commits[path].files[column].sha256

    def _download(self, name: str, path: Path, size: int, sha256: str) -> None:
        """Fetch the object beside `path` and rename it once it is whole: nobody sees half of it."""
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
            f"{name} of {self.storage.root} came twice with wrong bytes ({got} bytes, sha256 {found[:16]}...; its "
            f"commit record says {size} bytes, {sha256[:16]}...): the object in the store is damaged; rebuild that "
            "shard with pipeline/build_shards.py, or look for a broken proxy on the way"
        )

    def _make_room(self, lock: int, size: int, name: str) -> None:
        """Reserve `size` bytes for `name` in its lock file, and evict objects until they fit."""
        if size > self.max_bytes:
            raise ValueError(f"{name} has {size} bytes, the whole cache may hold {self.max_bytes}; raise cache_gb")
        with _locked(self.folder / "room.lock", wait=True):
            reserved = _reservations(self.folder)  # of others: ours is written next
            os.pwrite(lock, str(size).encode(), 0)
            objects = self._objects()
            # What the folder holds once ours is here: its bytes, the complete objects, and those on their way.
            there = {path for *_, path in objects}
            total = size + sum(length for *_, length, _ in objects)
            # An object that was renamed just now is there while its reservation still stands: it counts once.
            total += sum(length for path, length in reserved.items() if path not in there)
            for *_, length, path in sorted(objects):  # first what nobody needs, of that the oldest
                if total <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)  # who has it open reads on
                total -= length

    def _objects(self) -> list[tuple[bool, int, int, Path]]:
        """The complete objects, as (is needed, time it came, bytes, path): sorted, the first is evicted first."""
        objects = []
        # Copies, as other threads add to them.
        needed = {cache.root / name for cache in self.beside for name in cache.needed.copy()}
        for path in self.folder.glob("*/*/*.tar"):
            with contextlib.suppress(FileNotFoundError):  # replaced or removed by hand since it was listed
                status = path.stat()
                objects.append((path in needed, status.st_mtime_ns, status.st_size, path))
        return objects


def _reservations(folder: Path) -> dict[Path, int]:
    """The objects that live processes are fetching, and the bytes reserved for each.

    A lock file with a number in it is a reservation. If its lock is free, the process that wrote it is dead: the number
    and the half object beside it are removed.
    """
    reserved: dict[Path, int] = {}
    for path in folder.glob("*/*/*.lock"):
        if not path.stat().st_size:
            continue
        with _locked(path, wait=False) as lock:
            if lock is None:  # held: its owner is alive. It may have let go of the bytes since we looked (0)
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
    """Checksum of an open file from its beginning; its position is neither used nor moved."""
    digest = hashlib.sha256()
    buffer = bytearray(1 << 20)
    offset = 0
    while got := os.preadv(descriptor, [buffer], offset):
        digest.update(memoryview(buffer)[:got])
        offset += got
    return digest.hexdigest()
