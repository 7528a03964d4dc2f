"""S3 as s3fs speaks it: the client, requests that are bounded in size and time, and what their errors mean."""

from __future__ import annotations

import asyncio
import errno
import io
from collections.abc import Callable
from typing import Any

ANSWERS_IN = 100  # s, a request, s3fs's quick retries included
SLOWEST = 100_000  # bytes/s, of what a request moves beside that
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "RequestExpired", "TokenRefreshRequired"}


def client() -> Any:
    """A new s3fs, which reads the credentials again."""
    import s3fs

    return s3fs.S3FileSystem(
        use_listings_cache=False,
        skip_instance_cache=True,
        default_block_size=16 * 2**20,
        config_kwargs={"connect_timeout": 10, "read_timeout": 20, "retries": {"max_attempts": 4}},
    )


def within(size: int = 0) -> float:
    """Seconds in which a request that moves `size` bytes has to end: one that drips would never meet a read timeout."""
    return ANSWERS_IN + size / SLOWEST


def late() -> str:
    """What is said of a request that did not end within its time."""
    return f"not done within {ANSWERS_IN} s and a second for each {SLOWEST // 1000} kB"


class RefusedError(Exception):
    """Holds what a caller's `check` raised: it is about the file, and nothing that S3 said."""


def get(fs: Any, key: str, check: Callable[[int], None] | None = None, **asked: str) -> bytes:
    """An object's bytes, or as much of a `Range` as there is, if `check` takes the length that is announced.

    Raises:
        RefusedError: if `check` raises a ValueError; of the object nothing more is read.
    """
    from fsspec.asyn import sync

    async def body() -> bytes:
        bucket, name, _ = fs.split_path(key)
        start = asyncio.get_running_loop().time()
        async with asyncio.timeout_at(start + within()) as bound:
            answer = await fs._call_s3("get_object", Bucket=bucket, Key=name, **asked)
            length = answer.get("ContentLength")  # None from a gateway that packs on the way
            bound.reschedule(start + within(length or 0))
            try:
                if check is not None and length is not None:
                    _ask(check, length)
                data: bytes = await answer["Body"].read()
                if check is not None and length is None:
                    _ask(check, len(data))
                return data
            finally:
                answer["Body"].close()

    try:
        found: bytes = sync(fs.loop, body)
    except OSError as error:
        if code_of(error) != "InvalidRange":  # the file ends before
            raise
        return b""
    return found


def _ask(check: Callable[[int], None], length: int) -> None:
    try:
        check(length)
    except ValueError as error:
        raise RefusedError(error) from error


class Ranges(io.RawIOBase):
    """A file of `size` bytes of which `read(offset, length)` gives any part."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._size, self._read, self._at = size, read, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to `offset` bytes from the start, the present place or the end. Raises OSError for a place before all."""
        place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if place < 0:
            raise OSError(errno.EINVAL, f"byte {place} of a file")
        self._at = place
        return place

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the file goes; how many bytes that are."""
        data = self._read(self._at, min(len(buffer), max(0, self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def code_of(error: Exception) -> str | None:
    """S3's own word for what went wrong."""
    code: str | None = (getattr(error.__cause__, "response", None) or {}).get("Error", {}).get("Code")
    return code


def is_expired(error: Exception, answered: bool) -> bool:
    """Whether new credentials would help; `answered`: there were some, as a request has succeeded."""
    from botocore.exceptions import NoCredentialsError

    return code_of(error) in _EXPIRED or (isinstance(error, NoCredentialsError) and answered)


def meaning(error: Exception, key: str, right: str) -> Exception | None:
    """What an error means for the file at `key`; None if the same request may succeed later.

    `right`: what the request needs, as S3 calls it, e.g. "s3:GetObject". What is no OSError becomes one: a ValueError,
    as of a wrong endpoint, would be taken for a fault of the file.
    """
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError, NoCredentialsError, ParamValidationError

    number, said = getattr(error, "errno", None) or errno.EIO, getattr(error, "strerror", None) or str(error)
    meant: Exception | None = OSError(errno.EIO, f"{type(error).__name__}: {said}: {key}")
    if isinstance(error, RefusedError):
        (meant,) = error.args
    elif isinstance(error, FileExistsError) or (number == errno.EINVAL and "precondition" in str(error).lower()):
        meant = FileExistsError(errno.EEXIST, said, key)  # EINVAL: how some servers word a failed If-None-Match
    elif isinstance(error, NoCredentialsError):
        said = f"no S3 credentials for {key}; set AWS_ACCESS_KEY_ID and its secret, or AWS_PROFILE"
        meant = PermissionError(errno.EACCES, said)
    elif isinstance(error, FileNotFoundError):
        meant = FileNotFoundError(errno.ENOENT, f"{said}: {key}")
    elif isinstance(error, PermissionError):
        also = ". S3 answers so (403) also for a key that is not there, where the credentials may not list the bucket"
        cure = f"{also}. Allow s3:GetObject, and s3:ListBucket to tell the two apart"
        meant = PermissionError(errno.EACCES, f"{said}: {key}{cure if right == 's3:GetObject' else f'; allow {right}'}")
    elif number == errno.ENAMETOOLONG:
        meant = OSError(number, f"{said}: {key}")
    elif isinstance(error, ParamValidationError):
        meant = OSError(errno.EINVAL, f"{' '.join(said.split())[:200]}: {key}; correct the address")
    elif isinstance(error, (OSError, BotoCoreError, ClientError)):
        meant = None  # ClientError: an answer that ends too early
    return meant
