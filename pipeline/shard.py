"""Writing and reading one tar: a plain ustar archive whose bytes depend only on its members."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from pipeline.schema import ColumnFile, Sample, first_fault

HASHES_AHEAD = 8  # members that wait for their checksum, at most: they stay in memory until then

Payload = bytes | npt.NDArray[np.uint8]


class TarWriter:
    """Writes members one after another and knows where each one's payload starts.

    The checksum is computed by a second thread, beside the writing: payloads must not change until `close`.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._end = 0
        self._payload_at = 0
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._hashing: deque[Future[None]] = deque()
        self.offsets: list[int] = []
        self.sizes: list[int] = []

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hasher.shutdown(wait=True, cancel_futures=kind is not None)
        self._file.close()

    def add(self, name: str, payload: Payload) -> None:
        """Append a sample's member; a name of up to 100 bytes, as ustar has it."""
        self.attach(name, payload)
        self.offsets.append(self._payload_at)
        self.sizes.append(len(payload))

    def attach(self, name: str, payload: Payload) -> None:
        """Append a further member of the sample, which the index does not list."""
        size = len(payload)
        data = payload if isinstance(payload, bytes) else payload.data
        info = tarfile.TarInfo(name)
        info.size = size
        header = info.tobuf(tarfile.USTAR_FORMAT)
        self._payload_at = self._end + len(header)
        self._write([header, data, bytes(-size % tarfile.BLOCKSIZE)])  # zeros up to the next block of 512 bytes

    def skip(self) -> None:
        """Note a sample that has no member in this tar."""
        self.offsets.append(-1)
        self.sizes.append(0)

    def finish(self) -> ColumnFile:
        """Write the end of the archive; returns what a commit record says of the file."""
        end = 2 * tarfile.BLOCKSIZE  # two blocks of zeros, then zeros up to a whole record of 20 blocks
        self._write([bytes(end + -(self._end + end) % tarfile.RECORDSIZE)])
        while self._hashing:
            self._hashing.popleft().result()
        return ColumnFile(
            bytes=self._end, sha256=self._digest.hexdigest(), offsets=tuple(self.offsets), sizes=tuple(self.sizes)
        )

    def _write(self, parts: list[bytes | memoryview]) -> None:
        """Append `parts` in one system call, without copying them, and hand them to the thread that hashes."""
        total = sum(len(part) for part in parts)
        written = os.writev(self._file.fileno(), parts)
        if written != total:  # a full disk, or a size beyond one call
            rest = b"".join(bytes(part) for part in parts)[written:]
            while rest:
                rest = rest[os.write(self._file.fileno(), rest) :]
        self._end += total
        self._hashing.append(self._hasher.submit(self._update, parts))
        if len(self._hashing) > HASHES_AHEAD:
            self._hashing.popleft().result()

    def _update(self, parts: list[bytes | memoryview]) -> None:
        for part in parts:
            self._digest.update(part)


def image_member(key: str, image: str) -> str:
    """The member of a sample's source image: it ends as the image's name, where that is plain and a tar can hold it."""
    suffix = image.rpartition(".")[2].lower()
    name = f"{key}.{suffix}"
    return name if suffix.isalnum() and suffix != "json" and len(name.encode()) <= tarfile.LENGTH_NAME else f"{key}.img"


def sample_json(sample: Sample) -> bytes:
    """The `<key>.json` member of a sample: canonical, so that equal samples have equal bytes."""
    return sample.model_dump_json(by_alias=True).encode()


def read_sample(data: bytes) -> Sample:
    """The record of a `<key>.json` member.

    Raises:
        ValueError: if it is not one.
    """
    try:
        return Sample.model_validate_json(data)
    except ValidationError as error:
        raise ValueError(f"not a sample's record: {first_fault(error)}") from error


def members(file: IO[bytes]) -> list[tuple[str, int, int]]:
    """(name, offset of the payload, size) of each member of a tar.

    Raises:
        tarfile.ReadError: if it is no tar, or ends too early.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar]


def sha256_of(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
