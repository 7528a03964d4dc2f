#!/usr/bin/env python
"""Build a feature store: `python pipeline/build_shards.py [CONFIG.yaml] key=value ...`.

LLaVA JSON and images go in; CLIP features of several blocks come out as WebDataset shards. The same on a cluster:

    ray job submit --working-dir . -- pipeline/build_shards.py CONFIG.yaml key=value ...

Run it again after any interruption: it does what is missing and nothing else. `main` is the table of contents.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

from pipeline.config import BuildConfig, ConfigError, load_config

if TYPE_CHECKING:
    from pipeline.dataset import Dataset
    from pipeline.plan import Work
    from pipeline.schema import Column, Failure, StoreSpec

FAILURES_ALLOWED = 10  # at any rate: one bad image of twenty must not stop a trial run
OBJECT_STORE = 256 * 2**20  # bytes of a local Ray's object store: only rows of text go through it


def main() -> None:
    """Command line: configuration -> plan -> shards -> manifest."""
    arguments = parse_arguments()
    try:
        settings = [s for s in [arguments.config, *arguments.settings] if s and "=" in s]
        file = arguments.config if arguments.config and "=" not in arguments.config else None
        config = with_absolute_paths(load_config(BuildConfig, file, settings))
        dataset, spec = read_sources(config)
        if arguments.plan:
            print(plan(config, dataset, spec, arguments))
            return
        build(config, dataset, spec, arguments.retry_failed)
    except (ConfigError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the shards that are done stay, run the same command again")


def parse_arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings:\n" + "\n".join(_setting_lines()),
    )
    parser.add_argument("config", nargs="?", help="YAML file of settings")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, over those of the file")
    parser.add_argument(
        "--plan", "--dry-run", action="store_true", help="say what would be done and cost; write nothing"
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="try again what has failed (images that were missing): what is gained becomes new shards at the end",
    )
    parser.add_argument(
        "--rate", type=float, default=100.0, help="images/s of the whole cluster (default: %(default)s)"
    )
    parser.add_argument("--price", type=float, default=0.023, help="$ per GB and month (default: %(default)s)")
    parser.add_argument("--step-time", type=float, default=1.0, help="s per training step (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="images per GPU and training step (default: %(default)s)")
    arguments = parser.parse_intermixed_args()
    for name in ("rate", "step_time", "batch", "price"):
        value, free = getattr(arguments, name), name == "price"
        if not 0 <= value < float("inf") or (value == 0 and not free):
            wanted = "of at least 0" if free else "above 0"
            parser.error(f"--{name.replace('_', '-')} is {value:g}; give a number {wanted}")
    return arguments


def _setting_lines() -> Iterator[str]:
    """A line of `--help` for each setting."""
    for name, field in BuildConfig.model_fields.items():
        default = "required" if field.is_required() else f"default {field.default!r}"
        yield f"  {name:<15} {field.description} ({default})"


def with_absolute_paths(config: BuildConfig) -> BuildConfig:
    """The settings with paths that mean the same in every process, whatever folder it runs in.

    Raises:
        ConfigError: for a relative path in a job that was handed to Ray: it would lead into Ray's own copy of the
            working folder, which goes with the job.
    """

    def absolute(name: str, path: str) -> str:
        if "://" in path or Path(path).is_absolute():
            return path
        if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):  # `ray job submit` sets it
            raise ConfigError(
                f"{name}={path} is relative: in a Ray job it would lie in Ray's temporary copy of the working folder, "
                f"{Path.cwd()}, and be lost; give a path from the root that every node sees, or s3://"
            )
        return str(Path(path).absolute())

    return config.model_copy(
        update={
            "store": absolute("store", config.store),
            "data": tuple(absolute("data", path) for path in config.data_files),
            "images": tuple(absolute("images", path) for path in config.image_roots),
        }
    )


def read_sources(config: BuildConfig) -> tuple[Dataset, StoreSpec]:
    """The records and the identity of the store that they make.

    Raises:
        ValueError: if files are missing, are not LLaVA data, or the encoder does not have the blocks.
    """
    from pipeline.dataset import read_dataset
    from pipeline.encoder import columns_of, describe_encoder
    from pipeline.images import check_roots
    from pipeline.plan import count_shards
    from pipeline.schema import StoreSpec

    check_roots(config.image_roots)
    # A data set is millions of small objects that stay. The collector would look through them again and again, which
    # doubles the time; frozen, they are never looked at.
    gc.disable()
    dataset = read_dataset(config.data_files, config.seed, config.limit)
    gc.freeze()
    gc.enable()
    if not dataset.records:
        first = "; ".join(f"{failure.source}: {failure.reason}" for failure in dataset.failures[:1])
        raise ValueError(
            f"data: no usable record in {', '.join(config.data_files)} ({first or 'the files are empty'}); "
            "give LLaVA records, each with its conversations"
        )
    encoder = describe_encoder(config.encoder, config.revision)
    spec = StoreSpec(
        dataset=dataset.digest,
        samples=len(dataset.records),
        shards=count_shards(len(dataset.records), config.shard_size),
        shard_size=config.shard_size,
        seed=config.seed,
        encoder=encoder,
        aspect=config.aspect,
        compute=config.compute,
        codec=config.codec,
        columns=columns_of(encoder, config.blocks, config.cls),
        stores_images=config.store_images,
    )
    return dataset, spec


def plan(config: BuildConfig, dataset: Dataset, spec: StoreSpec, arguments: argparse.Namespace) -> str:
    """What `build` would do.

    Raises:
        ValueError: if the store belongs to another build.
    """
    from pipeline.images import absent_images
    from pipeline.manifest import SPEC, check
    from pipeline.plan import report, todo
    from pipeline.storage import Storage

    storage = Storage(config.store)
    known = check(storage, spec) if storage.exists(SPEC) else None
    left = todo(storage, known or spec, spec.columns)
    names = [record.image for record in dataset.records if record.image is not None]
    absent = absent_images(config.image_roots, names)
    prices = {name: getattr(arguments, name) for name in ("rate", "price", "step_time", "batch")}
    return report(config, spec, dataset, left, absent, prices)


def build(config: BuildConfig, dataset: Dataset, spec: StoreSpec, retry: bool = False) -> None:
    """Make the store complete: what is missing is encoded by Ray, then the manifest is written.

    With `retry`, failed samples that can be stored now become new shards.

    Raises:
        ValueError: if the store belongs to another build, or too many samples fail.
    """
    from pipeline.manifest import claimed, create_or_check, known_failures, write_failures, write_manifest
    from pipeline.plan import missing_names
    from pipeline.schema import claim_path
    from pipeline.storage import Storage

    start = time.perf_counter()
    refuse_bad_records(config, dataset, spec)
    storage = Storage(config.store)
    storage.sweep_scratch()
    columns = spec.columns
    spec = create_or_check(storage, spec)
    try:
        build_missing(config, dataset, spec, columns, count_known=not retry)
        if retry:
            from pipeline.retry import list_readable

            failed, readable = list_readable(config, dataset, spec)
            print(f"retried: {readable} of {failed} failed samples can be stored now", flush=True)
            build_missing(config, dataset, spec, columns, count_known=True)
            left = [*dataset.failures, *known_failures(storage)]
            refuse_too_many(config, spec, len(left), [f"{failure.source}: {failure.reason}" for failure in left[:1]])
    except TooManyFailuresError as error:
        write_failures(storage, dataset.failures)
        raise TooManyFailuresError(f"{error}{missing_names(config, known_failures(storage))}") from error
    samples = write_manifest(storage, dataset.failures)
    for shard in claimed(storage):
        storage.delete(claim_path(shard))
    storage.sweep_scratch()
    failures = len(dataset.failures) + spec.samples - samples
    print(f"done: {samples} samples, {failures} failures (failures.jsonl), {time.perf_counter() - start:.0f} s")
    if samples == 0:
        raise ValueError(
            f"every one of {spec.samples} samples failed; see {config.store}/failures.jsonl for the reasons, mend the "
            f"images, then run this again with --retry-failed{missing_names(config, known_failures(storage))}"
        )


def build_missing(
    config: BuildConfig, dataset: Dataset, spec: StoreSpec, columns: tuple[Column, ...], count_known: bool
) -> None:
    """Build the shards that lack something of `columns`; `count_known`: failures of before count against the bound.

    Raises:
        TooManyFailuresError: if there are more than the configuration allows.
    """
    from pipeline.manifest import known_failures
    from pipeline.plan import todo
    from pipeline.storage import Storage

    storage = Storage(config.store)
    work = todo(storage, spec, columns)
    wanted = ", ".join(column.name for column in columns)
    said = f"{config.store}: {spec.samples} samples in {spec.shards} shards"
    print(f"{said}, {len(work)} to do; columns {wanted} in {spec.codec}", flush=True)
    pending = {key for item in work for key in item.keys}  # they may come out well this time
    known = [failure for failure in known_failures(storage) if failure.key not in pending] if count_known else []
    progress = _Progress(config, spec, [*dataset.failures, *known])
    # Base shards first: a column is only added to samples that are there.
    for part in ([w for w in work if w.base], [w for w in work if not w.base]):
        if part:
            build_on_ray(config, dataset, spec, part, progress)


class TooManyFailuresError(ValueError):
    """The rate of failures is above what the configuration allows."""


def allowed_failures(config: BuildConfig, spec: StoreSpec) -> float:
    """How many failures a build goes on with: a rate, and some at any rate."""
    return max(FAILURES_ALLOWED, config.max_failures * spec.samples)


def refuse_bad_records(config: BuildConfig, dataset: Dataset, spec: StoreSpec) -> None:
    """Raise TooManyFailuresError if too many records are unusable: before a store is bound to the data as they are."""
    bad, allowed = dataset.failures, allowed_failures(config, spec)
    if len(bad) > allowed:
        raise TooManyFailuresError(
            f"{len(bad)} records are unusable, {allowed:.0f} are allowed (max_failures); correct them in the data, or "
            "raise max_failures" + "".join(f"\n  {failure.source}: {failure.reason}" for failure in bad[:5])
        )


def refuse_too_many(config: BuildConfig, spec: StoreSpec, failures: int, reasons: list[str]) -> None:
    """Raise TooManyFailuresError above the bound, with the first reason."""
    allowed = allowed_failures(config, spec)
    if failures > allowed:
        raise TooManyFailuresError(
            f"{failures} samples have failed, {allowed:.0f} are allowed (max_failures); the reasons are in "
            f"failures.jsonl of the store, for example {', '.join(reasons[:1])}. Mend the images and run again with "
            "--retry-failed, or raise max_failures and run again"
        )


def build_on_ray(config: BuildConfig, dataset: Dataset, spec: StoreSpec, work: list[Work], progress: _Progress) -> None:
    """Let Ray Data spread the shards over a pool of workers: one row is one shard, no feature passes through Ray."""
    from pipeline.cluster import joined
    from pipeline.images import index_zips
    from pipeline.manifest import claimed, retried
    from pipeline.plan import row_of, shard_records
    from pipeline.storage import Storage

    storage = Storage(config.store)
    zips = index_zips(config.image_roots, (record.image for record in dataset.records))
    job, others = uuid.uuid4().hex, claimed(storage)
    moved = {key for keys in retried(storage, spec).values() for key in keys}
    # What another job works on comes last: it is there by then, unless that job was killed.
    work = sorted(work, key=lambda item: item.shard in others)
    rows = []
    for item in work:
        records = shard_records(dataset.records, spec, item.shard, item.keys)
        rows.append(row_of(item, records, zips, job, item.shard in others, moved))
    progress.begin(rows)
    with joined(config.ray_address, None if config.num_gpus else 0, OBJECT_STORE):
        from pipeline.scheduling import count_workers, schedule  # it imports ray, which `joined` has to do first

        workers = count_workers(config)
        while rows:
            with contextlib.closing(schedule(config, spec, rows, min(workers, len(rows)), progress.say)) as outcomes:
                for outcome in outcomes:
                    progress(outcome)
            # Another job had claimed the postponed shards. What it has not finished by now is built here.
            rows = [{**row, "insist": True} for row in rows if row["shard"] in progress.postponed]
            progress.postponed.clear()
    progress.close()


class _Progress:
    """Counts outcomes: a bar with rate and ETA, and the stop when too many samples fail."""

    def __init__(self, config: BuildConfig, spec: StoreSpec, known: list[Failure]) -> None:
        self.config, self.spec = config, spec
        self.failures = len(known)  # a rerun must not start counting anew
        self.reasons = [f"{failure.source}: {failure.reason}" for failure in known[:1]]
        self.postponed: set[int] = set()

    def begin(self, rows: list[dict[str, Any]]) -> None:
        """A bar for these shards.

        Raises:
            TooManyFailuresError: if there were too many failures before.
        """
        from tqdm import tqdm

        refuse_too_many(self.config, self.spec, self.failures, self.reasons)
        self.wasted = 0
        self.samples = {row["shard"]: len(row["records"]) for row in rows}
        self.bar = tqdm(total=sum(self.samples.values()), unit=" samples", mininterval=1.0, desc="encode")

    def __call__(self, outcome: dict[str, Any]) -> None:
        """Take note of a shard's outcome.

        Raises:
            TooManyFailuresError: naming the first reasons.
        """
        if outcome["postponed"]:
            self.postponed.add(outcome["shard"])
            return
        self.failures += outcome["failures"]
        self.wasted += outcome["wasted"]
        self.bar.update(self.samples[outcome["shard"]])
        self.bar.set_postfix(failures=self.failures)
        for reason in outcome["reasons"]:
            self.bar.write(f"failed: {reason}")
        try:
            refuse_too_many(self.config, self.spec, self.failures, outcome["reasons"])
        except TooManyFailuresError:
            self.bar.close()
            raise

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.bar.write(line)

    def close(self) -> None:
        """End the bar."""
        self.bar.close()
        if self.wasted:
            why = "another job works on the same store, or an answer of S3 was lost"
            print(f"{self.wasted} shard(s) were there when they were to be written: {why}")


if __name__ == "__main__":
    main()
