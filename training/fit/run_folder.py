"""The folder of a run: who works in it, whose it is when a stage begins, what lies in it when the stage is complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from composer.core import State
from composer.utils import dist
from torch import Tensor

from pipeline.manifest import fingerprint, shards_of
from pipeline.storage import Storage
from training.checkpoints.checkpoint import StopRequest
from training.config import TrainConfig
from training.engines.base import Engine
from training.fit.build import merged_llm, whole_model
from training.fit.parts import STORE, Parts
from training.release.card import CardFiles, model_card, store_facts
from training.release.connector import export_connector
from training.release.folder import with_encoder, write_model
from training.release.records import (
    CONFIG,
    LOG,
    SKIPPED,
    SUMMARY,
    Summary,
    final_loss,
    read_as,
    read_config,
    read_log,
    write_whole,
)

log = logging.getLogger(__name__)

LOCK = "lock"  # who works in the folder; locked for as long as that process lives
# For another process to let go of the folder. When a node dies, its file server takes some 90 to 150 s to notice (NFS,
# Lustre), and its job may start elsewhere before that.
PATIENCE_S = 180.0
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)  # what file systems without locks answer


@contextlib.contextmanager
def held(config: TrainConfig, stop: StopRequest | None) -> Iterator[None]:
    """Work in the run's folder, which no other process does meanwhile and no other run has. A collective.

    Args:
        config: of the run.
        stop: ends the wait for another process; None only looks, and leaves no trace.

    Raises:
        ValueError: if another process works there, the folder holds another run, or its files are damaged.
        SystemExit: with 128 + the signal's number, if that ended the wait.
    """
    run, lock = Path(config.run), None
    wrong: str | int | None = None  # what is wrong, or the code to exit with
    new = not run.exists()
    if dist.get_global_rank() == 0:
        try:
            lock = None if stop is None else _lock(run, stop)
            refuse_another(config)
        except SystemExit as stopped:
            wrong = stopped.code
        except (ValueError, OSError) as error:
            wrong = str(error)
    wrong = dist.all_gather_object(wrong)[0]  # rank 0 speaks for all
    try:
        if isinstance(wrong, int):
            sys.exit(wrong)
        if wrong is not None:
            raise ValueError(wrong)
        yield
    finally:
        if lock is not None:
            if _is_at(lock, run / LOCK):  # else someone deleted it, and another process has made its own
                (run / LOCK).unlink()  # while it is locked: whoever waits for this file opens a new one
            lock.close()
            if new:
                with contextlib.suppress(OSError):  # something lies in it: the run has begun
                    run.rmdir()


def _lock(run: Path, stop: StopRequest) -> IO[str]:
    """The lock of a run's folder, once no other process has it; it is held until the file is closed.

    The system keeps the lock (flock) and drops it with the process, whatever that died of; on a shared disk the file
    server does so for all nodes. What the file says is only for people.

    Raises:
        ValueError: if another process keeps it longer than `PATIENCE_S`. OSError: if the folder cannot be written.
        SystemExit: with 128 + the number of the signal that ended the wait.
    """
    waited = 0.0
    while True:
        run.mkdir(parents=True, exist_ok=True)  # each time: a process that has failed removes what it made
        file = (run / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = _holder(file)
            file.close()
            if stop.signal:
                print(f"stopped   by signal {stop.signal} while another process works in {run}: {who}", flush=True)
                sys.exit(128 + stop.signal)
            if waited >= PATIENCE_S:
                raise ValueError(
                    f"another process works in {run}: {who}; let it end, or stop it, then run the same command again "
                    f"(if it is gone, and only the file server believes that it is not, delete {run / LOCK})"
                ) from None
            if not waited:
                print(f"waiting   another process works in {run}: {who}; for {PATIENCE_S:.0f} s at most", flush=True)
            time.sleep(1)
            waited += 1
            continue
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning("%s: no file can be locked here (%s); take care that one process works in it", run, error)
        if _is_at(file, run / LOCK):
            break
        file.close()  # whoever had it has removed it
    file.truncate(0)
    file.write(
        f"pid {os.getpid()} on {os.uname().nodename} since {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}"
    )
    file.flush()
    return file


def _holder(file: IO[str]) -> str:
    """What the process that holds a lock says of itself."""
    file.seek(0)
    return file.read(200).strip() or "it has not said which"


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def working(run: Path) -> str | None:
    """Who works in the folder of a run just now, None if nobody does."""
    try:
        with (run / LOCK).open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # others may look at the same time
            except BlockingIOError:
                return _holder(file)
    except OSError:  # no such file, or no locks: nobody who could be named
        pass
    return None


def refuse_another(config: TrainConfig) -> None:
    """A run folder belongs to one run: say what differs instead of mixing two.

    Raises:
        ValueError: if the folder holds another run, or a file of it is damaged. OSError: if one cannot be read.
    """
    run = Path(config.run)
    for name in (LOG, SKIPPED):
        read_log(run, name)
    if not (run / CONFIG).exists():
        return
    if (run / SUMMARY).exists():
        read_as(Summary, run / SUMMARY)
    before = read_config(run)
    theirs, mine = before.identity(), config.identity()
    paths = theirs.pop("data.store"), mine.pop("data.store")
    differing = [
        f"{name}: {theirs.get(name)} -> {mine.get(name)}"
        for name in {**theirs, **mine}
        if theirs.get(name) != mine.get(name)
    ]
    if not _same_store(run, *paths):
        differing.append(f"data.store: {paths[0]} -> {paths[1]}, which holds another store")
    if differing:
        raise ValueError(
            f"{run} holds a run with other settings; set them back, take another run=..., or delete it:\n  "
            + "\n  ".join(differing)
        )


def _same_store(run: Path, there: str, here: str) -> bool:
    """Whether the store at path `here` is the one that the run learns from, which lay at `there`.

    It may have got further shards since.
    """
    path = run / STORE
    known = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None
    if known is not None and not re.fullmatch(r"[0-9a-f]{64}", known):
        raise ValueError(
            f"{path} is damaged (found {known[:80]!r}, not the fingerprint of a store); if {here} is the store that "
            "the run learns from, delete this file and run the same command again"
        )
    if known is None and there == here:
        return True  # a run that began before fingerprints were kept
    if known is None:
        known = _fingerprint(there)
    try:
        return known is not None and shards_of(Storage(here), known) is not None
    except (ValueError, OSError):
        if there == here:
            return True  # that it is gone is said when it is opened
        raise


def _fingerprint(store: str) -> str | None:
    """The fingerprint of the store at a path, None if there is none to be read any more."""
    try:
        return fingerprint(Storage(store))
    except (ValueError, OSError):
        return None


def claim(config: TrainConfig, parts: Parts) -> None:
    """Say whose the folder is, once everything that a run is made of is there. Rank 0 writes."""
    if dist.get_global_rank() == 0:
        run = Path(config.run)
        write_whole(run / STORE, parts.stream.fingerprint + "\n")
        write_whole(run / CONFIG, json.dumps(config.model_dump(mode="json"), indent=1))


def what_it_holds(config: TrainConfig) -> str | None:
    """Of a complete run what its folder holds, for a person; None if anything of its end is missing. A collective."""
    run, found = Path(config.run), None
    parts = ["connector", "model"] if "llm" in config.train else ["connector"]
    files = all((run / name).is_file() for name in (CONFIG, SUMMARY))
    if dist.get_global_rank() == 0 and files and all((run / part).is_dir() for part in parts):
        summary = read_as(Summary, run / SUMMARY)
        found = (
            f"complete  {run} holds {' and '.join(f'{part}/' for part in parts)} of {summary.steps} steps, "
            f"{summary.course()}; nothing is left to do"
        )
    return dist.all_gather_object(found)[0]  # type: ignore[no-any-return]


def finish(config: TrainConfig, parts: Parts, engine: Engine, state: State, steps: int) -> None:
    """Write what the next stage needs, then `summary.json`: its presence says that the stage is complete.

    A collective, as the ranks may hold parts of the weights: every rank takes part in each, rank 0 writes it.
    """
    connector = dict(engine.whole_weights(state, lambda name: name.startswith("connector.")))
    llm = engine.whole_weights(state, lambda name: name.startswith("llm.") and "llm" in config.train)
    try:
        if dist.get_global_rank() == 0:
            _export(config, parts, connector, llm)
    finally:
        deque(llm, maxlen=0)  # also where writing failed, the others wait for what was not fetched
    if dist.get_global_rank() == 0:
        _summarize(config, parts, steps)


def _export(config: TrainConfig, parts: Parts, connector: dict[str, Tensor], llm: Iterator[tuple[str, Tensor]]) -> None:
    """Write connector and model, the weights of the language model while they come."""
    run = Path(config.run)
    whole = whole_model(parts.model, connector)
    export_connector(whole.connector, run / "connector")
    if "llm" in config.train:
        whole = with_encoder(whole, parts.store)
        card = model_card(whole, store_facts(parts.store), CardFiles(run))
        write_model(whole, parts.tokenizer, run / "model", card, contents=merged_llm(config, whole, llm))


def _summarize(config: TrainConfig, parts: Parts, steps: int) -> None:
    """Write `summary.json`."""
    run = Path(config.run)
    lines = read_log(run)
    seconds = sum(line["step_s"] for line in lines)
    summary = Summary(
        steps=steps,
        loss_first=lines[0]["loss"] if lines else None,
        loss_last=final_loss(lines) if lines else None,
        seconds=round(seconds, 2),
        data_wait=sum(line["data_wait"] * line["step_s"] for line in lines) / seconds if lines else 0.0,
        vision_tokens_in=parts.store.encoder.grid**2,
        vision_tokens_out=parts.model.connector.tokens,
    )
    write_whole(run / SUMMARY, summary.model_dump_json(indent=1))
    print(f"done      {summary.course()}; weights in {run}", flush=True)
