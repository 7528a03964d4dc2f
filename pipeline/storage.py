"""The one door to bytes: a local folder or an S3 prefix, with files that appear whole or not at all.

S3 settings come from the environment that every S3 tool reads (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_PROFILE,
AWS_DEFAULT_REGION, ...); no credential passes through here. Uploads carry a checksum that the server compares.

An error is a fact of the data (`is_absent`), or of the moment: throttling, network, disk, file handles, credentials. On
S3, and in a local `read` or `read_range`, what is of the moment is tried again with growing pauses, then raised.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import logging
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from pipeline import bucket
from pipeline.regular import check_regular

log = logging.getLogger(__name__)

T = TypeVar("T")
SCRATCH = ".scratch"  # of a local store: files on their way in, on the same file system as their final place
SCRATCH_LASTS = 2 * 86400  # s; whether a process of another machine lives cannot be asked
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # said of a write, without a name
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV)  # FAT, some FUSE and network file systems
ATTEMPTS = 6  # of a request, beside s3fs's own quick retries; pauses of 1, 2, 4, 8 and 16 s, jittered
BUFFER = 2**20  # bytes read at a time of a file on S3 that is read in parts
GET, LIST, PUT, DELETE = "s3:GetObject", "s3:ListBucket", "s3:PutObject", "s3:DeleteObject"  # what a request needs
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}


def is_absent(error: OSError) -> bool:
    """Whether an error is a fact of the data: there is no file of that name, now or later. Others are of the moment."""
    return isinstance(error, FileNotFoundError) or error.errno in _ABSENT


class Storage:
    """Files below `root`, named by relative POSIX paths that cannot leave it.

    Raises:
        ValueError: for a root of an unknown scheme, or a name that would leave the root.
    """

    def __init__(self, root: str | Path) -> None:
        text = str(root)
        self.root = text.rstrip("/") or text
        if "://" in text and not text.startswith("s3://"):
            raise ValueError(f"{text!r} is of an unknown scheme; give a local folder or s3://bucket/prefix")
        if text.startswith("s3://") and not text[5:].partition("/")[0]:
            raise ValueError(f"{text!r} names no bucket; give s3://bucket/prefix")
        self._local = None if text.startswith("s3://") else Path(text)
        self._s3: Any = None
        self._answered = False  # whether a request has succeeded, in this process

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def __getstate__(self) -> str:
        """Only the root travels to other processes: connections stay in theirs."""
        return self.root

    def __setstate__(self, root: str) -> None:
        self.__init__(root)  # type: ignore[misc]

    def local_path(self, name: str) -> Path | None:
        """Where a file lies on the local disk; None on S3."""
        return None if self._local is None else self._local / _checked(name)

    def read(self, name: str, check: Callable[[int], None] | None = None) -> bytes:
        """The whole file, if `check` raises no ValueError of its length in bytes. Raises FileNotFoundError."""
        if self._local is not None:
            return self._retried(lambda _, path: _read_whole(path, check), name)
        return self._retried(lambda fs, key: bucket.get(fs, key, check), name)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on, fewer where the file ends."""
        if self._local is not None:
            return self._retried(lambda _, path: _read_range(path, offset, length), name)
        part = f"bytes={offset}-{offset + length - 1}"
        return self._retried(lambda fs, key: bucket.get(fs, key, Range=part), name) if length else b""

    def open(self, name: str) -> IO[bytes]:
        """A seekable file to read from."""
        if self._local is not None:
            check_regular(path := self._local / _checked(name))
            return path.open("rb")
        size = self.size(name)
        part = functools.partial(self.read_range, name)
        return io.BufferedReader(bucket.Ranges(size, part), BUFFER)

    def size(self, name: str) -> int:
        """Length in bytes. Raises FileNotFoundError."""
        if self._local is not None:
            return (self._local / _checked(name)).stat().st_size
        return int(self._retried(lambda fs, key: fs.info(key, timeout=bucket.within())["size"], name))

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def first(self, count: int) -> list[str]:
        """Names of the first `count` files below an S3 prefix."""
        return [name for name, _ in itertools.islice(self._listed("", count), count)]

    def list(self, prefix: str = "") -> dict[str, int]:
        """Names (relative to the root) and lengths of all files below `prefix`, sorted by name."""
        return _list_local(self._local, prefix) if self._local is not None else dict(sorted(self._listed(prefix)))

    def _listed(self, prefix: str, at_a_time: int = 1000) -> Iterator[tuple[str, int]]:
        """As `list`, of an S3 prefix, a request for each `at_a_time` of them."""
        place, _, below = f"{self._key(prefix)}/".removeprefix("s3://").partition("/")
        skip = len(self.root) - len("s3://") - len(place)  # of a key: up to the last slash of the root
        asked = {"Bucket": place, "Prefix": below, "MaxKeys": at_a_time}
        while True:
            page = self._retried(
                lambda fs, _: fs.call_s3("list_objects_v2", timeout=bucket.within(), **asked), prefix, LIST
            )
            entries = page.get("Contents", [])
            yield from ((entry["Key"][skip:], entry["Size"]) for entry in entries if not entry["Key"].endswith("/"))
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def download(self, name: str, target: Path) -> None:
        """Copy a file to the local path `target`, replacing it."""
        if self._local is not None:
            shutil.copyfile(self._local / _checked(name), target)
        else:
            bound = bucket.within(self.size(name))
            self._retried(lambda fs, key: fs.get_file(key, str(target), timeout=bound), name)

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """The file as a local path to read from: itself, or a copy that lasts as long as the context."""
        local = self.local_path(name)
        if local is not None:
            yield local
            return
        with self.scratch() as folder:
            self.download(name, folder / "file")
            yield folder / "file"

    def publish(self, name: str, source: Path) -> bool:
        """Make the finished local file `source` appear as `name`, whole and only if nothing has that name yet.

        Local stores link it (the source must be in `scratch`), S3 uploads with If-None-Match. Returns False, and
        changes nothing, if the name is taken: perhaps by an upload of ours whose answer was lost.
        """
        if self._local is not None:
            return _link(source, self._local / _checked(name))
        bound = bucket.within(source.stat().st_size)
        try:
            self._retried(lambda fs, key: fs.put_file(str(source), key, mode="create", timeout=bound), name, PUT)
        except FileExistsError:
            return False
        if self.size(name) != source.stat().st_size:
            raise OSError(
                errno.EIO,
                f"{self._key(name)} arrived with {self.size(name)} bytes of {source.stat().st_size}; delete it and run "
                "the same command again",
            )
        return True

    def publish_bytes(self, name: str, data: bytes) -> bool:
        """As `publish`, for bytes in memory."""
        with self.scratch() as folder:
            path = folder / "file"
            path.write_bytes(data)
            return self.publish(name, path)

    def replace(self, name: str, data: bytes) -> None:
        """Write a file whole, over an older one if need be: for what is derived from the rest."""
        if self._local is None:
            self._retried(lambda fs, key: fs.pipe_file(key, data, timeout=bucket.within(len(data))), name, PUT)
            return
        with self.scratch() as folder:
            path = folder / "file"
            path.write_bytes(data)
            sync(path)
            target = self._local / _checked(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
            sync(target.parent)

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""
        if self._local is not None:
            (self._local / _checked(name)).unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError):
            self._retried(lambda fs, key: fs.rm_file(key, timeout=bucket.within()), name, DELETE)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A temporary folder from which `publish` works, removed at the end.

        Raises:
            OSError: naming the folder, where the system says only that a disk is full.
        """
        if self._local is None:
            with tempfile.TemporaryDirectory(prefix="feature-store-") as name, _naming(Path(name)):
                yield Path(name)
            return
        folder = self._local / SCRATCH / f"{_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        for left in reversed(range(100)):  # tries: one in a hundred fails beside a process that does nothing else
            try:
                folder.mkdir(parents=True)
                break
            except (FileNotFoundError, FileExistsError):  # another process has just removed the empty SCRATCH
                if not left:
                    raise
        try:
            with _naming(folder):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # others still work in it
                folder.parent.rmdir()

    def sweep_scratch(self) -> None:
        """Remove what killed processes left in the scratch folder of a local store; other machines' after two days.

        Their age is counted by the clock of the file system, which stamps all folders: that of a new one tells the
        time there. The clock of this machine may be years off.
        """
        if self._local is None or not (self._local / SCRATCH).is_dir():
            return
        with self.scratch() as new:
            present = new.stat().st_mtime
            for folder in (self._local / SCRATCH).iterdir():
                host, _, pid = folder.name.rpartition(".")[0].rpartition(".")  # of host.pid.random
                with contextlib.suppress(FileNotFoundError):  # its process has just removed it
                    here = host == _host() and pid.isdigit()
                    if not _alive(int(pid)) if here else folder.stat().st_mtime < present - SCRATCH_LASTS:
                        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: others work in it
            (self._local / SCRATCH).rmdir()

    def _key(self, name: str) -> str:
        """The whole address of a name; of the root for none."""
        if self._local is not None:
            return str(self._local / _checked(name))
        return f"{self.root}/{_checked(name)}" if name else self.root

    def _retried(self, call: Callable[[Any, str], T], name: str, right: str = GET) -> T:
        """Run `call(filesystem, key)`, on a local store `call(None, path)`, again after a pause while that may help."""
        key = self._key(name)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                result = call(self._filesystem(), key)
            except Exception as error:
                if expired := self._local is None and bucket.is_expired(error, self._answered):
                    self._s3 = None  # a new client reads the credentials again
                meant = bucket.meaning(error, key, right) if self._local is None else _local_error(error)
                final = None if expired else meant
                if final is error:
                    raise
                if final is not None:
                    raise final from error
                said = str(error) or (bucket.late() if isinstance(error, TimeoutError) else type(error).__name__)
                if attempt == ATTEMPTS:
                    number = getattr(error, "errno", None) or errno.EIO
                    said = f"{said} ({ATTEMPTS} attempts): {key}; run again when that is mended"
                    raise OSError(number, said) from error
                log.warning("%s: %s (attempt %d of %d)", key, said, attempt, ATTEMPTS)
                time.sleep(2 ** (attempt - 1) * random.uniform(0.5, 1.0))
            else:
                self._answered = True
                return result
        raise AssertionError("the last attempt returns or raises")

    def _filesystem(self) -> Any:
        """s3fs, made on first use in this process; None for a local store."""
        if self._local is not None:
            return None
        fs = self._s3  # another thread may take it away
        if fs is None:
            fs = self._s3 = bucket.client()
        return fs


def _local_error(error: Exception) -> Exception | None:
    """The error itself, or None if the same call may succeed later: open files, a disk that does not answer."""
    lasting = not isinstance(error, OSError) or is_absent(error) or isinstance(error, PermissionError)
    return error if lasting else None


def _read_whole(path: str, check: Callable[[int], None] | None) -> bytes:
    """A local file, if `check` allows its length."""
    check_regular(path)
    with Path(path).open("rb") as file:
        if check is not None:
            check(os.fstat(file.fileno()).st_size)
        return file.read()


def _read_range(path: str, offset: int, length: int) -> bytes:
    """`length` bytes of a local file from `offset` on, fewer where it ends."""
    with Path(path).open("rb") as file:
        return os.pread(file.fileno(), length, offset)


def _checked(name: str) -> str:
    """`name`, if it cannot lead out of the folder that it is relative to; else a ValueError."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not a relative path within its folder; expected one such as samples/00000.tar")
    return str(path)


def _list_local(root: Path, prefix: str) -> dict[str, int]:
    """As `Storage.list`, of a local folder; the scratch folder is not part of it."""
    top = root / _checked(prefix) if prefix else root
    found = {}
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if name != SCRATCH]
        for name in files:
            path = Path(folder) / name
            with contextlib.suppress(FileNotFoundError):  # a link without content, or just removed
                found[path.relative_to(root).as_posix()] = path.stat().st_size
    return dict(sorted(found.items()))


def _link(source: Path, target: Path) -> bool:
    """Give a file its final name: a hard link appears at once, and is refused where the name is taken (False)."""
    sync(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}: the file system of {target} has no hard links, by which a file of a store appears "
            "whole and only once; put the store on another file system, or on S3",
        ) from error
    sync(target.parent)
    return True


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Errors that name no file, as a write to a full disk, name the folder."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in NO_ROOM:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise


def _host() -> str:
    """This machine; containers that share its name but not its process numbers are others."""
    try:
        return f"{os.uname().nodename}-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # no /proc: macOS
        return os.uname().nodename


def _alive(pid: int) -> bool:
    """Whether a process of this machine runs, whoever owns it: signal 0 is not delivered, only checked."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
