"""Hangs end: what waits for ever is named, with its place in the code, and the job ends so that its command can go on.

Every rank has a thread that says how far the rank is, in the key-value store (TCPStore) with which the ranks found each
other. Rank 0 reads what all say. A rank that says nothing is stopped, or its node is gone; ranks that speak but stand
still wait for data or for each other. The others ask for rank 0's answer only, so that its end is noticed too. Ages are
measured by the clock of whoever looks, and only what is seen to change counts: no two clocks are compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

BEATS = 20  # signs of life in the time after which a rank counts as stopped
HUNG = 75  # exit status: EX_TEMPFAIL, the same command may do better
ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(f"{ROOT / name}/" for name in ("training", "pipeline"))
READERS = ("stream", "ahead")  # threads whose place is told too: what the main thread waits for, they do


class Watch(Callback):  # type: ignore[misc]
    """Ends this process, with status `HUNG`, when a rank or the whole job hangs.

    Args:
        hang_s: a rank that gives no sign of life for so long hangs, and so does a job of which no thread moves for so
            long between the first step and the last.
        wait_s: the same before and after the steps, where one call may rightly take long: a download, a slow bucket.
    """

    def __init__(self, hang_s: float, wait_s: float) -> None:
        self.hang_s = hang_s
        self.step = 0
        self.evaluated = 0  # batches of held-out examples, since the process began
        self._wait_s = max(hang_s, wait_s)
        self._still_s = self._wait_s  # how long the job may stand still now
        self._rank, self._ranks = dist.get_global_rank(), dist.get_world_size()
        self._closed = threading.Event()
        self._answered = time.monotonic()  # when rank 0 answered last
        self._said: dict[int, tuple[str, float]] = {}  # rank -> what it said last, and since when it says that
        self._moved = time.monotonic()  # when any rank was seen elsewhere than before
        self._threads = [
            threading.Thread(target=run, name=f"watch-{run.__name__}", daemon=True) for run in (self._tell, self._judge)
        ]

    def __enter__(self) -> Watch:
        """Begin to watch. A collective."""
        self._store = _store() if self._ranks > 1 else None
        self._say(0)
        dist.barrier()  # now everyone has said something: no read has to wait for its writer
        self._listen()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching, whatever ended the stage."""
        self._closed.set()

    def fit_start(self, state: State, logger: Logger) -> None:
        """From here on steps are to follow each other."""
        self.step = state.timestamp.batch.value
        self._still_s = self.hang_s

    def batch_end(self, state: State, logger: Logger) -> None:
        """Note the step."""
        self.step = state.timestamp.batch.value

    def fit_end(self, state: State, logger: Logger) -> None:
        """The steps are done."""
        self._still_s = self._wait_s

    def close(self, state: State, logger: Logger) -> None:
        """Stop watching: from here on ranks end one by one."""
        self._closed.set()

    def _say(self, beat: int) -> None:
        """Publish where this rank is."""
        place, moves = _where({thread.ident for thread in self._threads})
        said = {"beat": beat, "step": self.step, "evaluated": self.evaluated, "place": place, "moves": moves}
        said |= {"host": os.uname().nodename, "pid": os.getpid()}
        if self._store is None:
            self._hear(0, json.dumps(said))
        else:
            self._store.set(f"watch/{self._rank}", json.dumps(said))

    def _listen(self) -> None:
        """Hear what the others say: rank 0 all of them, the others rank 0."""
        for rank in range(self._ranks) if self._rank == 0 else (0,):
            if self._store is not None:
                self._hear(rank, self._store.get(f"watch/{rank}").decode())
        self._answered = time.monotonic()

    def _hear(self, rank: int, text: str) -> None:
        """Take note of what a rank says."""
        now = time.monotonic()
        before = self._said.get(rank, ("{}", now))[0]
        if text != before:
            self._said[rank] = (text, now)
        if any(json.loads(text).get(key) != json.loads(before).get(key) for key in ("step", "evaluated", "moves")):
            self._moved = now

    def _tell(self) -> None:
        """In a thread: say and hear, again and again. It may wait for ever if rank 0 is stopped."""
        beat = 0
        while not self._closed.wait(self.hang_s / BEATS):
            beat += 1
            with contextlib.suppress(RuntimeError):  # rank 0 is gone: `_judge` says so, if it does not come back
                self._say(beat)
                self._listen()

    def _judge(self) -> None:
        """In a thread: end the process when something hangs."""
        pause = self.hang_s / BEATS
        looked = time.monotonic()
        while not self._closed.wait(pause):
            now = time.monotonic()
            if now - looked > self.hang_s / 2:  # this process itself was stopped, and sees the past: begin anew
                self._answered = self._moved = now
                self._said = {rank: (said, now) for rank, (said, _) in self._said.items()}
            looked = now
            found = self._hang(now)
            if found is not None and not self._closed.is_set():
                _end(found)

    def _hang(self, now: float) -> str | None:
        """What hangs, as a message; None if nothing does."""
        if now - self._answered > self.hang_s:
            first = json.loads(self._said[0][0]) if 0 in self._said else {"host": os.environ.get("MASTER_ADDR")}
            return (
                f"rank 0 (host {first['host']}) has not answered rank {self._rank} for {now - self._answered:.0f} s: "
                "it is stopped, or its node or network is gone"
            )
        if self._rank != 0:
            return None
        silent = [rank for rank, (_, since) in self._said.items() if now - since > self.hang_s]
        if silent:
            return "\n  ".join(
                ["ranks without a sign of life: they are stopped, or their node or network is gone"]
                + [self._line(rank, now) for rank in silent]
            )
        if now - self._moved > self._still_s:
            # Who is behind the others keeps them waiting: the lowest step first.
            ranks = sorted(self._said, key=lambda rank: (json.loads(self._said[rank][0])["step"], rank))
            return "\n  ".join(
                [f"no rank has moved for {now - self._moved:.0f} s; who reads data keeps the others waiting"]
                + [self._line(rank, now) for rank in ranks]
            )
        return None

    def _line(self, rank: int, now: float) -> str:
        """A rank, in words."""
        text, since = self._said[rank]
        said: dict[str, Any] = json.loads(text)
        return (
            f"rank {rank} (host {said['host']}, process {said['pid']}): after step {said['step']}, last heard of "
            f"{now - since:.0f} s ago, at {said['place']}"
        )


def _store() -> Any:
    """A connection of ours to the ranks' key-value store: the one of PyTorch is locked while a collective waits."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60), wait_for_workers=False)


def _where(own: set[int | None]) -> tuple[str, int]:
    """Where the threads of this process are.

    Returns: the places of the main thread and of those that read data, in words; a number that changes when any thread
        but `own` is elsewhere.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = {ident: frame for ident, frame in sys._current_frames().items() if ident not in own}
    readers = {_place(frame) for ident, frame in frames.items() if names.get(ident, "").startswith(READERS)}
    place = _place(frames[main]) if main in frames else "its end"
    places = [place, *sorted(f"a thread at {reader}" for reader in readers)]
    stacks = sorted((ident, *_lines(frame)) for ident, frame in frames.items())
    return ", ".join(places), hash(tuple(stacks))


def _lines(frame: FrameType | None) -> list[int]:
    """The instruction of each call on a stack, the innermost first."""
    lines = []
    while frame is not None:
        lines.append(frame.f_lasti)
        frame = frame.f_back
    return lines


def _place(frame: FrameType) -> str:
    """The innermost call of this project on a stack, and what it calls."""
    called, inner = frame.f_code.co_name, frame
    while not inner.f_code.co_filename.startswith(OURS) and inner.f_back is not None:
        inner = inner.f_back
    file = inner.f_code.co_filename.removeprefix(f"{ROOT}/")
    return f"{file}:{inner.f_lineno} in {inner.f_code.co_name}" + (f", in {called}" if inner is not frame else "")


def _end(message: str) -> None:
    """Say what hangs, and end at once: a process that hangs cannot be ended politely."""
    print(f"error: the job hangs: {message}\nMend that, then the same command goes on", file=sys.stderr, flush=True)
    os._exit(HUNG)
