"""What a store says of itself: its identity, the commit record of each shard, and the manifest of them all."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError
from pydantic_core import from_json

from pipeline.config import differences
from pipeline.rows import check_rows
from pipeline.schema import (
    FORMAT_VERSION,
    SAMPLES,
    Column,
    ColumnFile,
    Commit,
    Failure,
    Retried,
    StoreSpec,
    claim_path,
    commit_path,
    first_fault,
    retried_path,
)
from pipeline.storage import Storage

READERS = 16  # commit records read at a time: on S3 each is a round trip
SPEC, MANIFEST, FAILURES = "store.json", "manifest.parquet", "failures.jsonl"
_RESTORE = "restore it from a copy of the store, or build a new one with pipeline/build_shards.py"

_MEANING = {  # of a difference in store.json, for the person who asked
    "dataset": " (the records of data=..., or their texts, are others)",
    "encoder.revision": " (the features would come from another CLIP)",
    "seed": " (the samples would come in another order)",
}


def read_store(storage: Storage) -> StoreSpec:
    """The identity of a store, the columns added later included.

    Raises:
        ValueError: if there is no store, one of another format version, or one whose identity is damaged.
    """
    try:
        data = storage.read(SPEC)
    except FileNotFoundError as error:
        raise ValueError(
            f"{storage.root} is not a feature store: it has no {SPEC}; build one with pipeline/build_shards.py"
        ) from error
    spec = _parse_spec(data, storage.root)
    added = [_read_column(storage, name, spec) for name in storage.list("columns")]
    return spec.model_copy(update={"columns": (*spec.columns, *added)})


def _read_column(storage: Storage, name: str, spec: StoreSpec) -> Column:
    """A column that was added later, from its file; ValueError if that is damaged."""
    try:
        column = Column.model_validate_json(storage.read(name))
    except ValidationError as error:
        what = first_fault(error)
    else:
        if name == f"columns/{column.name}.json" and column.name not in {known.name for known in spec.columns}:
            return column
        what = f"it describes the column {column.name}, which has another file or is of the first build"
    raise ValueError(f"{storage.root}/{name} is damaged ({what}); delete it, then build again with this column")


def _parse_spec(data: bytes, root: str) -> StoreSpec:
    """The identity in store.json of the store at `root`; ValueError if it is damaged or of another version."""
    try:
        tree = from_json(data)  # unlike json.loads, it ends at a nesting of 200
        version = tree.get("format_version") if isinstance(tree, dict) else None
    except ValueError as error:
        raise ValueError(f"{root}/{SPEC} is not JSON: {error}; {_RESTORE}") from error
    if isinstance(tree, dict) and version not in (None, FORMAT_VERSION):
        raise ValueError(
            f"{root} is a store of format version {str(version)[:80]}, this program reads version {FORMAT_VERSION}: "
            "use the version of compact-vision-tokens that built it, or build it again with pipeline/build_shards.py"
        )
    try:
        return StoreSpec.model_validate_json(data)
    except ValidationError as error:
        raise ValueError(f"{root}/{SPEC}: {first_fault(error)}; {_RESTORE}") from error


def create_or_check(storage: Storage, spec: StoreSpec) -> StoreSpec:
    """Write the identity of a new store, or check that the store that is there has the same one.

    Columns that the store lacks are added to it; columns that only the store has stay. Returns what is there now.

    Raises:
        ValueError: naming every difference between `spec` and the store.
    """
    # Several jobs may begin at once: one creates the file, the others find it and must agree with it.
    if storage.publish_bytes(SPEC, spec.model_dump_json(indent=1).encode()):
        return spec
    known = {column.name for column in check(storage, spec).columns}
    for column in spec.columns:
        if column.name not in known:
            storage.publish_bytes(f"columns/{column.name}.json", column.model_dump_json().encode())
    return read_store(storage)


def check(storage: Storage, spec: StoreSpec) -> StoreSpec:
    """The identity of the store that is there, after checking that a build of `spec` may go on with it.

    Raises:
        ValueError: naming every difference. A column that only one of them has is none.
    """
    found = read_store(storage)
    theirs, mine = _identity(found), _identity(spec)
    if theirs["encoder.revision"] == mine["encoder.revision"]:
        mine["encoder.id"] = theirs["encoder.id"]  # the same weights, by another name
    shared = {name: value for name, value in mine.items() if name in theirs}
    differing = [line + _MEANING.get(line.partition(":")[0], "") for line in differences(theirs, shared)]
    if differing:
        empty = "" if committed(storage) else " (it has no shard yet: if no other build works on it, delete it)"
        raise ValueError(
            f"{storage.root} is a store of another build{empty}; take another store=..., or the same settings:\n  - "
            + "\n  - ".join(differing)
        )
    return found


def _identity(spec: StoreSpec) -> dict[str, Any]:
    """What two builds must share, by name: `codec`, `encoder.revision`, `column block03` as (tokens, width), ..."""
    plain = spec.model_dump(exclude={"encoder", "columns"})
    encoder = {f"encoder.{name}": value for name, value in spec.encoder.model_dump().items()}
    return plain | encoder | {f"column {c.name}": (c.tokens, c.width) for c in spec.columns}


def added_columns(storage: Storage) -> tuple[str, ...]:
    """Names of the columns that were added after the store's first build."""
    return tuple(name.removeprefix("columns/").removesuffix(".json") for name in storage.list("columns"))


def read_commit(storage: Storage, shard: int, added: str | None = None) -> Commit | None:
    """A shard's commit record, or that of a column added to it; None if the shard is not there yet.

    Raises:
        ValueError: if the record is damaged.
    """
    name = commit_path(shard, added)
    try:
        commit = Commit.model_validate_json(storage.read(name))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise _damaged(storage, name, first_fault(error)) from error
    if (added or SAMPLES) not in commit.files:
        raise _damaged(storage, name, f"files: no {added or SAMPLES} in {', '.join(commit.files)[:80]!r}")
    return commit


def _damaged(storage: Storage, name: str, what: str) -> ValueError:
    """What a user is told of a commit record that cannot be believed."""
    return ValueError(
        f"{storage.root}/{name} is damaged ({what}); run pipeline/verify_shards.py STORE --repair, then build again"
    )


def committed(storage: Storage, added: str | None = None) -> set[int]:
    """Numbers of the shards that exist, or that have a column added later."""
    return set(_numbers(storage, "commits" if added is None else f"commits/{added}", ".json"))


def _numbers(storage: Storage, folder: str, suffix: str) -> list[int]:
    """Numbers of the shards that have a file in `folder`, ascending: 100000 after 99999. Others' files do not count."""
    pattern = re.compile(rf"{folder}/([0-9]{{5}}|[1-9][0-9]{{5,7}}){re.escape(suffix)}")  # of `shard_name`
    return sorted(int(match[1]) for name in storage.list(folder) if (match := pattern.fullmatch(name)))


def write_commit(storage: Storage, commit: Commit, added: str | None = None) -> bool:
    """Make a shard exist; False if another worker was first, whose record then counts."""
    return storage.publish_bytes(commit_path(commit.shard, added), commit.model_dump_json().encode())


def claim(storage: Storage, shard: int, job: str) -> bool:
    """Let `job` work on a shard; False if another job does, or did until it was killed.

    A claim only saves double work. Correctness rests on files that are created once and then never changed.
    """
    name = claim_path(shard)
    try:
        return storage.publish_bytes(name, job.encode()) or storage.read(name) == job.encode()
    except FileNotFoundError:  # a job has just ended, and removed what claims there were
        return True


def claimed(storage: Storage) -> set[int]:
    """Numbers of the shards that some job works on, or was killed over."""
    return set(_numbers(storage, "claims", ""))


def write_manifest(storage: Storage, failures: Iterable[Failure]) -> int:
    """Gather every commit into `manifest.parquet` and `failures.jsonl`; returns the number of samples.

    Raises:
        ValueError: if a shard is missing.
    """
    table = manifest_table(storage, read_store(storage))  # a build beside this one may have added a column
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_failures(storage, failures)
    storage.replace(MANIFEST, buffer.getvalue())
    return len(table)


def write_failures(storage: Storage, failures: Iterable[Failure]) -> None:
    """Write `failures.jsonl`: those of the source, then those of every shard that is there."""
    lines = [failure.model_dump_json() + "\n" for failure in (*failures, *known_failures(storage))]
    storage.replace(FAILURES, "".join(lines).encode())


def known_failures(storage: Storage) -> list[Failure]:
    """What could not be stored of the shards that are there, in their order; a later shard may hold it after all."""
    failures: dict[str, Failure] = {}
    for commit in existing_commits(storage):
        failures |= {failure.key: failure for failure in commit.failures}
        for key in failures.keys() & set(commit.keys):
            del failures[key]
    return list(failures.values())


def retried(storage: Storage, spec: StoreSpec) -> dict[int, tuple[str, ...]]:
    """The keys of each shard behind those of `store.json`, by its number.

    Raises:
        ValueError: if what describes them is damaged.
    """
    found: dict[int, tuple[str, ...]] = {}
    known: set[str] = set()
    numbers = _numbers(storage, "retried", ".json")
    with ThreadPoolExecutor(READERS) as pool:
        lists = list(pool.map(lambda number: _read_retried(storage, number), numbers))
    for shard, (number, keys) in enumerate(zip(numbers, lists, strict=True), spec.shards):
        if number != shard or known & {*keys} or max(map(int, keys)) >= spec.samples:
            raise ValueError(
                f"{storage.root}/{retried_path(number)} does not fit the store: {retried_path(shard)} is next, with "
                f"other keys than the shards before it, below {spec.samples:09d}; {_RESTORE}"
            )
        found[shard] = keys
        known |= {*keys}
    return found


def _read_retried(storage: Storage, number: int) -> tuple[str, ...]:
    """The keys of a shard of retried samples; ValueError if the list is damaged."""
    name = retried_path(number)
    try:
        return Retried.model_validate_json(storage.read(name)).keys
    except ValidationError as error:
        raise ValueError(f"{storage.root}/{name} is damaged ({first_fault(error)}); {_RESTORE}") from error


def existing_commits(storage: Storage) -> list[Commit]:
    """The commit records of the shards that are there, in their order."""
    return [commit for commit in _commits_or_none(storage, sorted(committed(storage)), None) if commit is not None]


def manifest_table(storage: Storage, spec: StoreSpec) -> pa.Table:
    """What the commit records say, in the form of the manifest.

    A column that was added later appears once all its shards are there.

    Raises:
        ValueError: if a shard is missing.
    """
    shards = spec.shards + len(retried(storage, spec))
    base = _all_commits(storage, shards, None)
    files: list[dict[str, ColumnFile]] = [dict(commit.files) for commit in base]  # per shard: by column
    for name in added_columns(storage):
        if len(committed(storage, name)) == shards:
            for shard, commit in enumerate(_all_commits(storage, shards, name)):
                if commit.keys != base[shard].keys:
                    raise _damaged(storage, commit_path(shard, name), "it has other keys than its shard")
                files[shard][name] = commit.files[name]
    # One row per sample: what the commits list per sample, one shard after the other.
    table: dict[str, Any] = {
        "key": pa.array([key for commit in base for key in commit.keys], pa.string()),
        "shard": pa.array([commit.shard for commit in base for _ in commit.keys], pa.int32()),
        "image": pa.array([image for commit in base for image in commit.images], pa.string()),
        "words": pa.array([words for commit in base for words in commit.words], pa.list_(pa.int32())),
    }
    # A column of which only some shards are built is left out until the rest is there.
    complete = [c.name for c in spec.columns if all(c.name in shard for shard in files)]
    for name in (SAMPLES, *complete):
        table[f"{name}.offset"] = pa.array([o for shard in files for o in shard[name].offsets], pa.int64())
        table[f"{name}.size"] = pa.array([s for shard in files for s in shard[name].sizes], pa.int64())
    return pa.table(table)


def _all_commits(storage: Storage, shards: int, added: str | None) -> list[Commit]:
    """The commit records of shards 0 to `shards` - 1, or a ValueError that says how many are missing."""
    found = _commits_or_none(storage, range(shards), added)
    missing = [shard for shard, commit in enumerate(found) if commit is None]
    if missing:
        of = "" if added is None else f" of column {added}"
        raise ValueError(
            f"{storage.root} lacks {len(missing)} of {shards} shards{of}, the first is {missing[0]}; "
            "run pipeline/build_shards.py again"
        )
    return [commit for commit in found if commit is not None]


def _commits_or_none(storage: Storage, shards: Iterable[int], added: str | None) -> list[Commit | None]:
    """The commit record of each of `shards`, None where there is none, read side by side."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda shard: read_commit(storage, shard, added), shards))


def read_manifest(storage: Storage, spec: StoreSpec | None = None) -> pa.Table:
    """One row per sample: key, shard, image, words (list), and `<name>.offset`, `<name>.size` of samples and columns.

    `spec` is what `read_store` says, read here if it is not given.

    Raises:
        ValueError: if the store is not complete, or the manifest is damaged or does not fit `spec`.
    """
    spec = spec or read_store(storage)
    try:
        data = storage.read(MANIFEST)
    except FileNotFoundError as error:
        raise ValueError(
            f"{storage.root} has no {MANIFEST}: its build has not ended; run pipeline/build_shards.py again, "
            "it goes on where it stopped"
        ) from error
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        if file.metadata.num_rows > spec.samples:  # before they take memory
            raise ValueError(f"it has {file.metadata.num_rows} rows, the store {spec.samples} samples")
        table = file.read()
        check_rows(table, spec)
    except (pa.ArrowException, OSError, ValueError) as error:
        said = str(error).partition("\n")[0][:300]
        raise ValueError(
            f"{storage.root}/{MANIFEST} is damaged or not of this store: {said}; run "
            "pipeline/verify_shards.py on the store, or pipeline/build_shards.py to write it again"
        ) from error
    return table


def spread(table: pa.Table, count: int) -> list[dict[str, Any]]:
    """`count` rows, evenly spread over a manifest; all of them where there are fewer."""
    chosen = list(range(0, len(table), max(1, len(table) // max(1, count))))[:count]
    rows: list[dict[str, Any]] = table.take(pa.array(chosen, pa.int64())).to_pylist()
    return rows


def fingerprint(storage: Storage, shards: int | None = None) -> str:
    """sha256 of what training on a store depends on: its identity, and its samples in order.

    Columns that are added later do not change it. `shards`: of the first shards only, as the store was before samples
    were retried.
    """
    spec = _parse_spec(storage.read(SPEC), storage.root)
    return _fingerprint(spec, read_manifest(storage, spec), shards)


def _fingerprint(spec: StoreSpec, table: pa.Table, shards: int | None) -> str:
    digest = hashlib.sha256(spec.model_dump_json().encode())
    if shards is not None:
        table = table.filter(pc.less(table.column("shard"), shards))
    rows = table.select(["key", "shard", "image", "words"]).to_pydict()
    digest.update(json.dumps(list(rows.values()), separators=(",", ":")).encode())
    return digest.hexdigest()


def shards_of(storage: Storage, known: str) -> int | None:
    """How many of a store's first shards have the fingerprint `known`, None if it is another store's.

    A store only grows: what a run began with is what it still begins with.
    """
    spec = _parse_spec(storage.read(SPEC), storage.root)
    table = read_manifest(storage, spec)
    last = pc.max(table.column("shard")).as_py() if len(table) else 0
    every = range(max(spec.shards, last + 1), spec.shards - 1, -1)  # most often it is all of them
    return next((shards for shards in every if _fingerprint(spec, table, shards) == known), None)
