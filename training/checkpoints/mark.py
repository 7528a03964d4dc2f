"""The mark of a checkpoint: `complete.json`, written last, says which files belong to it and what bytes they hold."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pipeline.storage import sync

T = TypeVar("T")
MARK = "complete.json"
FOLDER = re.compile(r"ba(\d{8,})")  # `folder_of`


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Mark:
    """What `complete.json` says: `load` is the file or folder that Composer loads, `files` maps names to bytes.

    `sha256` maps the same names to the hex digest of the file. It is empty in older marks, and where
    `checkpoint.verify` was off. `seal` is the digest of the mark without it. `run` holds the settings that make the run
    what it is (`TrainConfig.plain_identity`), where they are kept.
    """

    step: int
    engine: str
    ranks: int
    load: str
    files: dict[str, int]
    sha256: dict[str, str] | None = None
    seal: str | None = None
    run: dict[str, Any] | None = None

    def sealed(self) -> Mark:
        """This mark with the digest of its own contents."""
        said = asdict(replace(self, seal=None))
        if self.run is None:
            del said["run"]  # older marks lack it
        bare = json.dumps(said, sort_keys=True)
        return replace(self, seal=hashlib.sha256(bare.encode()).hexdigest())


def folder_of(step: int) -> str:
    """The name of the folder of a step's checkpoint; names sort by step."""
    return f"ba{step:08d}"


def read_mark(folder: Path) -> Mark | None:
    """What is said of the checkpoint in `folder`; None if it is not whole, or its mark is damaged."""
    try:
        return parse_mark((folder / MARK).read_bytes())
    except OSError:  # no error: what was killed while it wrote is passed over
        return None


def parse_mark(text: bytes) -> Mark | None:
    """The mark with these contents, None if they are damaged."""
    try:
        mark = TypeAdapter(Mark).validate_json(text)
    except ValidationError:
        return None
    # The bucket is another's: no name may lead out of the folder, and what is loaded is among the files.
    safe = all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in mark.files)
    known = any(name == mark.load or name.startswith(f"{mark.load}/") for name in mark.files)
    hashed = mark.sha256 is None or mark.sha256.keys() == mark.files.keys()
    intact = mark.seal is None or mark.seal == mark.sealed().seal
    return mark if safe and known and hashed and intact else None


def write_mark(folder: Path, mark: Mark) -> None:
    """Write the mark whole: beside its place, to the disk, then renamed. Each process has another name beside it."""
    part = folder / f"{MARK}.{os.uname().nodename}.{os.getpid()}.part"
    part.write_text(json.dumps(asdict(mark.sealed()), indent=1), encoding="utf-8")
    sync(part)
    part.replace(folder / MARK)
    sync(folder)


def flaws(folder: Path, mark: Mark, verify: bool = True, names: Iterable[str] | None = None) -> dict[str, str]:
    """Files of a checkpoint that are not there as they were written, and what is wrong with each.

    Args:
        folder: of the checkpoint.
        mark: of the checkpoint.
        verify: hash what has its size, where the mark has digests; else sizes are compared, nothing more.
        names: of the files to look at; None for all of the mark.
    """
    sizes = file_sizes(folder)

    def flaw(name: str) -> str | None:
        if name not in sizes:
            return "is missing"
        if sizes[name] != mark.files[name]:
            return f"has {sizes[name]} bytes instead of {mark.files[name]}"
        try:
            same = not verify or mark.sha256 is None or digest(folder / name) == mark.sha256[name]
        except OSError as error:  # of a disk that does not give back what it took
            return f"cannot be read ({error.strerror})"
        return None if same else "has other bytes than were written"

    found = in_threads(flaw, mark.files if names is None else names)
    return {name: what for name, what in found.items() if what is not None}


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex: about 1 GB/s where the disk gives as much."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_threads(task: Callable[[str], T], names: Iterable[str]) -> dict[str, T]:
    """What `task` says of each name, many at once: hashing leaves Python's lock to the others."""
    names = list(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(task, names), strict=True))


def file_sizes(folder: Path) -> dict[str, int]:
    """Every file below a checkpoint's folder and its bytes, but for the mark."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARK)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def checkpoint_folders(folder: Path) -> list[Path]:
    """Those below `folder` that are named like checkpoints, oldest first, whole or not."""
    return sorted(path for path in folder.glob("ba*") if FOLDER.fullmatch(path.name))


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, its mark first: half of one must not look whole."""
    (folder / MARK).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # what stays is no checkpoint, and is swept again
