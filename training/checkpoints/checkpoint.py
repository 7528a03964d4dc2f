"""Checkpoints: whole or not there, the newest few kept, copied to a bucket, saved too when a scheduler says stop.

    <run>/checkpoints/ba00000500/               one checkpoint, for any engine
        composer.pt  zero/...  ep0-ba500/...    what Composer and the engine wrote
        heldout.json                            the evaluations so far, if there were any
        complete.json                           written last: step, engine, ranks, size and SHA-256 of every file

A folder without `complete.json` is not a checkpoint: that of a process which was killed while it wrote is passed over,
and swept by the next one. On a bucket the same names hold, `complete.json` is uploaded when everything else is there.
With several nodes and no common disk, each node keeps what its ranks wrote and fetches the rest from the bucket.
A run goes on from the newest one whose files are as they were written (resume.py beside this), and runs nothing that
they hold (safe.py).
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import checkpoint as composer_checkpoint
from composer.utils import create_interval_scheduler, dist
from torch.distributed.checkpoint.api import CheckpointException

from pipeline.storage import sync
from training.checkpoints.history import History
from training.checkpoints.mark import (
    FOLDER,
    MARK,
    Mark,
    checkpoint_folders,
    digest,
    file_sizes,
    folder_of,
    in_threads,
    read_mark,
    remove_checkpoint,
    write_mark,
)
from training.checkpoints.remote import Remote
from training.checkpoints.resume import in_bucket
from training.config import CheckpointSettings
from training.cost.memory import CHECKPOINT
from training.engines.base import Engine

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # schedulers' before they take a node away; Ctrl-C


class StopRequest:
    """Remembers the first of `SIGNALS` that this process got within the context, instead of dying of it.

    Ctrl-C counts before others: Composer's launcher hears it too and sends SIGTERM, whose handler may run within that
    of Ctrl-C, and end first. A second Ctrl-C ends the process at once.

    A signal may come at any moment, also within a collective. So its handler only takes a note; `agree` looks at the
    notes of all ranks after each step, when all are at the same place and the weights are whole.

    Attributes:
        signal: Ctrl-C, or else the first one that this process got, 0 if none.
        agreed: one that a rank had got when they agreed last, 0 if none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.agreed = 0

    def agree(self, number: int) -> int:
        """Look at the notes of all ranks, and for the largest `number` that any has on the same occasion. A collective.

        Ranks wait for each other once in a step: whoever has something rare to tell, tells it here.
        """
        self.agreed, largest = most(self.signal, number)
        return largest

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # the next one ends the process, also within a call that hangs
            os.write(2, b"\nstopping  after the step under way, with a checkpoint; Ctrl-C again ends it at once\n")
            self.signal = number
        self.signal = self.signal or number  # the first one stays


class Checkpoints(Callback):  # type: ignore[misc]
    """Saves every `settings.interval`, at the end of training, and after the step in which a stop was asked for.

    With `settings.keep_best` also after an evaluation whose loss is the lowest so far.

    Args:
        folder: of all checkpoints of the run.
        settings: interval, how many to keep, the bucket.
        engine: of the run; a resumed run must have the same.
        stop: says whether a scheduler wants this process to end; one rank's wish is all ranks', once they have agreed.
        left_out: keys of Composer's state that are not saved (`Engine.left_out`).
        history: the run's evaluations, of whoever makes them; it is saved too.

    Attributes:
        stopped: the signal that training stopped for, 0 if for none.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointSettings,
        engine: Engine,
        stop: StopRequest,
        left_out: list[str],
        history: History,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.engine = engine
        self.stop = stop
        self.left_out = left_out
        self.history = history
        self.stopped = 0
        self._due = create_interval_scheduler(settings.interval)
        self._saved = -1
        self._remote = None if settings.remote is None else Remote(settings.remote)
        self._unmarked: list[Path] = []  # uploads whose mark waits for those of other nodes
        self._overtaken: Path | None = None  # the best, where a newer one came before its upload was done

    def fit_start(self, state: State, logger: Logger) -> None:
        """End at once, if a stop was asked for while an evaluation was caught up with: nothing is new."""
        self.stopped = self.stop.agreed
        if self.stopped:
            state.stop_training()
        self._owe_best()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save if it is time, or if any rank was told to stop; then training ends."""
        self.stopped = self.stop.agreed
        due = self._due(state, Event.BATCH_CHECKPOINT)
        if due or self.stopped or self._best() == self._place(state):
            self.save(state)
        self._mark_remote()
        if self.stopped:
            state.stop_training()

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save if an epoch's end is the time for it."""
        if self._due(state, Event.EPOCH_CHECKPOINT):
            self.save(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Wait for the bucket.

        Raises:
            OSError: if it failed for longer than `remote_patience_s`; everything is on the local disk.
        """
        if self._remote is not None:
            # Files of every node first, then the mark, then the mark's own upload; then the best, if it was overtaken.
            while True:
                self._remote.wait(self.settings.remote_patience_s)
                dist.barrier()
                if not self._unmarked and self._overtaken is None:
                    return
                self._mark_remote()

    def upload_again(self, state: State, logger: Logger) -> None:
        """Bring the last checkpoint of a run that was cut off after it to the bucket, if that lacks it. A collective.

        Raises:
            OSError: if the bucket cannot be read, or as `fit_end`.
        """
        if self._remote is not None:
            self._owe_best()
            if not in_bucket(self._remote, self._place(state).name):
                self._upload_again(self._place(state))
            self.fit_end(state, logger)

    def save(self, state: State) -> None:
        """Write a checkpoint. A collective. Without room on a node's disk nothing is written, and training goes on.

        Raises:
            OSError: if writing fails all the same.
        """
        step = state.timestamp.batch.value
        if step == self._saved:
            return
        self._saved = step
        target = self._place(state)
        if _is_local_leader():
            self._sweep(step)
        if self._too_little_room(state):
            return
        dist.barrier()
        try:
            written = composer_checkpoint.save_checkpoint(
                state, filename=str(target / "composer.pt"), ignore_keys=self.left_out
            )
            self.engine.save(state, target)
            if self.history.measured and dist.get_global_rank() == 0:
                self.history.write(target)
        except (RuntimeError, CheckpointException) as error:  # PyTorch's words for a disk that is full or fails
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            raise OSError(f"{target} cannot be written: {error.__context__ or error}") from error
        dist.barrier()  # every rank has written
        # Composer returns its file, or one within a folder of shards, which is then loaded as a whole; on ranks that
        # wrote nothing, None.
        load = str(Path(written or target).relative_to(target))
        load = "composer.pt" if load in ("composer.pt", ".") else load.split("/", maxsplit=1)[0]
        self._commit(target, step, load)

    def _commit(self, target: Path, step: int, load: str) -> None:
        """Mark the checkpoint as whole, drop old ones, send it to the bucket. A collective.

        The first rank of each node lists the files that it sees: all of them on a common disk, those of its node
        otherwise. The mark names every file that anyone sees. A file is uploaded by the lowest rank that sees it; those
        who see it share the hashing. Files are flushed to the disk before the mark: a crash leaves no mark over files
        that are not there.
        """
        me = dist.get_global_rank()
        mine = file_sizes(target) if _is_local_leader() else {}
        seen: list[dict[str, int]] = dist.all_gather_object(mine)
        holders = _holders(seen)
        load = dist.all_gather_object(load)[0]
        sha256: dict[str, str] | None = None
        if self.settings.verify:
            share = [name for turn, (name, ranks) in enumerate(holders.items()) if ranks[turn % len(ranks)] == me]
            shares = dist.all_gather_object(in_threads(lambda name: digest(target / name), share))
            hashed = {name: text for part in shares for name, text in part.items()}
            sha256 = {name: hashed[name] for name in holders}
        files = {name: seen[ranks[0]][name] for name, ranks in holders.items()}
        if _is_local_leader():
            for name in mine:
                sync(target / name)
            run = self.engine.config.plain_identity()
            write_mark(target, Mark(step, self.engine.name, self.engine.ranks, load, files, sha256, run=run))
            self._rotate()
        self._upload(target, holders)
        dist.barrier()

    def _upload(self, target: Path, holders: dict[str, list[int]]) -> None:
        """Send a checkpoint to the bucket, if there is one: each file by the lowest rank that sees it."""
        if self._remote is None:
            return
        if _is_local_leader():
            me = dist.get_global_rank()
            self._remote.upload(target, [name for name, ranks in holders.items() if ranks[0] == me])
        self._unmarked.append(target)

    def _mark_remote(self) -> None:
        """Upload the mark of the newest checkpoint once every node has uploaded its files. A collective.

        An older one without a mark was overtaken by it and may lack files: it stays without.
        """
        if self._remote is None or not (self._unmarked or self._overtaken):
            return
        (waiting,) = most(int(not self._remote.idle))
        if waiting:
            return
        if self._unmarked:
            *older, newest = self._unmarked
            self._unmarked.clear()
            if self._best() in older:
                self._overtaken = self._best()
            if dist.get_global_rank() == 0 and (newest / MARK).is_file():
                self._remote.upload(newest, [MARK], then=self._rotate_remote)
            return
        folder, self._overtaken = self._overtaken, None
        if folder is not None and folder == self._best():
            self._upload_again(folder)

    def _upload_again(self, folder: Path) -> None:
        """Send a checkpoint to the bucket, if any node still has it. A collective."""
        seen = dist.all_gather_object(file_sizes(folder) if _is_local_leader() else {})
        if any(seen):
            self._upload(folder, _holders(seen))

    def _best(self) -> Path | None:
        """The checkpoint that is kept for its held-out loss, if there is one."""
        best = self.history.best if self.settings.keep_best else None
        return None if best is None else self.folder / folder_of(best.step)

    def _owe_best(self) -> None:
        """Send the best of a run that was cut off to the bucket, if that lacks it. A collective."""
        best = self._best()
        try:
            if self._remote is not None and best is not None and not in_bucket(self._remote, best.name):
                self._overtaken = best
        except OSError as error:
            log.warning("whether the bucket has the best checkpoint, %s, is not known: %s", best, error)

    def _place(self, state: State) -> Path:
        """The folder of a checkpoint of the present step."""
        return self.folder / folder_of(state.timestamp.batch.value)

    def _sweep(self, step: int) -> None:
        """Remove what is no whole checkpoint, and what a run that went back to an older one had written beyond it."""
        for folder in checkpoint_folders(self.folder):
            if read_mark(folder) is None or int(folder.name[2:]) >= step:
                remove_checkpoint(folder)

    def _rotate(self) -> None:
        """Remove the oldest whole checkpoints beyond `settings.keep`, but for the best, and one that is uploaded."""
        if self.settings.keep < 0:
            return
        whole = [folder for folder in checkpoint_folders(self.folder) if read_mark(folder) is not None]
        best = self._kept_best([folder.name for folder in whole])
        for folder in whole[: max(0, len(whole) - max(1, self.settings.keep))]:
            if folder.name not in best and (self._remote is None or not self._remote.needs(folder)):
                remove_checkpoint(folder)

    def _kept_best(self, whole: Sequence[str]) -> set[str]:
        """Of the checkpoints of these names, which are kept for their held-out loss."""
        return self.history.kept(whole) if self.settings.keep_best else set()

    def _rotate_remote(self) -> None:
        if self._remote is not None:
            self._remote.drop_old(FOLDER, MARK, self.settings.keep, self._kept_best)

    def _too_little_room(self, state: State) -> bool:
        """Whether a node's disk cannot hold another checkpoint; says so."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        learning = sum(p.numel() for group in state.optimizers[0].param_groups for p in group["params"])
        need = CHECKPOINT * learning
        (short,) = most(int(free < need and _is_local_leader()))
        if short:
            log.error(
                "step %d is not saved: a checkpoint takes about %.3g GB and %s has %.3g GB free on some node; make "
                "room, training goes on",
                state.timestamp.batch.value, need / 1e9, self.folder, free / 1e9,
            )  # fmt: skip
        return bool(short)


def _holders(seen: list[dict[str, int]]) -> dict[str, list[int]]:
    """What each rank sees of a checkpoint, files and bytes -> each file, and the ranks that see it."""
    return {name: [rank for rank, files in enumerate(seen) if name in files] for name in sorted(set().union(*seen))}


def _is_local_leader() -> bool:
    return bool(dist.get_local_rank() == 0)


def most(*values: int) -> list[int]:
    """Of each value, the largest of all ranks. A collective."""
    if dist.get_world_size() == 1:
        return list(values)
    on_gpu = torch.distributed.get_backend() == "nccl"
    tensor = torch.tensor(values).to("cuda" if on_gpu else "cpu", non_blocking=True)
    dist.all_reduce(tensor, reduce_operation="MAX")
    largest: list[int] = tensor.tolist()
    return largest
