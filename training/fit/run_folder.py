"""The folder of a run: who works in it, whose it is when a stage begins, what lies in it when the stage is complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from composer.core import State
from composer.utils import dist
from torch import Tensor

from training.checkpoints.checkpoint import StopRequest
from training.checkpoints.history import History
from training.checkpoints.resume import together
from training.config import TrainConfig
from training.engines.base import Engine
from training.fit.build import merged_llm, whole_model
from training.fit.identity import SOURCES, refuse_another, sources
from training.fit.mixture import seen, seen_lines
from training.fit.parts import STORE, Parts
from training.release.card import CardFiles, model_card, store_facts
from training.release.connector import SHAPE, export_connector
from training.release.folder import is_whole, with_encoder, write_model
from training.release.records import (
    CONFIG,
    LOG,
    SKIPPED,
    SUMMARY,
    HeldOut,
    Summary,
    final_loss,
    read_as,
    read_log,
    write_whole,
)

log = logging.getLogger(__name__)

# What a stage exports, and what lies in each folder beside its weights.
EXPORTED = {"connector": (SHAPE,), "model": ("config.json", "tokenizer.model", "processor_config.json")}
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
            lock = None if stop is None else _lock_unless_complete(config, stop)
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


def _lock_unless_complete(config: TrainConfig, stop: StopRequest) -> IO[str] | None:
    """As `_lock`; None in a folder that cannot be written, as one that is kept, if nothing is left to be written there.

    Raises:
        ValueError: if something is.
    """
    try:
        return _lock(Path(config.run), stop)
    except OSError as error:
        if _complete(config) is None:
            raise ValueError(
                f"{config.run} cannot be written: {error}; make it writable, or take another run=..."
            ) from error
        return None


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


def claim(config: TrainConfig, parts: Parts) -> None:
    """Say whose the folder is, once everything that a run is made of is there. A collective.

    Raises:
        ValueError, OSError: on every rank, if rank 0 cannot write it.
    """
    run = Path(config.run)

    def write() -> None:
        write_whole(run / STORE, "".join(f"{one}\n" for one in parts.stream.fingerprints))
        write_whole(run / SOURCES, json.dumps(sources(config), indent=1))
        write_whole(run / CONFIG, json.dumps(config.model_dump(mode="json"), indent=1))

    together(dist.get_global_rank() == 0, write)


def what_it_holds(config: TrainConfig) -> str | None:
    """Of a complete run what its folder holds, for a person; None if anything of its end is missing. A collective."""
    (found,) = together(dist.get_global_rank() == 0, lambda: _complete(config))
    return found


def _complete(config: TrainConfig) -> str | None:
    """As `what_it_holds`, of one process."""
    run = Path(config.run)
    parts = {name: files for name, files in EXPORTED.items() if name == "connector" or "llm" in config.train}
    begun = all((run / name).is_file() for name in (CONFIG, SUMMARY))
    if not begun or not all(is_whole(run / part, files) for part, files in parts.items()):
        return None
    summary = read_as(Summary, run / SUMMARY)
    return (
        f"complete  {run} holds {' and '.join(f'{part}/' for part in parts)} of {summary.steps} steps, "
        f"{summary.course()}; nothing is left to do"
    )


def begin_anew(config: TrainConfig) -> None:
    """Begin with the first step: say so of steps that were done and are lost, and refuse to repeat a complete run.

    A collective.

    Raises:
        ValueError: if the run is complete and only its export is lost. OSError: if its files cannot be read.
    """
    run = Path(config.run)

    def look() -> None:
        if (run / SUMMARY).exists() and config.checkpoint.autoresume:
            raise ValueError(
                f"{run} is complete, but what it exported is missing or damaged, and no checkpoint is left to export "
                f"it from; put it back, or delete {run / SUMMARY} to train all steps again"
            )
        if lines := read_log(run):
            print(f"anew      no checkpoint has the {len(lines)} steps of {run / LOG}: they are done again", flush=True)

    together(dist.get_global_rank() == 0, look)


def finish(config: TrainConfig, parts: Parts, engine: Engine, state: State, history: History) -> None:
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
        _summarize(config, parts, state.timestamp.batch.value, history)


def _export(config: TrainConfig, parts: Parts, connector: dict[str, Tensor], llm: Iterator[tuple[str, Tensor]]) -> None:
    """Write connector and model, the weights of the language model while they come."""
    run = Path(config.run)
    whole = whole_model(parts.model, connector)
    export_connector(whole.connector, run / "connector")
    if "llm" in config.train:
        whole = with_encoder(whole, parts.store)
        card = model_card(whole, store_facts(parts.stream.stores), CardFiles(run))
        write_model(whole, parts.tokenizer, run / "model", card, contents=merged_llm(config, whole, llm))


def _summarize(config: TrainConfig, parts: Parts, steps: int, history: History) -> None:
    """Write `summary.json`."""
    run = Path(config.run)
    lines = read_log(run)
    seconds = sum(line["step_s"] for line in lines)
    summary = Summary(
        steps=steps,
        loss_first=next((line["loss"] for line in lines if line["step"] == 1), None),
        loss_last=final_loss(lines) if lines else None,
        seconds=round(seconds, 2),
        data_wait=sum(line["data_wait"] * line["step_s"] for line in lines) / seconds if lines else 0.0,
        vision_tokens_in=parts.store.encoder.grid**2,
        vision_tokens_out=parts.model.connector.tokens,
        skipped=len(read_log(run, SKIPPED)),
        heldout=HeldOut.of(history),
        stores=seen(config, parts.stream, steps, lines),
    )
    write_whole(run / SUMMARY, summary.model_dump_json(indent=1))
    if summary.stores:
        print(seen_lines(summary.stores), flush=True)
    print(f"done      {summary.course()}; weights in {run}", flush=True)
    if config.checkpoint.keep_best and summary.heldout is not None and summary.heldout.best_step is not None:
        print(f"best      step {summary.heldout.best_step}: python training/export.py {run} --best", flush=True)
