#!/usr/bin/env python
"""Check a feature store: `python pipeline/verify_shards.py STORE [--deep --images DIR] [--repair]`.

Every commit record, every tar's length, checksum, members and keys, the records, the manifest, and that nothing else
lies there. Exit code 1 and a list if anything is wrong. `--deep` also encodes some images again and compares.
"""

from __future__ import annotations

import argparse
import errno
import io
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

from pipeline.manifest import (
    FAILURES,
    MANIFEST,
    SPEC,
    added_columns,
    committed,
    manifest_table,
    read_commit,
    read_manifest,
    read_store,
    retried,
    spread,
)
from pipeline.schema import SAMPLES, ColumnFile, Commit, StoreSpec, commit_path, retried_path, tar_path
from pipeline.shard import members, read_sample, sha256_of
from pipeline.storage import Storage, is_absent

LISTED = 100  # missing shards, each by its own name
DERIVED = ("report.html",)  # may lie beside the store's own files
_CODEC_ERROR = {"bf16": 0.004, "fp16": 0.001, "fp8": 0.04, "int8": 0.03}  # relative, of an image's features
_COMPUTE_ERROR = {"float32": 0.001, "bfloat16": 0.03, "float16": 0.005}  # between two batch sizes or devices


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file. `shard` and `added`: which commit record stands or falls with it, if any does."""

    path: str
    what: str
    shard: int | None = None
    added: str | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="feature store, local or s3://")
    parser.add_argument("--deep", action="store_true", help="encode a sample of the images again and compare")
    parser.add_argument("--images", action="append", default=[], help="for --deep: image folder or zip (repeatable)")
    parser.add_argument("--encoder", help="for --deep: where CLIP is now (default: what the store says)")
    parser.add_argument("--sample", type=int, default=32, help="for --deep: how many images (default: %(default)s)")
    parser.add_argument("--repair", action="store_true", help="remove bad shards, so that the next build redoes them")
    parser.add_argument("--threads", type=int, default=4, help="files read at a time (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.deep and not arguments.images:
        parser.error(f"--deep encodes the images of {arguments.store} again: say where they are with --images")
    if min(arguments.sample, arguments.threads) < 1:
        parser.error(f"--sample is {arguments.sample}, --threads is {arguments.threads}; give at least 1")
    try:
        check(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")


def check(arguments: argparse.Namespace) -> None:
    """Print what is wrong, and repair it if that is asked for; SystemExit if anything is.

    Raises:
        ValueError: if there is no store. OSError: if it cannot be read, or repaired, just now.
    """
    storage = Storage(arguments.store)
    spec = read_store(storage)
    problems = verify(storage, spec, arguments.threads)
    if arguments.deep and not problems:
        encoder = arguments.encoder or spec.encoder.id
        problems += compare_with_live_clip(storage, spec, tuple(arguments.images), encoder, arguments.sample)
    elif arguments.deep:
        print("deep: left out, only a store without the problems below is compared")
    if not problems:
        shards = spec.shards + len(retried(storage, spec))
        print(f"{storage.root}: {spec.samples} samples in {shards} shards, {len(spec.columns)} columns: all right")
        return
    print("\n".join(str(problem) for problem in problems))
    if arguments.repair:
        print(repair(storage, problems))
    again = "" if arguments.repair else "; run this again with --repair, then build again"
    sys.exit(f"{storage.root}: {len(problems)} problem(s){again}")


def verify(storage: Storage, spec: StoreSpec, threads: int = 4) -> list[Problem]:
    """Everything that is wrong with a store, except for the numbers of its features: `compare_with_live_clip`.

    Raises:
        OSError: for what is of the moment (permission, network, disk), and no fault of a shard.
    """
    from tqdm import tqdm

    there = storage.list()
    added = added_columns(storage)
    base = tuple(column.name for column in spec.columns if column.name not in added)
    later = retried(storage, spec)
    problems, commits = _readable_commits(storage, spec.shards + len(later), added)
    problems += _of_another_store(commits, spec)
    expected = {SPEC, FAILURES, MANIFEST, *DERIVED, *(f"columns/{name}.json" for name in added)}
    expected |= {retried_path(shard) for shard in later}
    # Only from the commit records: what they say of themselves, which files must be there, which tars to read.
    jobs = []
    for (shard, extra), commit in commits.items():
        names = (SAMPLES, *base) if extra is None else (extra,)
        expected |= {commit_path(shard, extra), *(tar_path(name, shard) for name in names)}
        whole = commits.get((shard, None))
        problems += [
            Problem(commit_path(shard, extra), what, shard, extra)
            for what in _faults(commit, whole, spec, names, _keys_of(shard, spec, later))
        ]
        if commit.shard != shard:
            problems.append(Problem(commit_path(shard, extra), f"is the record of shard {commit.shard}", shard, extra))
        jobs += [(commit, name, extra) for name in names if name in commit.files and commit.shard == shard]
    expected |= {problem.path for problem in problems}  # a damaged record is no foreign file too
    problems += [Problem(path, "foreign file: no commit record knows it") for path in there if path not in expected]
    problems += [Problem(path, "missing") for path in (FAILURES, MANIFEST) if path not in there]
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(jobs), unit=" tars", desc="verify") as bar:
        for found in pool.map(lambda job: _check_tar(storage, spec, *job), jobs):
            problems += found
            bar.update()
    if not problems and MANIFEST in there:
        problems += _wrong_manifest(storage, spec)
    return problems


def _wrong_manifest(storage: Storage, spec: StoreSpec) -> list[Problem]:
    """What is wrong with the manifest of a store whose commit records are sound."""
    try:
        if read_manifest(storage, spec).equals(manifest_table(storage, spec)):
            return []
    except ValueError as error:
        return [Problem(MANIFEST, str(error))]
    return [Problem(MANIFEST, "does not say what the commit records say; build again to renew it")]


def _of_another_store(commits: dict[tuple[int, str | None], Commit], spec: StoreSpec) -> list[Problem]:
    """A problem with `store.json` if all commit records name another store, else with each record that does."""
    others = [place for place, commit in commits.items() if commit.store not in (None, spec.digest)]
    if others and not any(commit.store == spec.digest for commit in commits.values()):
        what = "is not what the shards were made for: its seed, data set, encoder or another identity was changed"
        return [Problem(SPEC, f"{what}; restore it from a copy of the store")]
    return [Problem(commit_path(*place), "is the record of another store's shard", *place) for place in others]


def _keys_of(shard: int, spec: StoreSpec, later: Mapping[int, tuple[str, ...]]) -> tuple[str, ...]:
    """The keys that a shard's samples and failures have."""
    first = shard * spec.shard_size
    if shard in later:
        return later[shard]
    return tuple(f"{number:09d}" for number in range(first, min(first + spec.shard_size, spec.samples)))


def _readable_commits(
    storage: Storage, shards: int, added: Iterable[str]
) -> tuple[list[Problem], dict[tuple[int, str | None], Commit]]:
    """(a problem for each commit record that is missing or damaged, the others by shard and added column)."""
    problems: list[Problem] = []
    commits: dict[tuple[int, str | None], Commit] = {}
    for extra in (None, *added):
        there = committed(storage, extra)
        missing = [shard for shard in range(shards) if shard not in there]
        problems += [
            Problem(commit_path(shard, extra), "missing: the shard is not built", shard, extra)
            for shard in missing[:LISTED]
        ]
        if len(missing) > LISTED:
            problems.append(Problem(MANIFEST, f"{len(missing) - LISTED} further shards are not built"))
        for shard in sorted(shard for shard in there if shard < shards):
            try:
                commit = read_commit(storage, shard, extra)
                assert commit is not None
                commits[shard, extra] = commit
            except ValueError as error:
                problems.append(Problem(commit_path(shard, extra), f"damaged: {error}", shard, extra))
    return problems, commits


def _faults(
    commit: Commit, base: Commit | None, spec: StoreSpec, names: tuple[str, ...], expected: tuple[str, ...]
) -> Iterator[str]:
    """What cannot be true in a commit record.

    Args:
        base: the record of the whole shard, if it can be read. names: of its tars. expected: the keys of its records.
    """
    from pipeline.codec import payload_bytes

    keys = sorted({*commit.keys, *(failure.key for failure in commit.failures)})
    if keys != sorted(expected) or len(commit.keys) + len(commit.failures) != len(expected):
        yield f"holds {len(commit.keys)} samples and {len(commit.failures)} failures, for {len(expected)} records"
    if base is not None and (commit.keys, commit.images) != (base.keys, base.images):
        yield "holds other keys than the shard it belongs to"
    if set(commit.files) != set(names):
        yield f"has the columns {', '.join(sorted(commit.files))}; expected {', '.join(sorted(names))}"
    columns = {column.name: column for column in spec.columns}
    for name, file in commit.files.items():
        if name in columns:
            size = payload_bytes(columns[name], spec.codec)
            wanted = tuple(0 if image is None else size for image in commit.images)
            if file.sizes != wanted:
                yield f"{name} has members of another size than {size} bytes"


def _check_tar(storage: Storage, spec: StoreSpec, commit: Commit, name: str, added: str | None) -> list[Problem]:
    """Length, checksum, members and records of one tar against its commit record."""
    path, file = tar_path(name, commit.shard), commit.files[name]

    def wrong(what: str) -> list[Problem]:
        return [Problem(path, what, commit.shard, added)]

    try:
        with storage.local_copy(path) as local:
            size = local.stat().st_size
            if size != file.bytes:
                return wrong(f"{size} bytes long, the commit record says {file.bytes}")
            if (digest := sha256_of(local)) != file.sha256:
                return wrong(f"checksum {digest[:12]}..., the commit record says {file.sha256[:12]}...")
            with local.open("rb") as data:
                found = members(data)
                what = _wrong_members(found, commit, name, file, spec)
                if what is None and name == SAMPLES:
                    what = _wrong_records(data, commit, file)
    except FileNotFoundError:
        return wrong("missing")
    except (tarfile.TarError, OSError) as error:
        if isinstance(error, OSError) and not is_absent(error):
            # `repair` would remove a sound shard.
            raise OSError(error.errno or errno.EIO, f"{path} cannot be read just now: {error}") from error
        return wrong(f"unreadable: {error}")
    return [] if what is None else wrong(what)


def _wrong_members(
    found: list[tuple[str, int, int]], commit: Commit, name: str, file: ColumnFile, spec: StoreSpec
) -> str | None:
    """How `found`, (name, offset, size) of a tar's members, differ from those of the commit record, if they do."""
    suffix = "json" if name == SAMPLES else f"{name}.{spec.codec}"
    listed = [
        (f"{key}.{suffix}", offset, size)
        for key, offset, size in zip(commit.keys, file.offsets, file.sizes, strict=True)
        if offset >= 0
    ]
    own = [member for member in found if member[0].endswith(f".{suffix}")]
    if own != listed:
        return "its members are not those of the commit record"
    if len(found) > len(own) and not (name == SAMPLES and spec.stores_images):
        return f"{len(found) - len(own)} member(s) that do not belong there"
    return None


def _wrong_records(data: io.BufferedReader, commit: Commit, file: ColumnFile) -> str | None:
    """What is wrong with the first bad record of a samples tar, if there is one."""
    for key, image, offset, size in zip(commit.keys, commit.images, file.offsets, file.sizes, strict=True):
        data.seek(offset)
        try:
            sample = read_sample(data.read(size))
        except ValueError as error:
            return f"{key}.json is not a record: {error}"
        if (sample.key, sample.image) != (key, image):
            return f"{key}.json is the record of {sample.key} ({sample.image}), expected {image}"
    return None


def compare_with_live_clip(
    storage: Storage, spec: StoreSpec, images: tuple[str, ...], encoder: str, sample: int
) -> list[Problem]:
    """Encode evenly spread images again; a problem for each whose stored features are further off than rounding goes.

    Raises:
        ValueError: if `encoder` is not the one that the store was made with.
    """
    import torch

    from pipeline.codec import from_payload
    from pipeline.encoder import Encoder, describe_encoder
    from pipeline.encoders.decode import load_image
    from pipeline.images import ImageSource, index_zips

    weights = describe_encoder(encoder, spec.encoder.revision).revision
    if weights != spec.encoder.revision:
        raise ValueError(
            f"--encoder {encoder} is not the CLIP of this store: its weights are {weights}, those of the store are "
            f"{spec.encoder.revision}; name the model that the store was built with"
        )
    table = read_manifest(storage, spec)
    table = table.filter(table.column("image").is_valid())
    rows = spread(table, sample)
    columns = tuple(column for column in spec.columns if f"{column.name}.offset" in table.column_names)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    live = Encoder(encoder, None, columns, spec.compute, device)
    source, zips = ImageSource(images), index_zips(images, table.column("image").to_pylist())
    allowed = _CODEC_ERROR[spec.codec] + _COMPUTE_ERROR[spec.compute]
    problems, largest = [], 0.0
    for row in rows:
        try:
            picture = load_image(source.read(row["image"], [index.get(row["image"]) for index in zips]))
        except ValueError as fault:
            raise ValueError(f"{row['key']} ({row['image']}): {fault}; see --images") from fault
        features = live(torch.from_numpy(live.pixels(picture, spec.aspect))[None])
        for column in columns:
            path = tar_path(column.name, row["shard"])
            payload = storage.read_range(path, row[f"{column.name}.offset"], row[f"{column.name}.size"])
            raw = torch.frombuffer(bytearray(payload), dtype=torch.uint8)[None]
            # Both (1, tokens, width); the difference is relative to the length of the whole.
            stored, expected = from_payload(raw, column, spec.codec, torch.float32), features[column.name].float().cpu()
            error = float((stored - expected).norm() / expected.norm())
            largest = max(largest, error)
            if not error <= allowed:
                what = f"{row['key']} ({row['image']}) is {error:.2%} off live CLIP; {allowed:.2%} is rounding"
                problems.append(
                    Problem(path, what, row["shard"], column.name if column.name in added_columns(storage) else None)
                )
    print(f"deep: {len(rows)} images encoded again, {len(columns)} columns; largest relative difference {largest:.2e}")
    return problems


def repair(storage: Storage, problems: list[Problem]) -> str:
    """Remove the manifest, the commit records of the bad shards, then their bad tars; says what is left to do.

    A tar whose commit record is gone would be taken for a killed worker's work, so what is bad must go with it.
    """
    if any(problem.path == SPEC for problem in problems):
        return f"nothing was removed: restore {SPEC} first"
    bad = sorted({(p.shard, p.added) for p in problems if p.shard is not None}, key=str)
    storage.delete(MANIFEST)
    for shard, added in bad:
        storage.delete(commit_path(shard, added))
    for problem in problems:
        if problem.path.endswith(".tar") and problem.shard is not None:
            storage.delete(problem.path)
    foreign = [
        problem.path for problem in problems if problem.shard is None and problem.path not in (MANIFEST, FAILURES)
    ]
    said = f"removed {len(bad)} commit record(s) and the manifest; run pipeline/build_shards.py again to redo them"
    return said + (f"; left alone, remove by hand: {', '.join(foreign)}" if foreign else "")


if __name__ == "__main__":
    main()
