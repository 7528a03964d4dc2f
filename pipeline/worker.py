"""Builds one shard after another: fetch, decode, encode, write, publish. Knows nothing of who schedules it.

Stages overlap: threads decode images ahead, the calling thread runs CLIP, one more thread writes the tars. At most
three batches are in flight, so memory does not depend on the size of a shard or of the data set.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.codec import to_payload
from pipeline.config import BuildConfig
from pipeline.encoder import Encoder, describe_encoder, family_of
from pipeline.encoders.base import VisionEncoder
from pipeline.encoders.decode import load_image
from pipeline.encoders.pixels import Pixels
from pipeline.images import ImageSource, MissingImageError
from pipeline.manifest import claim, read_commit, write_commit
from pipeline.schema import (
    SAMPLES,
    Column,
    ColumnFile,
    Commit,
    Conversation,
    Failure,
    FailureKind,
    Sample,
    StoreSpec,
    claim_path,
    shard_name,
    tar_path,
)
from pipeline.shard import TarWriter, image_member, members, sample_json, sha256_of
from pipeline.storage import Storage

log = logging.getLogger(__name__)

BATCHES_AHEAD = 2  # decoded ahead of CLIP; one more is being written


@dataclass
class _Item:
    """A sample on its way; `fault` says why it does not arrive, `kind` what kind of failure that is."""

    key: str
    image: str | None
    conversations: list[dict[str, Any]]
    pixels: Pixels | None = None  # float32 (3, side, side), until CLIP has seen them
    data: bytes | None = None  # of the source image, if it is to be stored
    size: tuple[int, int] | None = None  # width and height of the upright image, in pixels
    fault: str | None = None
    kind: FailureKind | None = "image"


@dataclass
class _Batch:
    """Consecutive samples of a shard, of which up to `batch_size` have images."""

    items: list[_Item]
    payloads: dict[str, torch.Tensor]  # column -> uint8 (images that CLIP has seen, payload bytes), on the CPU


class ShardWorker:
    """Holds CLIP; called with a row of `pipeline.plan.row_of`, it makes that shard exist.

    Args:
        config: the build's settings. spec: the store's identity, all its columns included.
        report: called with the place in the shard whenever the work goes on.
    """

    def __init__(
        self, config: BuildConfig, spec: StoreSpec, report: Callable[[str], None] = lambda place: None
    ) -> None:
        torch.set_num_threads(max(1, int(config.num_cpus)))
        self.config = config
        self.spec = spec
        self.report = report
        self.storage = Storage(config.store)
        self.source = ImageSource(config.image_roots)
        self.device = "cuda" if torch.cuda.is_available() and config.num_gpus > 0 else "cpu"
        self._encoders: dict[tuple[str, ...], Encoder] = {}

    @cached_property
    def family(self) -> VisionEncoder:
        """How images become pixels; read when there is a first image, as the encoder itself."""
        return family_of(self.config.encoder, self.config.revision)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Build the shard of `row`, if nobody has yet; says what came of it.

        A shard on which another job works is postponed, unless the row insists.
        """
        start = time.perf_counter()
        shard, base, names = int(row["shard"]), bool(row["base"]), tuple(row["columns"])
        outcome = {"shard": shard, "images": 0, "samples": 0, "bytes": 0, "failures": 0, "reasons": [], "made": False}
        outcome |= {"wasted": False, "postponed": False, "seconds": 0.0}
        if self._is_there(shard, base, names):
            return outcome
        if not claim(self.storage, shard, row["job"]) and not row["insist"]:
            return {**outcome, "postponed": True}
        with self.storage.scratch() as folder, torch.inference_mode():
            commit = self._build(row, folder, names)
            made = self._publish(commit, folder, base)
        self.storage.delete(claim_path(shard))
        # An added column fails for no sample of its own.
        failures = [failure for failure in commit.failures if base and failure.kind != "retried"]
        outcome |= {
            "images": sum(image is not None for image in commit.images),
            "samples": len(commit.keys),
            "bytes": sum(file.bytes for file in commit.files.values()),
            "failures": len(failures),
            "reasons": [f"{failure.source[:200]}: {failure.reason}" for failure in failures[:3]],
            "made": made,
            "wasted": not made,
        }
        return {**outcome, "seconds": time.perf_counter() - start}

    def _is_there(self, shard: int, base: bool, names: tuple[str, ...]) -> bool:
        """Whether the commit records exist: one for a whole shard (`base`), else one per added column."""
        wanted = [None] if base else list(names)
        return all(read_commit(self.storage, shard, name) is not None for name in wanted)

    def _build(self, row: Mapping[str, Any], folder: Path, names: tuple[str, ...]) -> Commit:
        """Write the tars of a shard into `folder`."""
        base = bool(row["base"])
        columns = tuple(column for column in self.spec.columns if column.name in names)
        with contextlib.ExitStack() as stack:
            writers = {
                name: stack.enter_context(TarWriter(folder / f"{name}.tar"))
                for name in (*((SAMPLES,) if base else ()), *names)
            }
            shard = _ShardInTheMaking(int(row["shard"]), writers, self.spec)
            writing = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="write"))
            written: Future[None] | None = None
            for items in self._decoded(row, self._skipped(row), stack):
                batch = _Batch(items, self._payloads(items, columns))
                if written is not None:  # one batch is written while CLIP sees the next, never two
                    written.result()
                written = writing.submit(shard.add, batch)
            if written is not None:
                written.result()
            commit = shard.finish()
        if not base or commit.shard >= self.spec.shards:
            self._lacks_none(commit, base)
        return commit

    def _skipped(self, row: Mapping[str, Any]) -> dict[str, Failure]:
        """The samples, by key, that the shard is not to hold even if they can be read now."""
        if row["base"]:
            said = "failed at first, a later shard holds it"
            return {key: Failure(key=key, source="", reason=said, kind="retried") for key in row["moved"]}
        base = read_commit(self.storage, int(row["shard"]))
        assert base is not None, "the base of a shard comes first"
        return {failure.key: failure for failure in base.failures}

    def _decoded(
        self, row: Mapping[str, Any], skipped: dict[str, Failure], stack: contextlib.ExitStack
    ) -> Iterator[list[_Item]]:
        """The shard's samples in order, in batches, their images decoded by threads."""
        pool = ThreadPoolExecutor(self.config.decode_threads, thread_name_prefix="decode")
        stack.callback(pool.shutdown, cancel_futures=True)  # after an error only what a thread has begun is waited for

        def submit(key: str, image: str | None, conversations: list[dict[str, Any]], places: Any) -> Future[_Item]:
            return pool.submit(self.decode, key, image, conversations, places, skipped.get(key))

        waiting: deque[dict[str, Future[_Item]]] = deque()
        for records in _batches(row["records"], self.config.batch_size):
            waiting.append({record[0]: submit(*record) for record in records})
            if len(waiting) > BATCHES_AHEAD:
                yield self._arrived(waiting.popleft())
        while waiting:
            yield self._arrived(waiting.popleft())

    def _arrived(self, batch: dict[str, Future[_Item]]) -> list[_Item]:
        """The samples of a batch, when they are decoded."""
        items = []
        for key, future in batch.items():
            self.report(f"sample {key}")
            items.append(future.result())
        return items

    def decode(
        self,
        key: str,
        image: str | None,
        conversations: list[dict[str, Any]],
        places: Any,
        skipped: Failure | None = None,
    ) -> _Item:
        """Fetch, decode and preprocess one image, in a thread; what is wrong with it becomes its fault.

        Raises:
            OSError: for what is no fault of the image: permission, network, disk, file handles. It ends the build.
            ValueError: if the encoder's configuration cannot be read here and now.
        """
        item = _Item(key, image, conversations)
        if skipped is not None:
            item.fault, item.kind = skipped.reason, skipped.kind
        if image is None or item.fault is not None:
            return item
        family = self.family  # an encoder that this machine cannot read is no fault of the image
        try:
            data = self.source.read(image, places)
            picture = load_image(data)
            item.size = picture.size
            item.pixels = family.pixels(picture, self.spec.aspect, self.spec.encoder.image_size)
            item.data = data if self.spec.stores_images else None
        except ValueError as error:
            item.fault = str(error)
            item.kind = "missing image" if isinstance(error, MissingImageError) else "image"
        return item

    def _payloads(self, items: list[_Item], columns: tuple[Column, ...]) -> dict[str, torch.Tensor]:
        """CLIP's columns of the sound images in the codec's bytes: {column: uint8 (images, payload bytes)}, on the CPU.

        An image whose features are not finite gets a fault and no row.

        Raises:
            ValueError: if a feature does not fit the codec.
        """
        sound = [item for item in items if item.pixels is not None]
        if not sound:
            return {}
        names = tuple(column.name for column in columns)
        if names not in self._encoders:  # keep the encoder of one set of columns: a worker rarely changes between them
            self.report("the loading of the encoder")
            self._encoders = {names: self._encoder(columns)}
        self.report(f"the features of {sound[0].key} to {sound[-1].key}")
        pixels = torch.from_numpy(np.stack([item.pixels for item in sound if item.pixels is not None]))
        features = self._encoders[names](pixels)  # {column: (images, tokens, width)}
        # (images,): whether every number of an image is finite, in every column
        finite = torch.stack([value.flatten(1).isfinite().all(dim=1) for value in features.values()]).all(dim=0)
        fine = finite.tolist()
        for item, is_fine in zip(sound, fine, strict=True):
            item.pixels = None
            if not is_fine:
                item.fault = f"features hold NaN or infinity (compute={self.spec.compute})"
                item.kind = "features"
        try:
            payloads = {name: to_payload(value, self.spec.codec) for name, value in features.items()}
        except ValueError as error:
            raise ValueError(f"in the images {sound[0].key} to {sound[-1].key}: {error}") from error
        return to_host(payloads if all(fine) else {name: value[finite] for name, value in payloads.items()})

    def _encoder(self, columns: tuple[Column, ...]) -> Encoder:
        """CLIP up to the deepest of these columns, on this worker's device.

        Raises:
            ValueError: if what has its name on this machine is another encoder than the store's.
        """
        config, wanted = self.config, self.spec.encoder.revision
        here = describe_encoder(config.encoder, config.revision).revision
        if here != wanted:
            raise ValueError(
                f"encoder {config.encoder} is another one on this machine than where the build was started: "
                f"{here[:12]} here, {wanted[:12]} there; copy it to every machine, or put it where all see the same"
            )
        return Encoder(config.encoder, config.revision, columns, self.spec.compute, self.device)

    def _lacks_none(self, commit: Commit, base: bool) -> None:
        """Check that an added column has the samples that the store holds, a shard of retried ones those of its list.

        No sample is listed twice: what would fail here for want of an image would be lost.
        """
        if not base:
            whole = read_commit(self.storage, commit.shard)
            assert whole is not None, "the base of a shard comes first"
            wanted, cure = set(whole.keys), "give the images of the first build"
        else:
            wanted = {*commit.keys, *(f.key for f in commit.failures if f.kind != "features")}
            files = f"all files of the store numbered {shard_name(commit.shard)} or higher"
            cure = f"give the images that --retry-failed had; if they are gone, delete {files}, and retry again"
        if lost := [f for f in commit.failures if f.key in wanted]:
            raise ValueError(
                f"shard {commit.shard}: of {len(wanted)} samples that it is to hold, {len(commit.keys)} can be read "
                f"now; {cure}" + "".join(f"\n  {f.source}: {f.reason}" for f in lost[:5])
            )

    def _publish(self, commit: Commit, folder: Path, base: bool) -> bool:
        """Tars first, the commit record last; what is there already is never changed."""
        files = dict(commit.files)
        for name, file in commit.files.items():
            path = tar_path(name, commit.shard)
            self.report(f"the publishing of {path}")
            if not self.storage.publish(path, folder / f"{name}.tar"):
                if self._is_there(commit.shard, base, tuple(commit.files)):
                    return False  # another worker was first
                files[name] = self._adopted(path, folder, file)
        if base:
            return write_commit(self.storage, commit.model_copy(update={"files": files}))
        # Each added column has a commit record.
        ones = {name: commit.model_copy(update={"files": {name: file}}) for name, file in files.items()}
        made = [write_commit(self.storage, one, name) for name, one in ones.items()]
        return all(made)

    def _adopted(self, path: str, folder: Path, mine: ColumnFile) -> ColumnFile:
        """A tar without a commit is what a killed worker left: take it if it holds the same members in the same places.

        Its features may differ in the last bits if it was computed on other hardware; its checksum is then the one
        that counts.
        """
        theirs = folder / "theirs.tar"
        self.storage.download(path, theirs)
        sha256 = sha256_of(theirs)
        if sha256 == mine.sha256:
            return mine
        with theirs.open("rb") as file:
            places = [(offset, size) for _, offset, size in members(file)]
        expected = [place for place in zip(mine.offsets, mine.sizes, strict=True) if place[0] >= 0]
        if path.startswith(f"{SAMPLES}/") or places != expected:
            raise ValueError(
                f"{self.storage.root}/{path} is there without a commit record, and holds something else; "
                "delete it, then run pipeline/build_shards.py again"
            )
        return mine.model_copy(update={"sha256": sha256, "bytes": theirs.stat().st_size})


class _ShardInTheMaking:
    """Appends batches to the tars of a shard and keeps what its commit record needs."""

    def __init__(self, shard: int, writers: dict[str, TarWriter], spec: StoreSpec) -> None:
        self.shard = shard
        self.writers = writers
        self.spec = spec
        self.samples: list[Sample] = []
        self.failures: list[Failure] = []

    def add(self, batch: _Batch) -> None:
        """Write the samples of a batch that have no fault, in order."""
        payloads = {name: value.numpy() for name, value in batch.payloads.items()}
        row = 0  # of the payloads, which have one for each image without a fault
        for item in batch.items:
            if item.fault is not None:
                failure = Failure(key=item.key, source=item.image or "", reason=item.fault, kind=item.kind)
                self.failures.append(failure)
                continue
            width, height = item.size or (None, None)
            conversations = tuple(Conversation.model_validate(c) for c in item.conversations)
            sample = Sample(key=item.key, image=item.image, width=width, height=height, conversations=conversations)
            self.samples.append(sample)
            for name, writer in self.writers.items():
                if name == SAMPLES:
                    writer.add(f"{item.key}.json", sample_json(sample))
                elif item.image is None:
                    writer.skip()
                else:
                    writer.add(f"{item.key}.{name}.{self.spec.codec}", payloads[name][row])
            if item.data is not None and SAMPLES in self.writers:
                self.writers[SAMPLES].attach(image_member(item.key, item.image or ""), item.data)
            row += item.image is not None  # text has no row

    def finish(self) -> Commit:
        """End the tars; the commit record of the shard."""
        words = [tuple(sum(len(turn.value.split()) for turn in c.turns) for c in s.conversations) for s in self.samples]
        return Commit(
            shard=self.shard,
            keys=tuple(sample.key for sample in self.samples),
            images=tuple(sample.image for sample in self.samples),
            words=tuple(words),
            files={name: writer.finish() for name, writer in self.writers.items()},
            failures=tuple(self.failures),
            store=self.spec.digest,
        )


def to_host(payloads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Columns of uint8 (images, payload bytes), on the CPU: from a GPU through page-locked memory, all at once."""
    if all(value.device.type == "cpu" for value in payloads.values()):
        return payloads
    host = {name: torch.empty(value.shape, dtype=value.dtype, pin_memory=True) for name, value in payloads.items()}
    for name, value in payloads.items():
        host[name].copy_(value, non_blocking=True)
    torch.cuda.synchronize()
    return host


def _batches(records: Any, batch_size: int) -> Iterator[list[Any]]:
    """Consecutive records, cut after every `batch_size` images."""
    batch: list[Any] = []
    images = 0
    for record in records:
        batch.append(record)
        images += record[1] is not None
        if images == batch_size:
            yield batch
            batch, images = [], 0
    if batch:
        yield batch
