"""What the rows of `manifest.parquet` must be, whoever wrote them: every reader of a store comes through here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.schema import KEY, MAX_MEMBER, MAX_SHARDS, MAX_TAR, SAMPLES, Column, StoreSpec


def check_rows(table: pa.Table, spec: StoreSpec) -> None:
    """Believe a manifest within bounds only.

    Raises:
        ValueError: if a column is missing, of another type, or beyond what a store of `spec` can hold.
    """
    kinds: dict[str, Callable[[pa.DataType], bool]] = {
        "key": pa.types.is_string,
        "shard": pa.types.is_integer,
        "image": pa.types.is_string,
        "words": lambda kind: pa.types.is_list(kind) and pa.types.is_integer(kind.value_type),
    }
    members = [SAMPLES, *(c.name for c in spec.columns if f"{c.name}.size" in table.column_names)]
    kinds |= {f"{name}.{part}": pa.types.is_integer for name in members for part in ("offset", "size")}
    for name, fits in kinds.items():
        if table.column_names.count(name) != 1 or not fits(table.schema.field(name).type):
            raise ValueError(f"it has no column {name}, or one of another type")
        if name != "image" and table.column(name).null_count:
            raise ValueError(f"{name} is not known of every sample")
    keys = table.column("key")
    odd = keys.filter(pc.invert(pc.match_substring_regex(keys, KEY)))
    if len(odd):
        raise ValueError(f"the key {odd[0].as_py()[:40]!r} is no number of at most nine digits")
    if (different := pc.count_distinct(keys).as_py()) != len(table):
        raise ValueError(f"only {different} of {len(table)} keys are different")
    words = table.column("words").combine_chunks().flatten()
    if words.null_count:
        raise ValueError(f"words are not known of {words.null_count} of {len(words)} conversations")
    _check_range("words", words, 0, 2**31)
    _check_range("shard", table.column("shard"), 0, MAX_SHARDS)
    for name in members:
        _check_range(f"{name}.offset", table.column(f"{name}.offset"), 0 if name == SAMPLES else -1, MAX_TAR)
        _check_range(f"{name}.size", table.column(f"{name}.size"), 0, MAX_MEMBER)
    has_image = table.column("image").is_valid().to_numpy()  # (samples,)
    for column in spec.columns:
        if column.name in members:
            _check_payloads(table, column, has_image, spec)


def _check_range(name: str, values: Any, low: int, high: int) -> None:
    """Raise ValueError for a number below `low`, or not below `high`."""
    found = pc.min_max(values).as_py()
    if len(values) and not low <= found["min"] <= found["max"] < high:
        raise ValueError(f"{name} goes from {found['min']} to {found['max']}; expected {low} to below {high}")


def _check_payloads(table: pa.Table, column: Column, has_image: Any, spec: StoreSpec) -> None:
    """Raise ValueError if features have another size than the codec gives them; `has_image` is (samples,)."""
    from pipeline.codec import payload_bytes

    size = payload_bytes(column, spec.codec)
    sizes, offsets = (table.column(f"{column.name}.{part}").to_numpy() for part in ("size", "offset"))
    wrong = np.flatnonzero((sizes != np.where(has_image, size, 0)) | ((offsets >= 0) != has_image))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{column.name} of sample {table.column('key')[first]} has {sizes[first]} bytes at {offsets[first]}, "
            f"{size} were expected in {spec.codec}, or 0 at -1 for a sample without an image"
        )
