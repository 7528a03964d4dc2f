"""Bytes of tar members, from wherever the store is: a local disk, the node's cache, or ranged requests to S3."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from pipeline.storage import Storage

OPEN_FILES = 256  # descriptors kept open: a window of shards times the columns, well below the usual limit of 1024


class Tars(Protocol):
    """Where members are read from; every method may be called from many threads."""

    def read_into(self, name: str, offset: int, target: memoryview) -> None:
        """Fill `target` (bytes) from the file `name` of the store, starting at `offset`."""


class FileTars:
    """Reads tars on a disk, with positioned reads; the tars that were read last stay open.

    Args:
        open_tar: from a tar's name to a file descriptor, which is closed here.
        store: the place of the store, for messages.
    """

    def __init__(self, open_tar: Callable[[str], int], store: str) -> None:
        self._open_tar, self._store = open_tar, store
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, name: str, offset: int, target: memoryview) -> None:
        """Fill `target` straight from the page cache or the disk: no copy in between.

        Raises:
            ValueError: if the tar ends before `target` is full.
        """
        file = self._file(name)
        done = 0
        while done < len(target):  # a read may end early
            got = os.preadv(file.descriptor, [target[done:]], offset + done)
            if got == 0:
                raise ValueError(
                    f"{name} of {self._store} ends at byte {offset + done}, but the store's manifest places "
                    f"{len(target)} bytes at {offset}: the tar is truncated or not of this store; run "
                    "pipeline/verify_shards.py on the store"
                )
            done += got

    def _file(self, name: str) -> _File:
        """The open tar. Two threads may open the same one at once: the later descriptor stays, the other closes."""
        with self._lock:
            file = self._files.get(name)
            if file is not None:
                self._files.move_to_end(name)
                return file
        file = _File(self._open_tar(name))  # outside the lock: it may wait for a download
        with self._lock:
            # The cache may have unlinked tars that are open here. They take room on the disk until they are closed.
            for evicted in [key for key, other in self._files.items() if os.fstat(other.descriptor).st_nlink == 0]:
                del self._files[evicted]
            self._files[name] = file
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return file


class _File:
    """A descriptor that closes when the last reference goes: a thread may still read what `_files` has dropped."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class RangeTars:
    """Reads members of a remote store with one ranged request each: nothing is kept, nothing unneeded is fetched."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def read_into(self, name: str, offset: int, target: memoryview) -> None:
        """Fill `target` by one request.

        Raises:
            ValueError: if the object is shorter than the manifest says.
        """
        data = self._storage.read_range(name, offset, len(target))
        if len(data) != len(target):
            raise ValueError(
                f"{name} of {self._storage.root}: {len(data)} bytes came for {len(target)} asked at {offset}; the "
                "object is shorter than the store's manifest says: run pipeline/verify_shards.py on the store"
            )
        target[:] = data


def local_tars(storage: Storage) -> FileTars:
    """The tars of a store on a local disk."""

    def open_tar(name: str) -> int:
        path = storage.local_path(name)
        assert path is not None, "a local store has paths"
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    return FileTars(open_tar, storage.root)
