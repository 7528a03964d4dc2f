"""Reads one rank's batches ahead of the trainer: threads fill a ring of reused, optionally pinned buffers.

The work of a batch is cut by image; each thread reads members straight into the batch's place in memory, so a feature
byte is copied once between the page cache and the device. The thread that finishes a batch last also collates its text.
Memory is (prefetch + 1) batches of the wanted columns, whatever the shuffle window.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from pipeline.schema import SAMPLES, Sample, tar_path
from pipeline.shard import read_sample
from training.config import ReadSettings
from training.stream.batch import Batch
from training.stream.index import Index
from training.stream.order import Examples, Ints
from training.stream.tars import Tars
from training.text.collate import Example

# B examples -> the text side of a batch. A bool tensor `shows_image` (B,) in it says whose features are needed after
# all; without one, those of every example that has an image are.
Collate = Callable[[list[Example]], dict[str, Any]]


class Reading(ReadSettings):
    """Which part of each global batch this process reads, and how."""

    rank: int = Field(default=0, ge=0)
    world_size: int = Field(default=1, gt=0, description="ranks that share each global batch")
    pin_memory: bool = Field(default=False, description="page-locked buffers, for asynchronous copies to a GPU")

    @classmethod
    def of(cls, settings: ReadSettings, rank: int = 0, world_size: int = 1, pin_memory: bool = False) -> Reading:
        """How a rank reads by `settings` (a run's `config.data`)."""
        chosen = settings.model_dump(include=set(ReadSettings.model_fields))
        return cls(rank=rank, world_size=world_size, pin_memory=pin_memory, **chosen)


class _Buffers:
    """Room for one batch's features: uint8 (rows, bytes of an image) for each column.

    A copy from pinned memory to the device runs on after the call that asked for it. So whoever fills these buffers
    again first waits for an event of the device's queue, which `release` put behind all copies of the last batch.
    """

    def __init__(self, payload: dict[str, int], rows: int, pin: bool) -> None:
        self.columns = {
            name: torch.empty((rows, size), dtype=torch.uint8, pin_memory=pin) for name, size in payload.items()
        }
        self.rows = {name: tensor.numpy() for name, tensor in self.columns.items()}  # the same memory, to read into
        self._pinned = pin
        self._event: Any = None

    def release(self) -> None:
        """The consumer has asked for all its copies: note where the device's queue stands now."""
        if self._pinned:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> None:
        """Block until the device has made those copies."""
        if self._event is not None:
            self._event.synchronize()


class Reader:
    """Turns lists of examples into batches. One iteration at a time: the buffers are shared between them."""

    def __init__(
        self, tars: Sequence[Tars], index: Index, examples: Examples, rows: int, collate: Collate, reading: Reading
    ) -> None:
        self.tars = tars  # of each store
        self.index = index
        self.examples = examples
        self.threads = reading.threads
        self.collate = collate
        self.collate_lock = threading.Lock()  # so that the caller's function need not be safe for threads
        self.data_wait = 0.0
        # A ring: one batch is with the consumer, the others are being filled or are full.
        count = reading.prefetch + 1
        need = count * rows * sum(index.payload.values())
        said = (
            f"no memory for {count} batches of {rows} examples, {-(-need // 10**9):,} GB (prefetch {reading.prefetch}, "
            f"columns {', '.join(index.payload)}); take smaller batches, less prefetch, or fewer columns"
        )
        if need > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):  # which allocators promise all the same
            raise ValueError(said)
        try:
            self._free = [_Buffers(index.payload, rows, reading.pin_memory) for _ in range(count)]
        except RuntimeError as error:  # of torch's allocators
            raise ValueError(said) from error

    def key(self, store: int, sample: str, conversation: int) -> str:
        """What an example is called: `<sample key>#<conversation>`, with its store where there are several."""
        return f"{f'store{store}:' if len(self.tars) > 1 else ''}{sample}#{conversation}"

    def of(self, store: int) -> str:
        """Which of several stores a message is about."""
        return f" of store{store}" if len(self.tars) > 1 else ""

    def read(self, batches: Ints) -> Generator[Batch, None, None]:
        """Yield a batch for each row of `batches`, example indices of shape (batches, rows), in order.

        Raises:
            ValueError: if a tar does not hold what the manifest says.
            OSError: if a tar cannot be read.
        """
        todo = iter(batches)
        waiting: deque[_Job] = deque()  # in the order in which they are handed out
        free, self._free = self._free, []
        assert free, "two iterations over one stream share its buffers: finish the first"
        every = list(free)  # for the next iteration, wherever this one ends
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="stream")
        try:
            while True:
                # Begin a batch for each free buffer, then hand out the oldest.
                while free and (rows := next(todo, None)) is not None:
                    waiting.append(_Job(self, rows, free.pop()))
                    waiting[-1].start(pool)
                if not waiting:
                    return
                start = time.perf_counter()
                job = waiting.popleft()
                batch = job.done.result()
                self.data_wait = time.perf_counter() - start
                try:
                    yield batch
                finally:
                    job.buffers.release()
                free.append(job.buffers)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # before the buffers are free: threads may write into them
            self._free = every


class _Job:
    """One batch in the making: parts of it run in threads, and the one that ends last completes it.

    Args:
        rows: example indices, (B,). buffers: free ones, which are this job's until its batch is let go.
    """

    def __init__(self, reader: Reader, rows: npt.NDArray[np.int64], buffers: _Buffers) -> None:
        self.reader = reader
        self.rows = rows
        self.buffers = buffers
        self.done: Future[Batch] = Future()
        examples = reader.examples
        self._examples: list[Example | None] = [None] * len(rows)
        self._image_rows = np.flatnonzero(examples.has_image[rows])  # (I,), the rows that have an image
        self._slot = {int(row): slot for slot, row in enumerate(self._image_rows)}  # row -> its place in the buffers
        self._users: dict[int, list[int]] = {}  # sample -> its rows in this batch: read once, copied to the others
        for row, sample in enumerate(examples.sample[rows].tolist()):
            self._users.setdefault(sample, []).append(row)
        self._left = 0  # parts that still run
        self._lock = threading.Lock()  # guards `_left`, and who sets `done`

    def start(self, pool: ThreadPoolExecutor) -> None:
        """Share the samples out in order of place, so that each thread stays in few files."""
        samples = sorted(self._users)
        parts = [part.tolist() for part in np.array_split(samples, min(self.reader.threads, len(samples)))]
        self._left = len(parts)
        for part in parts:
            pool.submit(self._run, part)

    def _run(self, samples: list[int]) -> None:
        """Read one part's samples; the last part to end also makes the batch."""
        try:
            if not self.done.done():  # another part may have failed
                self.buffers.wait()
                for sample in samples:
                    self._read_sample(sample, self._users[sample])
        except BaseException as error:  # whatever it is, it belongs to the thread that waits for the batch
            self._fail(error)
        # Exactly one part sees the count fall to 0. All others have then read what they had to, or failed.
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last and not self.done.done():
            try:
                self.done.set_result(self._finish())
            except BaseException as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Hand the first error of all parts to whoever waits for the batch."""
        with self._lock:
            if not self.done.done():
                self.done.set_exception(error)

    def _read_sample(self, sample: int, rows: list[int]) -> None:
        """Read a sample's record, and its features if it has an image, for all `rows` of the batch that use it."""
        index, reader = self.reader.index, self.reader
        store, shard = index.place(int(index.shard[sample]))
        tars = reader.tars[store]
        # The record first: it says which conversation each row asks for.
        text = bytearray(int(index.sizes[SAMPLES][sample]))
        tars.read_into(tar_path(SAMPLES, shard), int(index.offsets[SAMPLES][sample]), memoryview(text))
        record = self._record(sample, rows, bytes(text))
        has_image = record.image is not None
        for row in rows:
            number = int(reader.examples.conversation[self.rows[row]])
            conversation = record.conversations[number]
            key = reader.key(store, record.key, number)
            self._examples[row] = Example(key, conversation, has_image, record.image, store)
        if has_image:
            # Rows that share an image have a place each in the buffers: read into the first, copy to the others.
            first, *others = (self._slot[row] for row in rows)
            for name, target in self.buffers.rows.items():
                tars.read_into(tar_path(name, shard), int(index.offsets[name][sample]), memoryview(target[first]))
                for slot in others:
                    target[slot] = target[first]

    def _record(self, sample: int, rows: list[int], data: bytes) -> Sample:
        """The record of a sample, which must be the one that the manifest says is there; ValueError if it is not."""
        index, examples, chosen = self.reader.index, self.reader.examples, self.rows[rows]
        store, shard = index.place(int(index.shard[sample]))
        key, path = index.keys[sample], tar_path(SAMPLES, shard)
        try:
            record = read_sample(data)
            if (record.key, record.image is not None) != (key, bool(examples.has_image[chosen[0]])):
                raise ValueError(f"it is that of {record.key} ({record.image or 'text only'})")
            if len(record.conversations) <= examples.conversation[chosen].max():
                raise ValueError(f"it has {len(record.conversations)} conversations, the manifest more")
        except ValueError as error:
            raise ValueError(
                f"{key}.json in {path}{self.reader.of(store)} is not the record that the store's manifest says: "
                f"{error}; run pipeline/verify_shards.py on the store"
            ) from error
        return record

    def _finish(self) -> Batch:
        """The batch, once all its samples are read."""
        examples = [example for example in self._examples if example is not None]
        assert len(examples) == len(self.rows)
        with self.reader.collate_lock:
            batch = Batch(self.reader.collate(examples))
        image_rows = torch.from_numpy(self._image_rows.astype(np.int64))  # (I,)
        columns = {name: tensor[: len(image_rows)] for name, tensor in self.buffers.columns.items()}
        shown = batch.pop("shows_image", None)  # bool (B,)
        if shown is not None and not shown[image_rows].all():  # rare: an example lost its image, so its features go
            columns = {name: tensor[shown[image_rows]] for name, tensor in columns.items()}
            image_rows = image_rows[shown[image_rows]]
        batch["columns"], batch["image_rows"] = columns, image_rows
        batch["keys"] = [example.key for example in examples]
        if len(self.reader.tars) > 1:
            batch["stores"] = torch.tensor([example.store for example in examples])
        return batch
