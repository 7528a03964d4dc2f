"""The manifests of stores as arrays: where their members lie, and which examples they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.codec import payload_bytes
from pipeline.manifest import read_manifest
from pipeline.schema import SAMPLES, StoreSpec
from pipeline.storage import Storage
from training.stream.order import Examples, Ints, one_after_another


@dataclass(frozen=True)
class Index:
    """Where the members of stores lie: arrays over their M samples (rows of manifests), dicts over opened columns.

    Of several stores the samples and shards of one are numbered behind those of the store before it.
    """

    keys: Sequence[str]
    images: pa.Array  # (M,), texts: their names, null for text-only samples
    shard: Ints  # (M,)
    offsets: dict[str, Ints]  # of `samples` and every wanted column, (M,); -1 for a sample without such a member
    sizes: dict[str, Ints]  # the same, (M,); 0 for a sample without such a member
    payload: dict[str, int]  # wanted columns only: bytes of one image's features
    first: Ints  # the number of each store's first shard, ascending

    def place(self, shard: int) -> tuple[int, int]:
        """Which store a shard belongs to, and its number within it."""
        store = int(np.searchsorted(self.first, shard, side="right")) - 1
        return store, shard - int(self.first[store])


def read_index(
    storage: Storage, store: StoreSpec, columns: tuple[str, ...], shards: int | None = None
) -> tuple[Index, Examples]:
    """Where members lie, and every conversation in natural order; of the first `shards` shards only, if it is given.

    Raises:
        ValueError: if a column is missing, or the manifest does not fit the store.
    """
    table = read_manifest(storage, store)
    if shards is not None:
        table = table.filter(pc.less(table.column("shard"), shards))
    # A column that was added later is in the manifest once all its shards are built.
    known = {column.name: column for column in store.columns if f"{column.name}.size" in table.column_names}
    missing = [name for name in columns if name not in known]
    if missing:
        raise ValueError(
            f"the store has no columns {', '.join(missing)}; it has {', '.join(known)}: choose among these, or add "
            "theirs with pipeline/build_shards.py"
        )
    names = (SAMPLES, *columns)
    index = Index(
        keys=table.column("key").to_pylist(),
        images=table.column("image").combine_chunks(),
        shard=_numbers(table, "shard"),
        offsets={name: _numbers(table, f"{name}.offset") for name in names},
        sizes={name: _numbers(table, f"{name}.size") for name in names},
        payload={name: payload_bytes(known[name], store.codec) for name in columns},
        first=np.zeros(1, dtype=np.int64),
    )
    has_image = ~table.column("image").is_null().to_numpy()  # (M,)
    return index, _examples(table.column("words").combine_chunks(), index.shard, has_image)


def _numbers(table: Any, name: str) -> Ints:
    """A column of the manifest, (M,)."""
    array: Ints = table.column(name).to_numpy().astype(np.int64)
    return array


def _examples(words: Any, shard: Ints, has_image: npt.NDArray[np.bool_]) -> Examples:
    """One example for each conversation of each sample.

    Args:
        words: the manifest's lists of words per conversation, M of them.
        shard, has_image: of each sample, (M,).
    """
    counts = words.value_lengths().to_numpy().astype(np.int64)  # (M,), conversations of each sample
    sample = np.repeat(np.arange(len(counts), dtype=np.int64), counts)  # (N,)
    first = np.cumsum(counts) - counts  # (M,), the example that a sample's conversations begin with
    return Examples(
        sample=sample,
        conversation=np.arange(len(sample), dtype=np.int64) - first[sample],
        shard=shard[sample],
        words=words.flatten().to_numpy().astype(np.int64),
        has_image=has_image[sample],
        store=np.zeros(len(sample), dtype=np.int64),
    )


def joined(parts: Sequence[tuple[Index, Examples]]) -> tuple[Index, Examples]:
    """Several stores as one, in this order; all have the same columns."""
    if len(parts) == 1:
        return parts[0]
    indices, examples = [index for index, _ in parts], [found for _, found in parts]
    # Where each store begins: of all samples, and of all shards.
    samples = np.cumsum([0, *(len(index.keys) for index in indices)])
    shards = np.cumsum([0, *(int(index.shard.max(initial=-1)) + 1 for index in indices)])
    columns = indices[0].offsets
    index = Index(
        keys=[key for index in indices for key in index.keys],
        images=pa.concat_arrays([index.images for index in indices]),
        shard=np.concatenate([index.shard + shards[i] for i, index in enumerate(indices)]),
        offsets={name: np.concatenate([index.offsets[name] for index in indices]) for name in columns},
        sizes={name: np.concatenate([index.sizes[name] for index in indices]) for name in columns},
        payload=indices[0].payload,
        first=shards[:-1],
    )
    return index, one_after_another(examples, samples, shards)
