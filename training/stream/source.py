"""What a stream reads: a store, and which of its examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.manifest import fingerprint, read_store
from pipeline.schema import StoreSpec
from pipeline.storage import Storage
from training.stream.index import Index, read_index
from training.stream.order import Examples
from training.stream.split import Split, check_known, draws, names_of, refuse_one_side


@dataclass(frozen=True)
class Source:
    """A store that a stream reads, and which of its examples.

    Attributes:
        url: folder or s3:// prefix of a feature store.
        shards: only so many of its first shards: a run keeps those that it began with.
        split: which examples are held out; None for none.
        held_out: give these, not those that are left to learn from.
        limit: of those that are held out only N, always the same.
    """

    url: str
    shards: int | None = None
    split: Split | None = None
    held_out: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class Opened:
    """A source that was read."""

    storage: Storage
    store: StoreSpec
    fingerprint: str
    index: Index
    examples: Examples  # those that the source asks for, in the store's own order


def opened(source: Source, columns: tuple[str, ...]) -> Opened:
    """Read where the members of a store lie, and choose its examples.

    Raises:
        ValueError: if there are none, or a list names what the store does not have. OSError: if it cannot be read.
    """
    storage = Storage(source.url)
    store = read_store(storage)
    index, examples = read_index(storage, store, columns, source.shards)
    if not len(examples):
        raise ValueError(f"{source.url} holds no examples; build it again with pipeline/build_shards.py")
    if source.split is not None:
        examples = _one_side(storage, index, examples, source, source.split)
    return Opened(storage, store, fingerprint(storage, source.shards), index, examples)


def _one_side(storage: Storage, index: Index, examples: Examples, source: Source, split: Split) -> Examples:
    """The examples that are held out, or those that are left to learn from."""
    names = names_of(storage, index, split)
    check_known(split, names)
    out = split.held_out(names)  # (M,)
    refuse_one_side(split, out, out[examples.sample], source.url)
    examples = examples[out[examples.sample] == source.held_out]
    if source.held_out and source.limit is not None and len(examples) > source.limit:
        # The examples with the lowest draws: the same whatever the seed of the build, and most of them in a lower limit
        # too.
        order = np.argsort(draws(names, split.seed)[examples.sample], kind="stable")
        examples = examples[np.sort(order[: source.limit])]
    return examples


def refuse_unlike(first: str, other: str, columns: tuple[str, ...]) -> None:
    """Refuse a store whose features a model that learns from the first one cannot take.

    Args:
        first, other: the places of two stores.
        columns: those that are wanted of both.

    Raises:
        ValueError: with both stores, and all in which they differ. OSError: if one cannot be read.
    """

    def facts(spec: StoreSpec) -> dict[str, str]:
        shapes = {column.name: f"{column.tokens} x {column.width}" for column in spec.columns}
        return {
            "encoder": f"{spec.encoder.id} {spec.encoder.revision}",
            "aspect": spec.aspect,
            "codec": spec.codec,
            **{f"column {name}": shapes.get(name, "missing") for name in columns},
        }

    one, two = (read_store(Storage(url)) for url in (first, other))
    theirs, mine = facts(one), facts(two)
    if one.encoder.revision == two.encoder.revision:
        mine["encoder"] = theirs["encoder"]  # the same weights, by another name
    differing = [f"{name}: {theirs[name]} and {mine[name]}" for name in theirs if theirs[name] != mine[name]]
    if differing:
        raise ValueError(
            f"{first} and {other} do not go together: {'; '.join(differing)}; build one of them again with the "
            "settings of the other (pipeline/build_shards.py)"
        )
