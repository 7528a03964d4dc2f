"""The stream: from a feature store to this rank's part of each global batch, in an order that nothing can change.

`order.py` decides which examples make up a batch, `reader.py` reads them ahead of the trainer, `tars.py` and `cache.py`
know where bytes come from.
"""

from __future__ import annotations

import contextlib
import tarfile
import weakref
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset

from pipeline.codec import payload_bytes
from pipeline.manifest import fingerprint, read_manifest, read_store
from pipeline.schema import SAMPLES, StoreSpec, tar_path
from pipeline.storage import Storage
from training.stream.cache import Ahead, ShardCache, Use, most_bytes_in_use
from training.stream.order import Examples, Ints, OrderSettings, epoch_batches, use_of_shards
from training.stream.reader import Batch, Collate, Index, Reader
from training.stream.tars import FileTars, RangeTars, Tars, local_tars

__all__ = ["Batch", "Stream", "split"]

DOWNLOADS = 4  # tars of a remote store that each rank fetches ahead at a time


class Stream(IterableDataset[Batch]):
    """This rank's batches of one epoch after another, for `DataLoader(stream, batch_size=None, num_workers=0)`.

    The global batches are a function of (store, seed, epoch) and the order settings alone. Rank r of R takes B / R
    examples of each (`OrderSettings.share`), so every R that divides the global batch size B sees the same global
    batches, and all ranks have equally many. Each `iter()` starts the next epoch, or goes on in the middle of
    one after `load_state_dict`. Features lie in reused buffers: a batch is valid until the next one is asked for.

    Args:
        store_url: folder or s3:// prefix of a feature store.
        columns: which features to read; no other tar is opened.
        global_batch_size: examples (conversations) per optimizer step, over all ranks.
        seed: of the order.
        rank, world_size: which slice is ours.
        collate: makes the text tensors of a batch; called by one thread at a time.
        shuffle: False gives the store's own order.
        window_shards: examples are shuffled within so many shards (order.py).
        group_by_length: batches of one modality and similar length.
        together: conversations of an image one after another, its features read once for them, instead of apart.
        last_batch: what becomes of an epoch's last, partial batch (order.epoch_batches).
        threads: reader threads. prefetch: batches read ahead; memory is prefetch + 1 batches.
        cache_dir: for a remote store, where this node keeps shards; None reads members by ranged requests.
        cache_bytes: most bytes that the cache may hold.
        pin_memory: page-locked buffers, for asynchronous copies to a GPU.
        limit: only the first so many examples of the store's own order.

    Attributes:
        data_wait: seconds that the consumer waited for the last batch.

    Raises:
        ValueError: if the settings contradict each other or the store.
    """

    def __init__(
        self,
        store_url: str,
        columns: tuple[str, ...],
        *,
        global_batch_size: int,
        collate: Collate,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        window_shards: int = 16,
        group_by_length: bool = False,
        together: bool = False,
        last_batch: Literal["drop", "pad"] = "drop",
        threads: int = 4,
        prefetch: int = 2,
        cache_dir: str | None = None,
        cache_bytes: int | None = None,
        pin_memory: bool = False,
        limit: int | None = None,
    ) -> None:
        self.settings = OrderSettings(
            global_batch_size, seed, shuffle, window_shards, group_by_length, together, last_batch, limit
        )
        if global_batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"rank {rank} of {world_size} has no equal share of a global batch of {global_batch_size} examples; "
                "choose a global batch size that the number of ranks divides"
            )
        self.global_batch_size = global_batch_size
        self._share = self.settings.share(rank, world_size)
        storage = Storage(store_url)
        self.store = read_store(storage)
        self.fingerprint = fingerprint(storage)
        index, examples = read_index(storage, self.store, columns)
        self.examples = examples.first(limit)
        if not len(self.examples):
            raise ValueError(f"{store_url} holds no examples")
        self._index = index
        self._prefetch = prefetch
        self._cache = _cache(storage, cache_dir, cache_bytes, self.fingerprint)
        if self._cache is not None:
            self._check_room(self._cache)
            tars: Tars = FileTars(self._cache.open)
        elif storage.local_path("store.json") is not None:
            tars = local_tars(storage)
        else:
            tars = RangeTars(storage)
        self._reader = Reader(
            tars, index, self.examples, global_batch_size // world_size, collate, threads, prefetch, pin_memory
        )
        self._epoch = -1  # the epoch that the last iter() began
        self._handed_out = 0  # global batches of it that were yielded, those before a resume included
        self._resume: tuple[int, int] | None = None  # (epoch, batches) that the next iter() goes on from
        self._resumed_batches = 0
        self._running: weakref.ref[Generator[Batch, None, None]] | None = None  # weak: whoever iterates keeps it alive

    @property
    def data_wait(self) -> float:
        """Seconds that the consumer waited for the last batch."""
        return self._reader.data_wait

    def __len__(self) -> int:
        """Global batches per epoch."""
        return self.settings.batches(len(self.examples))

    def epoch_batches(self, epoch: int) -> Ints:
        """The order of an epoch: indices into `examples` of shape (batches, global_batch_size)."""
        return epoch_batches(self.examples, self.settings, epoch)

    def __iter__(self) -> Generator[Batch, None, None]:
        """Begin the next epoch (or the rest of one, after `load_state_dict`); ends an iteration still under way."""
        before = None if self._running is None else self._running()
        if before is not None:
            before.close()
        self._epoch, self._handed_out = self._resume or (self._epoch + 1, 0)
        self._resumed_batches, self._resume = self._handed_out, None
        running = self._batches()
        self._running = weakref.ref(running)
        return running

    def _batches(self) -> Generator[Batch, None, None]:
        order = self.epoch_batches(self._epoch)
        ahead = None
        if self._cache is not None:
            ahead = Ahead(self._cache, self._uses(order), self._handed_out, DOWNLOADS)
        try:
            with contextlib.closing(self._reader.read(order[self._handed_out :, self._share])) as batches:
                for batch in batches:
                    self._handed_out += 1
                    if ahead is not None:
                        ahead.at(self._handed_out - 1)
                    yield batch
        finally:
            if ahead is not None:
                ahead.close()

    def _uses(self, order: Ints) -> list[Use]:
        """Which tars an epoch needs, from which global batch to which; the reader is `prefetch` batches ahead."""
        index, uses = self._index, []
        for name in index.offsets:
            size = np.zeros(int(index.shard.max()) + 1, dtype=np.int64)
            np.maximum.at(size, index.shard, index.offsets[name] + index.sizes[name])
            size += tarfile.RECORDSIZE  # the end of the archive, which no member's place tells
            first, last = use_of_shards(order, self.examples, images=name != SAMPLES)
            uses += [
                Use(
                    tar_path(name, shard),
                    int(size[shard]),
                    max(0, int(first[shard]) - self._prefetch),
                    int(last[shard]),
                )
                for shard in np.flatnonzero(last >= 0).tolist()
            ]
        return uses

    def _check_room(self, cache: ShardCache) -> None:
        need = most_bytes_in_use(self._uses(self.epoch_batches(0)))
        if cache.max_bytes is not None and need > cache.max_bytes:
            raise ValueError(
                f"the cache may hold {cache.max_bytes / 1e9:.3g} GB, but this order of examples uses tars of "
                f"{need / 1e9:.3g} GB at once, and would fetch them again and again; raise cache_bytes, lower "
                f"window_shards (now {self.settings.window_shards}), or leave out cache_dir to read by ranged requests"
            )

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """The position, in Composer's dataset-state protocol.

        Args:
            num_samples: examples of this epoch that all ranks together have consumed.
            from_beginning: False if `num_samples` counts from the last resume instead.
        """
        samples = num_samples + (0 if from_beginning else self._resumed_batches * self.global_batch_size)
        epoch = max(self._epoch, 0)
        if self._resume is not None:
            epoch, batches = self._resume
            samples = samples or batches * self.global_batch_size
        elif samples == 0 and self._epoch >= 0 and self._handed_out == len(self):
            epoch += 1  # asked between two epochs
        return {"epoch": epoch, "samples": samples, "fingerprint": self.fingerprint, **asdict(self.settings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state` at the next `iter()`; the number of ranks may differ from that of the saved run.

        Raises:
            ValueError: if the state belongs to another store or to another order, naming the differences.
        """
        mine = self.state_dict(0, True)
        differing = [
            f"{name}: {state.get(name)!r} in the checkpoint, {mine[name]!r} now"
            for name in mine
            if name not in ("epoch", "samples") and state.get(name) != mine[name]
        ]
        if differing:
            raise ValueError(
                "the checkpoint's position belongs to another order of examples, so going on from it would repeat "
                "some and skip others; restore these settings, or start a new run:\n  " + "\n  ".join(differing)
            )
        batches, rest = divmod(state["samples"], self.global_batch_size)
        if rest or not 0 <= batches <= len(self):
            raise ValueError(
                f"the checkpoint's position, {state['samples']} examples into an epoch, is no batch boundary of an "
                f"epoch of {len(self)} batches of {self.global_batch_size}"
            )
        self._resume = (state["epoch"], batches)


def read_index(storage: Storage, store: StoreSpec, columns: tuple[str, ...]) -> tuple[Index, Examples]:
    """The manifest as arrays: where members lie, and every conversation in natural order.

    Raises:
        ValueError: if a column is missing, or its members have another size than the store's codec gives them.
    """
    known = {column.name: column for column in store.columns}
    missing = [name for name in columns if name not in known]
    if missing:
        raise ValueError(f"the store has no columns {', '.join(missing)}; it has {', '.join(known)}")
    table = read_manifest(storage)

    def numbers(name: str) -> Ints:
        array: Ints = table.column(name).to_numpy().astype(np.int64)
        return array

    names = (SAMPLES, *columns)
    payload = {name: payload_bytes(known[name], store.codec) for name in columns}
    index = Index(
        keys=table.column("key").to_pylist(),
        shard=numbers("shard"),
        offsets={name: numbers(f"{name}.offset") for name in names},
        sizes={name: numbers(f"{name}.size") for name in names},
        payload=payload,
    )
    has_image = ~table.column("image").is_null().to_numpy()
    for name, size in payload.items():
        wrong = np.flatnonzero(index.sizes[name] != np.where(has_image, size, 0))
        if len(wrong):
            raise ValueError(
                f"{name} of sample {index.keys[wrong[0]]} has {index.sizes[name][wrong[0]]} bytes, {size} were "
                f"expected in {store.codec}, or 0 for a sample without an image: the manifest does not fit store.json"
            )
    words = table.column("words").combine_chunks()
    counts = words.value_lengths().to_numpy().astype(np.int64)
    sample = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    first = np.cumsum(counts) - counts
    examples = Examples(
        sample=sample,
        conversation=np.arange(len(sample), dtype=np.int64) - first[sample],
        shard=index.shard[sample],
        words=words.flatten().to_numpy().astype(np.int64),
        has_image=has_image[sample],
    )
    return index, examples


def _cache(storage: Storage, folder: str | None, max_bytes: int | None, identity: str) -> ShardCache | None:
    if folder is None or storage.local_path("store.json") is not None:
        return None
    return ShardCache(storage, Path(folder), identity, max_bytes)


def split(batch: dict[str, Any], microbatch_size: int | float) -> list[Batch]:
    """Cut a batch into microbatches of at most so many examples, each with the images that belong to them.

    Positions that are padding in all rows of a microbatch are cut off on the right: they would only cost time.
    """
    size = int(microbatch_size)
    total = len(batch["keys"])
    image_rows = batch["image_rows"]
    parts = []
    for start in range(0, total, size):
        stop = min(start + size, total)
        first, last = torch.searchsorted(image_rows, torch.tensor([start, stop], device=image_rows.device)).tolist()
        part = Batch(
            {name: value[start:stop] for name, value in batch.items() if name not in ("columns", "image_rows")}
        )
        part["columns"] = {name: value[first:last] for name, value in batch["columns"].items()}
        part["image_rows"] = image_rows[first:last] - start
        parts.append(_trimmed(part))
    return parts


def _trimmed(part: Batch) -> Batch:
    mask = part.get("attention_mask")
    if mask is None:
        return part
    used = mask.any(dim=0).nonzero()
    width = int(used[-1]) + 1 if len(used) else mask.shape[1]
    for name, value in part.items():
        if isinstance(value, torch.Tensor) and value.shape == mask.shape and name != "attention_mask":
            part[name] = value[:, :width]
    part["attention_mask"] = mask[:, :width]
    return part
