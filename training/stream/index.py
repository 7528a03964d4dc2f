"""The manifest of a store as arrays: where its members lie, and which examples it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.codec import payload_bytes
from pipeline.manifest import read_manifest
from pipeline.schema import SAMPLES, StoreSpec
from pipeline.storage import Storage
from training.stream.order import Examples, Ints


@dataclass(frozen=True)
class Index:
    """Where the members of a store lie: arrays over its M samples (rows of the manifest), dicts over opened columns."""

    keys: Sequence[str]
    shard: Ints  # (M,)
    offsets: dict[str, Ints]  # of `samples` and every wanted column, (M,); -1 for a sample without such a member
    sizes: dict[str, Ints]  # the same, (M,); 0 for a sample without such a member
    payload: dict[str, int]  # wanted columns only: bytes of one image's features


def read_index(storage: Storage, store: StoreSpec, columns: tuple[str, ...]) -> tuple[Index, Examples]:
    """Where members lie, and every conversation in natural order.

    Raises:
        ValueError: if a column is missing, or its members have another size than the store's codec gives them.
    """
    known = {column.name: column for column in store.columns}
    missing = [name for name in columns if name not in known]
    if missing:
        raise ValueError(
            f"the store has no columns {', '.join(missing)}; it has {', '.join(known)}: choose among these, or add "
            "theirs with pipeline/build_shards.py"
        )
    table = read_manifest(storage)
    names = (SAMPLES, *columns)
    index = Index(
        keys=table.column("key").to_pylist(),
        shard=_numbers(table, "shard"),
        offsets={name: _numbers(table, f"{name}.offset") for name in names},
        sizes={name: _numbers(table, f"{name}.size") for name in names},
        payload={name: payload_bytes(known[name], store.codec) for name in columns},
    )
    has_image = ~table.column("image").is_null().to_numpy()  # (M,)
    _check_sizes(index, has_image, store)
    return index, _examples(table.column("words").combine_chunks(), index.shard, has_image)


def _numbers(table: Any, name: str) -> Ints:
    """A column of the manifest, (M,)."""
    array: Ints = table.column(name).to_numpy().astype(np.int64)
    return array


def _check_sizes(index: Index, has_image: npt.NDArray[np.bool_], store: StoreSpec) -> None:
    """Raise ValueError if a sample's features have another size than the codec gives them; `has_image` is (M,)."""
    for name, size in index.payload.items():
        wrong = np.flatnonzero(index.sizes[name] != np.where(has_image, size, 0))
        if len(wrong):
            raise ValueError(
                f"{name} of sample {index.keys[wrong[0]]} has {index.sizes[name][wrong[0]]} bytes, {size} were "
                f"expected in {store.codec}, or 0 for a sample without an image: the manifest does not fit "
                "store.json; run pipeline/verify_shards.py on the store"
            )


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
    )
