"""What takes long to make is kept in the user's cache folder, whole and with its sums, and taken from there next time.

$XDG_CACHE_HOME (or ~/.cache) /compact-vision-tokens/<digest of all that it was made from>/
    sums.json       the SHA-256 of each file
    files/...       what was made
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

SUMS = "sums.json"


def cache_folder() -> Path:
    """Where the user keeps what programs can make again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "compact-vision-tokens"


def digest_of(files: Iterable[Path], said: str) -> str:
    """Of the names and bytes of files, in any order of theirs, and of whatever else is `said`.

    Raises:
        OSError: if a file cannot be read.
    """
    found = hashlib.sha256(said.encode())
    for path in sorted(files, key=lambda path: path.name):
        found.update(f"\n{path.name} {_sum(path)}".encode())
    return found.hexdigest()[:32]


def kept_or_made(out: Path, digest: str, make: Callable[[Path], None]) -> None:
    """Fill the folder `out` with what `make` writes into the folder that it is given, from the cache if it is there.

    What is damaged in the cache is said and made anew. Where nothing can be kept (a full disk), that is said too.

    Raises:
        OSError: if `out` cannot be written. Whatever `make` raises.
    """
    place = cache_folder() / digest
    if place.exists():
        damage = _damage(place)
        if damage is None:
            print(f"taken from {place}, where it was kept; delete that folder to have it made anew", flush=True)
            shutil.copytree(place / "files", out, dirs_exist_ok=True)
            return
        print(f"{place} is damaged ({damage}): made anew", file=sys.stderr, flush=True)
        shutil.rmtree(place)
    make(out)
    try:
        _keep(out, place)
    except OSError as error:
        print(f"not kept for the next time: {error}; free or name another folder with XDG_CACHE_HOME", file=sys.stderr)


def _keep(made: Path, place: Path) -> None:
    """Copy a folder to its place, beside it first: it is there whole, or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as beside:
        whole = Path(beside) / "whole"
        shutil.copytree(made, whole / "files")
        (whole / SUMS).write_text(json.dumps(_sums(whole / "files"), indent=1))
        if not place.exists():  # else another run was faster
            whole.rename(place)


def _damage(place: Path) -> str | None:
    """What is wrong with a kept folder; None if it is as it was."""
    try:
        told = json.loads((place / SUMS).read_text(encoding="utf-8"))
        found = _sums(place / "files")
    except (OSError, ValueError) as error:
        return str(error)
    return None if found == told else "its files are not those that were kept"


def _sums(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): _sum(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
