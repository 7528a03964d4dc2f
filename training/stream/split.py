"""Which examples are held out: a pure function of a seed and of names, or a list of names.

The name is the image's; of a text-only example it is the id of its record. The WebDataset key, which follows the seed
of the build, takes no part: two stores with the same image hold it out together, however they were built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.manifest import READERS
from pipeline.schema import SAMPLES, tar_path
from pipeline.shard import read_sample
from pipeline.storage import Storage
from training.config import ValidationSettings
from training.stream.index import Index

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Split:
    """A share of all names, or the names of a list (then `share` is None)."""

    share: float | None
    names: frozenset[str]
    seed: int
    place: str = ""  # where the list lies, for messages

    @classmethod
    def of(cls, settings: ValidationSettings | None) -> Split | None:
        """The split that `settings` ask for; None if they hold nothing out of the stores that are learned from.

        Raises:
            ValueError: if the list of names is no UTF-8 text, or names nothing. OSError: if it cannot be read.
        """
        if settings is None or settings.store is not None:
            return None
        names = frozenset() if settings.names is None else _listed(settings.names)
        return cls(settings.share, names, settings.seed, settings.names or "")

    @classmethod
    def whole(cls, seed: int) -> Split:
        """All that a store has: for a store that is never learned from."""
        return cls(1.0, frozenset(), seed)

    @property
    def identity(self) -> str:
        """What two splits that are equal have in common, whatever the place of a list."""
        if self.share is not None:
            return f"share {self.share!r} of seed {self.seed}"
        return f"names {hashlib.sha256(chr(10).join(sorted(self.names)).encode()).hexdigest()}"

    def held_out(self, names: Sequence[str | None]) -> Bools:
        """Which of these names are held out, (M,); never None, which stands for a name that was not needed."""
        if self.share is None:
            return np.array([name in self.names for name in names], dtype=bool)
        return draws(names, self.seed) < self.share


def draws(names: Sequence[str | None], seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each name (M,), a function of the seed and the name; 1 for None."""
    numbers = [
        # The upper 53 bits of the digest, as many as a float64 holds.
        1.0
        if name is None
        else (int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "big") >> 11) * 2.0**-53
        for name in names
    ]
    return np.array(numbers, dtype=np.float64)


def _listed(path: str) -> frozenset[str]:
    """The names in a file, a name a line; spaces around them and empty lines do not count."""
    folder, _, file = path.rpartition("/")
    cure = "give a text file with a name a line"
    try:
        text = Storage(folder or ("/" if path.startswith("/") else ".")).read(file).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(f"data.validation.names: {path} does not exist; {cure}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"data.validation.names: {path} is not UTF-8 text ({error}); {cure}") from error
    except (ValueError, IsADirectoryError) as error:  # a folder, a pipe, no name, another scheme
        raise ValueError(f"data.validation.names: {path!r} is no file that can be read ({error}); {cure}") from error
    names = frozenset(line.strip() for line in text.splitlines() if line.strip())
    if not names:
        raise ValueError(f"data.validation.names: {path} names nothing; write a name of an image a line")
    return names


def names_of(storage: Storage, index: Index, split: Split) -> list[str | None]:
    """The name of each sample of a store, (M,): of its image, or the id of its text-only record.

    The manifest has no ids, so the records are read, whole tars at a time and many at once: None stands for ids that
    `split` cannot need, because its list names nothing but images of this store.

    Raises:
        ValueError: if a record is damaged. OSError: if one cannot be read.
    """
    names: list[str | None] = index.images.to_pylist()
    text_only = np.flatnonzero([name is None for name in names])  # samples
    if not len(text_only) or (split.share is None and split.names <= set(names)):
        return names
    shards = np.unique(index.shard[text_only])

    def ids(shard: int) -> dict[int, str]:
        path = tar_path(SAMPLES, shard)
        data = storage.read(path)
        found = {}
        for sample in text_only[index.shard[text_only] == shard].tolist():
            start = int(index.offsets[SAMPLES][sample])
            try:
                record = read_sample(data[start : start + int(index.sizes[SAMPLES][sample])])
            except ValueError as error:
                raise ValueError(
                    f"{index.keys[sample]}.json in {path} of {storage.root}: {error}; run pipeline/verify_shards.py on "
                    "the store"
                ) from error
            found[sample] = record.conversations[0].id
        return found

    with ThreadPoolExecutor(READERS) as pool:
        for found in pool.map(ids, shards.tolist()):
            for sample, name in found.items():
                names[sample] = name
    return names


def check_known(split: Split, known: Sequence[str | None]) -> None:
    """Refuse a list with names that no store has.

    Args:
        known: the names of all samples of all stores.

    Raises:
        ValueError: with the first of them, and how many there are.
    """
    unknown = sorted(split.names.difference(name for name in known if name is not None))
    if unknown:
        more = "" if len(unknown) <= 3 else ", ..."
        raise ValueError(
            f"data.validation.names: {len(unknown)} of {len(split.names)} names in {split.place} are those of no image "
            f"and of no text-only record: {', '.join(repr(name[:80]) for name in unknown[:3])}{more}; write them as "
            "the data does, or take them out"
        )


def refuse_one_side(split: Split, samples: Bools, examples: Bools) -> None:
    """Refuse a split that leaves nothing on one side.

    Args:
        samples, examples: which are held out, of all in all stores.

    Raises:
        ValueError: with the numbers.
    """
    out = int(examples.sum())
    if split == Split.whole(split.seed) or 0 < out < len(examples):
        return
    side = "held out" if out == 0 else "left to learn from"
    asked = "data.validation.names" if split.share is None else f"data.validation.share={split.share!r}"
    raise ValueError(
        f"{asked} leaves nothing {side}: {out:,} of {len(examples):,} examples ({int(samples.sum()):,} of "
        f"{len(samples):,} images and text-only records) are held out; choose another "
        f"{'list' if split.share is None else 'share, or another data.validation.seed'}"
    )
