"""Checkpoints: whole or not there, the newest few kept, copied to a bucket, saved too when a scheduler says stop.

    <run>/checkpoints/ba00000500/               one checkpoint, for any engine
        composer.pt  zero/...  ep0-ba500/...    what Composer and the engine wrote
        complete.json                           written last: step, engine, ranks, and the size of every file

A folder without `complete.json`, or with a file of another size, is not a checkpoint: that of a process which was
killed while it wrote is passed over, and swept by the next one. On a bucket the same names hold, `complete.json` is
uploaded when everything else is there. With several nodes and no common disk, each node keeps what its ranks wrote
and fetches the rest from the bucket. Checkpoints are pickles: go on only from folders and buckets that you trust.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import checkpoint as composer_checkpoint
from composer.utils import create_interval_scheduler, dist

from pipeline.storage import sync
from training.checkpoints.remote import Remote
from training.config import CheckpointSettings
from training.cost.memory import CHECKPOINT
from training.engines import engine_class
from training.engines.base import Engine

log = logging.getLogger(__name__)

MARK = "complete.json"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # schedulers' before they take a node away; Ctrl-C
_FOLDER = re.compile(r"ba(\d{8,})")


@dataclass(frozen=True)
class Mark:
    """What `complete.json` says: `load` is the file or folder that Composer loads, `files` maps names to bytes."""

    step: int
    engine: str
    ranks: int
    load: str
    files: dict[str, int]

    @property
    def whole_file(self) -> bool:
        """Whether composer.pt holds whole weights, not the shards of one rank.

        Raises:
            ValueError: if the engine is not known here.
        """
        return engine_class(self.engine).whole_file


class StopRequest:
    """Remembers the first of `SIGNALS` that this process got within the context, instead of dying of it.

    A second Ctrl-C ends the process at once.

    A signal may come at any moment, also within a collective. So its handler only takes a note; `Checkpoints` looks at
    the notes of all ranks after each step, when all are at the same place and the weights are whole.
    """

    def __init__(self) -> None:
        self.signal = 0

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
        self.signal = self.signal or number  # the first one stays


class Checkpoints(Callback):  # type: ignore[misc]
    """Saves every `settings.interval`, at the end of training, and after the step in which a stop was asked for.

    Args:
        folder: of all checkpoints of the run.
        settings: interval, how many to keep, the bucket.
        engine: of the run; a resumed run must have the same.
        stop: says whether a scheduler wants this process to end; one rank's wish is all ranks'.
        left_out: keys of Composer's state that are not saved (`Engine.left_out`).

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
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.engine = engine
        self.stop = stop
        self.left_out = left_out
        self.stopped = 0
        self._due = create_interval_scheduler(settings.interval)
        self._saved = -1
        self._remote = None if settings.remote is None else Remote(settings.remote)
        self._unmarked: list[Path] = []  # uploads whose mark waits for those of other nodes

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save if it is time, or if any rank was told to stop; then training ends."""
        self.stopped = _most(self.stop.signal)
        due = self._due(state, Event.BATCH_CHECKPOINT)
        if due or self.stopped:
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
            # Files of every node first, then the mark, then the mark's own upload.
            self._remote.wait(self.settings.remote_patience_s)
            dist.barrier()
            self._mark_remote()
            self._remote.wait(self.settings.remote_patience_s)

    def save(self, state: State) -> None:
        """Write a checkpoint. A collective. Without room on a node's disk nothing is written, and training goes on."""
        step = state.timestamp.batch.value
        if step == self._saved:
            return
        self._saved = step
        target = self.folder / f"ba{step:08d}"
        if _is_local_leader():
            self._sweep(step)
        if self._too_little_room(state):
            return
        dist.barrier()
        written = composer_checkpoint.save_checkpoint(
            state, filename=str(target / "composer.pt"), ignore_keys=self.left_out
        )
        self.engine.save(state, target)
        dist.barrier()  # every rank has written
        # Composer returns its file, or one within a folder of shards, which is then loaded as a whole; on ranks that
        # wrote nothing, None.
        load = str(Path(written or target).relative_to(target))
        load = "composer.pt" if load in ("composer.pt", ".") else load.split("/", maxsplit=1)[0]
        self._commit(target, step, load)

    def _commit(self, target: Path, step: int, load: str) -> None:
        """Mark the checkpoint as whole, drop old ones, send it to the bucket. A collective.

        The first rank of each node lists the files that it sees: all of them on a common disk, those of its node
        otherwise. The mark names every file that anyone sees. A file is uploaded by its owner, the lowest rank that
        sees it. Files are flushed to the disk before the mark: a crash leaves no mark over files that are not there.
        """
        mine = _sizes(target) if _is_local_leader() else {}
        seen: list[dict[str, int]] = dist.all_gather_object(mine)
        owner = {name: rank for rank, files in reversed(list(enumerate(seen))) for name in files}  # the lowest stays
        load = dist.all_gather_object(load)[0]
        files = {name: seen[rank][name] for name, rank in sorted(owner.items())}
        mark = Mark(step, self.engine.name, self.engine.ranks, load, files)
        if _is_local_leader():
            for name in mine:
                sync(target / name)
            _replace(target / MARK, json.dumps(asdict(mark), indent=1))
            self._rotate()
            if self._remote is not None:
                own = [name for name, rank in owner.items() if rank == dist.get_global_rank()]
                self._remote.upload(target, own)
        if self._remote is not None:
            self._unmarked.append(target)
        dist.barrier()

    def _mark_remote(self) -> None:
        """Upload the mark of the newest checkpoint once every node has uploaded its files. A collective.

        An older one without a mark was overtaken by it and may lack files: it stays without.
        """
        if self._remote is None or not self._unmarked:
            return
        waiting = _most(int(not self._remote.idle))
        if not waiting:
            newest = self._unmarked[-1]
            self._unmarked.clear()
            if dist.get_global_rank() == 0 and (newest / MARK).is_file():
                self._remote.upload(newest, [MARK], then=self._rotate_remote)

    def _sweep(self, step: int) -> None:
        """Remove what is no whole checkpoint, and what a run that went back to an older one had written beyond it."""
        for folder in _folders(self.folder):
            if read_mark(folder) is None or int(folder.name[2:]) >= step:
                _remove(folder)

    def _rotate(self) -> None:
        """Remove the oldest whole checkpoints beyond `settings.keep`, but for one that is being uploaded."""
        if self.settings.keep < 0:
            return
        whole = [folder for folder in _folders(self.folder) if read_mark(folder) is not None]
        for folder in whole[: max(0, len(whole) - max(1, self.settings.keep))]:
            if self._remote is None or not self._remote.needs(folder):
                _remove(folder)

    def _rotate_remote(self) -> None:
        if self._remote is not None and self.settings.keep >= 0:
            self._remote.drop_old(_FOLDER, MARK, max(1, self.settings.keep))

    def _too_little_room(self, state: State) -> bool:
        """Whether a node's disk cannot hold another checkpoint; says so."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        learning = sum(p.numel() for group in state.optimizers[0].param_groups for p in group["params"])
        need = CHECKPOINT * learning
        short = _most(int(free < need and _is_local_leader()))
        if short:
            log.error(
                "step %d is not saved: a checkpoint takes about %.3g GB and %s has %.3g GB free on some node; make "
                "room, training goes on",
                state.timestamp.batch.value, need / 1e9, self.folder, free / 1e9,
            )  # fmt: skip
        return bool(short)


def find(folder: Path, settings: CheckpointSettings, engine: Engine) -> Path | None:
    """What Composer has to load to go on: the newest whole checkpoint on disk or in the bucket; None to start anew.

    A collective. What this node lacks of it is fetched from the bucket.

    Raises:
        ValueError: if it was saved by another engine, or by a number of ranks that this one cannot take up.
        OSError: if it is not whole on some node, or the bucket cannot be read.
    """
    if not settings.autoresume:
        return None
    remote = None if settings.remote is None else Remote(settings.remote)
    found: tuple[str, Mark] | None = None
    if dist.get_global_rank() == 0:
        found = _newest(folder, remote)
    found = dist.all_gather_object(found)[0]
    if found is None:
        return None
    name, mark = found
    check_engine(folder / name, mark, engine)
    if _is_local_leader():
        _complete(folder / name, mark, remote)
    missing = sum(dist.all_gather_object(len(_missing(folder / name, mark)) if _is_local_leader() else 0))
    if missing:
        raise OSError(
            f"{folder}/{name} lacks {missing} file(s) on some node: let run be on a disk that all nodes share, or set "
            "checkpoint.remote"
        )
    return folder / name / mark.load  # here on every node, whole


def check_engine(checkpoint: Path, mark: Mark, engine: Engine) -> None:
    """Refuse what another engine, or another number of ranks, has saved and this one cannot take up.

    Raises:
        ValueError: with both, and what to do.
    """
    if mark.engine != engine.name:
        hint = f"say parallelism={mark.engine}"
    elif not engine.any_ranks and mark.ranks != engine.ranks:
        hint = f"its shards fit only the number of ranks that wrote them: start {mark.ranks}"
    else:
        return
    raise ValueError(
        f"{checkpoint} was saved by {mark.engine} on {mark.ranks} ranks, this run is {engine.name} on {engine.ranks}; "
        f"{hint}, or begin another run from the exported weights"
    )


def _newest(folder: Path, remote: Remote | None) -> tuple[str, Mark] | None:
    """Name and mark of the newest whole checkpoint that this node or the bucket has; the local one if both have it."""
    whole = newest_on_disk(folder)
    here = {} if whole is None else {whole[0].name: whole[1]}
    there = [] if remote is None else _marked(remote, bool(here))
    names = sorted(name for name in {*here, *there} if _FOLDER.fullmatch(name))
    if not names:
        return None
    name = names[-1]
    if name in here:
        return name, here[name]
    assert remote is not None
    remote.download(name, [MARK], folder / name)
    mark = read_mark(folder / name)
    (folder / name / MARK).unlink()  # it comes again when the rest is there
    if mark is None:
        raise OSError(f"{remote.url}/{name}/{MARK} is damaged; remove it to go on from an older checkpoint")
    return name, mark


def newest_on_disk(folder: Path) -> tuple[Path, Mark] | None:
    """The newest whole checkpoint of a folder of checkpoints, and what its mark says."""
    for path in reversed(_folders(folder)):
        mark = read_mark(path)
        if mark is not None and not _missing(path, mark):
            return path, mark
    return None


def _marked(remote: Remote, can_do_without: bool) -> list[str]:
    """Names of the whole checkpoints in the bucket; none, with a warning, if it cannot be read and need not be."""
    try:
        return remote.marked(MARK)
    except OSError as error:
        if not can_do_without:
            raise
        log.warning("going on from the newest checkpoint on disk, the bucket cannot be read: %s", error)
        return []


def _complete(folder: Path, mark: Mark, remote: Remote | None) -> None:
    """Fetch what this node lacks of a checkpoint; its mark is written when the rest is there."""
    missing = _missing(folder, mark)
    if missing and remote is not None:
        remote.download(folder.name, missing, folder)
        _replace(folder / MARK, json.dumps(asdict(mark), indent=1))


def read_mark(folder: Path) -> Mark | None:
    """What is said of the checkpoint in `folder`, None if it is not whole or its files were damaged."""
    try:
        mark = Mark(**json.loads((folder / MARK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # no error: what was killed while it wrote is passed over
        return None
    # The bucket is another's: no name may lead out of the folder.
    safe = all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in (*mark.files, mark.load))
    return mark if safe else None


def _missing(folder: Path, mark: Mark) -> list[str]:
    """Files of the mark that are not there with their size."""
    sizes = _sizes(folder)
    return [name for name, size in mark.files.items() if sizes.get(name) != size]


def _sizes(folder: Path) -> dict[str, int]:
    """Every file below a checkpoint's folder and its bytes, but for the mark."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARK)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("ba*") if _FOLDER.fullmatch(path.name))


def _remove(folder: Path) -> None:
    (folder / MARK).unlink(missing_ok=True)  # first: half a checkpoint must not look whole
    shutil.rmtree(folder, ignore_errors=True)  # what stays is no checkpoint, and is swept again


def _replace(path: Path, text: str) -> None:
    """Write a file whole: beside its place, to the disk, then renamed. Each node has another name beside it."""
    part = path.with_name(f"{path.name}.{os.uname().nodename}.part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    part.replace(path)
    sync(path.parent)


def _is_local_leader() -> bool:
    return bool(dist.get_local_rank() == 0)


def _most(value: int) -> int:
    """The largest of all ranks' values."""
    if dist.get_world_size() == 1:
        return value
    on_gpu = torch.distributed.get_backend() == "nccl"
    tensor = torch.tensor(value, device="cuda" if on_gpu else "cpu")
    dist.all_reduce(tensor, reduce_operation="MAX")
    return int(tensor)
