"""What a run goes on from: the newest checkpoint whose files are those that were written, here or in the bucket.

    for each checkpoint, newest first, and for each of its copies, on disk, then in the bucket:
        its mark can be read, every file has its size and its SHA-256 -> it is looked through, and loaded
        else one line says which file is wrong, and the next copy is tried

A file with other bytes than were written is the moment's bad luck and is passed over. A file that names code is not
luck: there the run stops. If there are checkpoints and none is sound it stops too, and never begins anew by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from composer.utils.reproducibility import load_rng_state

from pipeline.config import differences
from training.checkpoints.mark import (
    FOLDER,
    MARK,
    Mark,
    checkpoint_folders,
    file_sizes,
    flaws,
    parse_mark,
    read_mark,
    write_mark,
)
from training.checkpoints.remote import Remote
from training.checkpoints.safe import refuse_code
from training.config import CheckpointSettings
from training.engines.base import Engine

log = logging.getLogger(__name__)
T = TypeVar("T")


def find(folder: Path, settings: CheckpointSettings, engine: Engine) -> Path | None:
    """What Composer has to load to go on: of the newest sound checkpoint on disk or in the bucket; None to start anew.

    A collective. What a node lacks of it, or has damaged, is fetched from the bucket.

    Raises:
        ValueError: if it was saved by another run or engine, or by a number of ranks that this one cannot take up, or
            holds more than data.
        OSError: if there are checkpoints and none is sound on every node, or the bucket cannot be read.
    """
    if not settings.autoresume:
        return None
    remote = None if settings.remote is None else Remote(settings.remote)
    on_disk = set().union(*together(dist.get_local_rank() == 0, partial(_marked_here, folder)))
    (copies,) = together(dist.get_global_rank() == 0, partial(_copies, folder, on_disk, remote))
    for name, in_bucket in copies:
        path = folder / name
        mark = _sound(path, remote if in_bucket else None, settings.verify, engine)
        if mark is not None:
            if remote is not None:
                together(dist.get_local_rank() == 0, partial(_sweep, path, mark))
            together(dist.get_local_rank() == 0, partial(refuse_code, path, mark.engine))
            return path / mark.load  # here on every node, whole
    if copies:
        raise OSError(
            f"no checkpoint in {folder}{'' if remote is None else f' or {remote.url}'} is sound on every node, the "
            "files are named above: let run be on a disk that all nodes share or set checkpoint.remote, or put the "
            "files back; to begin anew, remove them all"
        )
    return None


class RandomStates(Callback):  # type: ignore[misc]
    """Takes up the random states of a checkpoint, from which dropout draws.

    Composer does so itself only where it goes through the epoch's batches again; our stream finds its place without.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Before the first batch: by now the DataLoader has drawn its seed, which it does at an epoch's begin."""
        self._take_up()

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Where the checkpoint was of an epoch's last step: before the DataLoader draws the next one's seed."""
        self._take_up()

    def _take_up(self) -> None:
        """Once, as Composer too drops what it has loaded."""
        if self.trainer._rng_state is not None:
            load_rng_state(self.trainer._rng_state)
            self.trainer._rng_state = None


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


def check_run(checkpoint: Path, mark: Mark, engine: Engine) -> None:
    """Refuse the checkpoint of a run with other settings: one that was copied here, or of a bucket that two runs share.

    A setting that only one of the two versions knows is not compared.

    Raises:
        ValueError: with each that differs, and what to do.
    """
    theirs, mine = mark.run or {}, engine.config.plain_identity()
    differing = differences(theirs, {name: value for name, value in mine.items() if name in theirs}, "in it")
    if differing:
        raise ValueError(
            f"{checkpoint} was saved by a run with other settings: {'; '.join(differing)}; set them back, or take a "
            "checkpoint.remote and a run=... that no other run has (its weights: training/export.py)"
        )


def newest_on_disk(folder: Path) -> tuple[Path, Mark] | None:
    """The newest sound checkpoint of a folder of checkpoints, and what its mark says; None if there is none at all.

    Raises:
        OSError: if there are checkpoints, and none is sound.
    """
    marked = [path for path in reversed(checkpoint_folders(folder)) if (path / MARK).is_file()]
    for path in marked:
        mark = _mark(path, None)
        bad = {} if mark is None else flaws(path, mark)
        if mark is not None and not bad:
            return path, mark
        _warn(path, bad)
    if marked:
        raise OSError(f"no checkpoint in {folder} is sound, the files are named above; put one back from a copy")
    return None


def in_bucket(remote: Remote, name: str) -> bool:
    """Whether the bucket has a whole checkpoint of that name. A collective.

    Raises:
        OSError: if it cannot be read.
    """
    (found,) = together(dist.get_global_rank() == 0, lambda: name in remote.marked(MARK))
    return found


def _marked_here(folder: Path) -> set[str]:
    """Names of the checkpoints with a mark on this node's disk."""
    return {path.name for path in checkpoint_folders(folder) if (path / MARK).is_file()}


def _copies(folder: Path, here: set[str], remote: Remote | None) -> list[tuple[str, bool]]:
    """Names of checkpoints with a mark, newest first; for each on disk (False) and in the bucket (True), if there.

    Args:
        folder: of checkpoints, on the first node.
        here: names of those with a mark on the disk of any node.
        remote: the bucket, if there is one.
    """
    there = [] if remote is None else _marked(remote, can_do_without=bool(here))
    names = sorted((name for name in {*here, *there} if FOLDER.fullmatch(name)), reverse=True)
    unfinished = checkpoint_folders(folder)
    if unfinished and not names:
        log.warning("%s was not finished, and none before it: starting from the first step", unfinished[-1])
    return [(name, place is there) for name in names for place in (here, there) if name in place]


def _marked(remote: Remote, can_do_without: bool) -> list[str]:
    """Names of the whole checkpoints in the bucket; none, with a warning, if it cannot be read and need not be."""
    try:
        return remote.marked(MARK)
    except OSError as error:
        if not can_do_without:
            raise
        log.warning("going on from the newest checkpoint on disk, the bucket cannot be read: %s", error)
        return []


def _sound(path: Path, bucket: Remote | None, verify: bool, engine: Engine) -> Mark | None:
    """The mark of a checkpoint that every node has whole; None, with a warning, if one has not. A collective.

    With a bucket it is the mark there that counts, and what differs from it is fetched.

    Raises:
        ValueError: if this engine cannot take it up. OSError: if the bucket cannot be read.
    """
    first, leader = dist.get_global_rank() == 0, dist.get_local_rank() == 0
    (mark,) = together(first, partial(_mark, path, bucket))
    if mark is None:
        return None
    check_engine(path, mark, engine)
    check_run(path, mark, engine)
    found = together(leader, partial(_flaws, path, mark, bucket, verify))
    bad = {name: what for node in found for name, what in node.items()}
    if first:
        _warn(path, bad)
    return None if bad else mark


def _mark(path: Path, bucket: Remote | None) -> Mark | None:
    """The mark of a checkpoint on disk, or in the bucket; None, with a warning, if it is missing or damaged."""
    mark = read_mark(path) if bucket is None else parse_mark(bucket.read(f"{path.name}/{MARK}"))
    if mark is None:
        gone = bucket is None and not (path / MARK).is_file()  # other nodes have it
        _warn(path if bucket is None else f"{bucket.url}/{path.name}", {MARK: "is missing" if gone else "is damaged"})
    return mark


def _flaws(path: Path, mark: Mark, bucket: Remote | None, verify: bool) -> dict[str, str]:
    """Files that this node lacks or has damaged, after the bucket's have been fetched; then its mark is written."""
    bad = flaws(path, mark, verify)
    if bucket is not None:
        bucket.download(path.name, list(bad), path)
        bad = flaws(path, mark, verify, bad)
        if not bad:
            write_mark(path, mark)
    return bad


def _sweep(path: Path, mark: Mark) -> None:
    """Remove what a killed download has left: files that the mark does not name. Once no node downloads any more."""
    for name in file_sizes(path).keys() - mark.files:
        (path / name).unlink(missing_ok=True)  # on a common disk every node sweeps


def _warn(path: Path | str, bad: dict[str, str]) -> None:
    """One line for all that is wrong with a checkpoint, naming the first file."""
    if bad:
        name, what = next(iter(bad.items()))
        more = f", and {len(bad) - 1} more files" if len(bad) > 1 else ""
        log.warning("%s/%s %s%s: another copy, or an older checkpoint, is taken", path, name, what, more)


def together(here: bool, task: Callable[[], T]) -> list[T]:
    """What `task` gives on the ranks that are to do it (`here`). What it raises on one, all raise. A collective."""
    answers: list[T] = []
    problem: Exception | None = None
    if here:
        try:
            answers.append(task())
        except (OSError, ValueError) as error:
            problem = error
    gathered: list[tuple[list[T], Exception | None]] = dist.all_gather_object((answers, problem))
    for _, problem in gathered:
        if problem is not None:
            raise problem
    return [answer for answers, _ in gathered for answer in answers]
