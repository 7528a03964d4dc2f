"""What a stream reads: stores, and which of their examples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.manifest import fingerprint, read_store
from pipeline.schema import StoreSpec
from pipeline.storage import Storage
from training.stream.index import Index, joined, read_index
from training.stream.order import Examples, Order, due_of, filtered
from training.stream.split import Split, check_known, draws, names_of, refuse_one_side


@dataclass(frozen=True)
class Source:
    """A store that a stream reads.

    Attributes:
        url: folder or s3:// prefix of a feature store.
        shards: only so many of its first shards: a run keeps those that it began with.
    """

    url: str
    shards: int | None = None


@dataclass(frozen=True)
class Side:
    """Which examples of its stores a stream gives.

    Attributes:
        split: which are held out; None for none.
        held_out: give these, not those that are left to learn from.
        limit: of those that are held out only N, always the same.
    """

    split: Split | None = None
    held_out: bool = False
    limit: int | None = None


EVERY = Side()


@dataclass(frozen=True)
class Opened:
    """Stores that were read."""

    storages: tuple[Storage, ...]
    stores: tuple[StoreSpec, ...]
    fingerprints: tuple[str, ...]
    index: Index
    examples: Examples  # those that are asked for, in the stores' own order

    @property
    def fingerprint(self) -> str:
        """Of all stores together, in their order."""
        if len(self.fingerprints) == 1:
            return self.fingerprints[0]
        return hashlib.sha256("\n".join(self.fingerprints).encode()).hexdigest()


def opened(sources: Sequence[Source], columns: tuple[str, ...], order: Order, side: Side) -> Opened:
    """Read where the members of stores lie, and choose their examples.

    Raises:
        ValueError: if a store has none, two do not go together or are the same, or a list names what no store has.
        OSError: if one cannot be read.
    """
    storages = tuple(Storage(source.url) for source in sources)
    stores = tuple(read_store(storage) for storage in storages)
    for other, spec in zip(sources[1:], stores[1:], strict=True):
        refuse_unlike((sources[0].url, stores[0]), (other.url, spec), columns)
    read = [
        read_index(storage, store, columns, source.shards)
        for storage, store, source in zip(storages, stores, sources, strict=True)
    ]
    for source, (_, examples) in zip(sources, read, strict=True):
        if not len(examples):
            raise ValueError(f"{source.url} holds no examples; build it again with pipeline/build_shards.py")
    prints = tuple(fingerprint(storage, source.shards) for storage, source in zip(storages, sources, strict=True))
    for number, one in enumerate(prints):
        if one in prints[:number]:
            raise ValueError(
                f"{sources[prints.index(one)].url} and {sources[number].url} are the same store; give it once, with a "
                "higher weight or more epochs"
            )
    index, examples = joined(read)
    if side.split is not None:
        names: list[str | None] = []
        for storage, (of_store, _) in zip(storages, read, strict=True):
            names += names_of(storage, of_store, side.split)
        examples = _one_side(names, examples, side, side.split)
    examples = filtered(examples, order.limit)
    if not side.held_out:
        _refuse_unused(sources, examples, order)
    return Opened(storages, stores, prints, index, examples)


def _one_side(names: list[str | None], examples: Examples, side: Side, split: Split) -> Examples:
    """The examples that are held out, or those that are left to learn from; `names` of all samples, (M,)."""
    check_known(split, names)
    out = split.held_out(names)  # (M,)
    refuse_one_side(split, out, out[examples.sample])
    examples = examples[out[examples.sample] == side.held_out]
    if side.held_out and side.limit is not None and len(examples) > side.limit:
        # The examples with the lowest draws: the same whatever the seed of the build, and most of them in a lower limit
        # too.
        order = np.argsort(draws(names, split.seed)[examples.sample], kind="stable")
        examples = examples[np.sort(order[: side.limit])]
    return examples


def _refuse_unused(sources: Sequence[Source], examples: Examples, order: Order) -> None:
    """Refuse a store that no example comes from in an epoch; ValueError with which, and why."""
    due = due_of(examples, order, len(sources))
    for number, (source, (there, chosen)) in enumerate(zip(sources, due, strict=True)):
        if not there:
            raise ValueError(f"all examples of {source.url} are held out by data.validation; leave this store out")
        if there < order.groups:
            raise ValueError(
                f"data.groups: {source.url} has {there} examples to learn from, fewer than {order.groups} groups; take "
                "fewer groups"
            )
        if not chosen:
            raise ValueError(
                f"data.stores.{number}: an epoch has none of the {there:,} examples of {source.url}; raise its weight "
                "or its epochs, or leave this store out"
            )


def refuse_unlike(first: tuple[str, StoreSpec], other: tuple[str, StoreSpec], columns: tuple[str, ...]) -> None:
    """Refuse a store whose features a model that learns from the first one cannot take.

    Args:
        first, other: two stores, the place of each and what it says of itself.
        columns: those that are wanted of both.

    Raises:
        ValueError: with both stores, and all in which they differ.
    """

    def facts(spec: StoreSpec) -> dict[str, str]:
        shapes = {column.name: f"{column.tokens} x {column.width}" for column in spec.columns}
        return {
            "encoder": f"{spec.encoder.id} {spec.encoder.revision}",
            "aspect": spec.aspect,
            "codec": spec.codec,
            **{f"column {name}": shapes.get(name, "missing") for name in columns},
        }

    (url, one), (other_url, two) = first, other
    theirs, mine = facts(one), facts(two)
    if one.encoder.revision == two.encoder.revision:
        mine["encoder"] = theirs["encoder"]  # the same weights, by another name
    differing = [f"{name}: {theirs[name]} and {mine[name]}" for name in theirs if theirs[name] != mine[name]]
    if differing:
        raise ValueError(
            f"{url} and {other_url} do not go together: {'; '.join(differing)}; build one of them again with the "
            "settings of the other (pipeline/build_shards.py)"
        )
