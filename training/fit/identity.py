"""Whose the folder of a run is: the settings that it keeps to its end, and the contents behind the paths among them.

A store, a language model or a connector may lie elsewhere when the run goes on: what counts is what it holds. So the
run's folder keeps fingerprints, and paths are compared only where there are none.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from pydantic import RootModel

from pipeline.manifest import fingerprint, shards_of
from pipeline.storage import Storage
from training.config import FOLDERS, TrainConfig
from training.fit.parts import STORE
from training.release.connector import SHAPE
from training.release.records import CONFIG, LOG, SKIPPED, SUMMARY, Summary, read_as, read_config, read_log

SOURCES = "sources.json"  # in a run's folder: the fingerprints of the folders that its settings name
# What is read of such a folder: a card or a cache beside it changes nothing.
READ = re.compile(rf"config\.json|tokenizer\.model|tokenizer_config\.json|{re.escape(SHAPE)}|.*\.(safetensors|bin)")
PIECE, PIECES = 2**16, 64  # bytes, and how many of them are hashed of each file


class _Sources(RootModel[dict[str, str]]):
    """`sources.json`: a setting's name -> the fingerprint of the folder that it named."""


def refuse_another(config: TrainConfig) -> None:
    """A run folder belongs to one run: say what differs instead of mixing two.

    Raises:
        ValueError: if the folder holds another run, or a file of it is damaged. OSError: if one cannot be read.
    """
    run = Path(config.run)
    for name in (LOG, SKIPPED):
        read_log(run, name)
    if not (run / CONFIG).exists():
        return
    if (run / SUMMARY).exists():
        read_as(Summary, run / SUMMARY)
    before = read_config(run)
    theirs, mine = before.identity(), config.identity()
    places = [[entry.store for entry in settings.data.mixture] for settings in (before, config)]
    for settings, found in ((before, theirs), (config, mine)):
        for name in settings.store_paths():
            found.pop(name)
    known = _known(run)
    same = {name for name in FOLDERS if _same_folder(known.get(name), theirs.get(name), mine.get(name))}
    differing = [
        f"{name}: {there} holds other files than when the run began (if that changes nothing, delete {run / SOURCES})"
        for name in FOLDERS
        if name not in same and (there := theirs.get(name)) == mine.get(name)
    ]
    differing += [
        f"{name}: {theirs.get(name)} -> {mine.get(name)}"
        for name in {**theirs, **mine}
        if name not in same and theirs.get(name) != mine.get(name)
    ]
    differing += [
        f"{name}: {there} -> {here}, which holds another store"
        for name, there, here, known in zip(config.store_paths(), *places, _known_stores(run, places[1]), strict=False)
        if not _same_store(there, here, known)
    ]
    if len(places[0]) != len(places[1]):
        differing.append(f"data.stores: {', '.join(places[0])} -> {', '.join(places[1])}")
    if differing:
        raise ValueError(
            f"{run} holds a run with other settings; set them back, take another run=..., or delete it:\n  "
            + "\n  ".join(differing)
        )


def _known_stores(run: Path, here: list[str]) -> list[str | None]:
    """The fingerprint of each store that a run learns from; None for those of a run that began before they were kept.

    Raises:
        ValueError: if the file that keeps them is damaged.
    """
    path = run / STORE
    if not path.is_file():
        return [None] * len(here)
    known = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[0-9a-f]{64}(\n[0-9a-f]{64})*", known):
        raise ValueError(
            f"{path} is damaged (found {known[:80]!r}, not the fingerprint of a store); if {' and '.join(here)} is the "
            "store that the run learns from, delete this file and run the same command again"
        )
    return [*known.splitlines()]


def _same_store(there: str, here: str, known: str | None) -> bool:
    """Whether the store at path `here` is the one that the run learns from, which lay at `there`.

    It may have got further shards since. `known` is its fingerprint, if the run has kept it.
    """
    if known is None and there == here:
        return True  # a run that began before fingerprints were kept
    if known is None:
        known = _fingerprint(there)
    try:
        return known is not None and shards_of(Storage(here), known) is not None
    except (ValueError, OSError):
        if there == here:
            return True  # that it is gone is said when it is opened
        raise


def _fingerprint(store: str) -> str | None:
    """The fingerprint of the store at a path, None if there is none to be read any more."""
    try:
        return fingerprint(Storage(store))
    except (ValueError, OSError):
        return None


def sources(config: TrainConfig) -> dict[str, str]:
    """The fingerprint of each folder that the settings name, by the setting's name.

    Raises:
        OSError: if one cannot be read.
    """
    named = config.identity()
    found = {name: _contents(named.get(name)) for name in FOLDERS}
    return {name: text for name, text in found.items() if text is not None}


def _known(run: Path) -> dict[str, str]:
    """What `sources` gave when the run began; nothing for one that began before such fingerprints were kept."""
    return read_as(_Sources, run / SOURCES).root if (run / SOURCES).exists() else {}


def _same_folder(known: str | None, there: str | None, here: str | None) -> bool:
    """Whether a setting names what it named when the run began: then the folder or Hub id `there`, now `here`.

    A folder that is gone from its place is taken for unchanged: whoever needs it says so.
    """
    now = _contents(here)
    if there == here:
        return known is None or now is None or now == known
    return now is not None and now == (known or _contents(there))


def _contents(folder: str | None) -> str | None:
    """The SHA-256 over names, sizes and pieces of the files of a model; None if it is no folder.

    Files up to 4 MiB are hashed whole. Of larger ones pieces are, spread evenly over them: any training that went on
    changes all weights, and 64 reads a file take no time.
    """
    if folder is None or not Path(folder).is_dir():
        return None
    paths = sorted(path for path in Path(folder).iterdir() if READ.fullmatch(path.name) and path.is_file())
    if any(path.suffix == ".safetensors" for path in paths):  # then nothing reads the same weights in another format
        paths = [path for path in paths if path.suffix != ".bin"]
    found = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(PIECE, size // PIECES)):
                file.seek(start)
                found.update(file.read(PIECE))
    return found.hexdigest()
