"""Which workers hang, and which are slow: judged by what they say of themselves, and by the reader's clock alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

SLOW = 5  # times the time of the others: worth a line
WINDOWS = 2  # looks for slow workers while one could hang


@dataclass(frozen=True)
class Sign:
    """What a worker says of itself, again and again."""

    host: str
    node: str  # Ray's id of it
    pid: int
    identity: int  # of the process: the hash of pid and start since boot, which no setting of the clock moves
    beat: int  # goes up as long as the process runs
    steps: int = 0  # goes up as long as the work goes on: records and batches
    shard: int | None = None  # None between two shards
    place: str = ""  # where in the shard

    def __str__(self) -> str:
        where = "between two shards" if self.shard is None else f"in shard {self.shard}, at {self.place or 'its start'}"
        return f"the worker on {self.host} (process {self.pid}), {where}"


@dataclass
class _Seen:
    """A worker's last sign, and times of the reader's clock in seconds."""

    sign: Sign
    moved: float  # when its work last went on
    since: float  # it has worked without a pause from here on,
    steps: int  # having done so much


class Watch:
    """Remembers signs between two looks.

    Args:
        hang_s: seconds without progress after which a worker counts as hung.
    """

    def __init__(self, hang_s: float) -> None:
        self.hang_s = hang_s
        self.moved = 0.0  # when the work of any worker last went on
        self._seen: dict[str, _Seen] = {}
        self._window = 0.0  # start of the present window of time, over which workers are compared
        self._named: set[tuple[str, int]] = set()  # slow processes are named once

    def hung(self, signs: Mapping[str, Sign], now: float) -> dict[str, tuple[Sign, float]]:
        """Takes note of the workers' `signs` at the time `now`; those that hang, and for how many seconds.

        A worker moves if its steps go up; between two shards it is enough that it lives.
        """
        found = {}
        for name, sign in signs.items():
            seen = self._seen.get(name)
            if seen is None or seen.sign.identity != sign.identity:
                self._seen[name] = _Seen(sign, moved=now, since=now, steps=sign.steps)
                self.moved = now
                continue
            if (sign.shard, sign.steps) != (seen.sign.shard, seen.sign.steps):
                seen.moved = self.moved = now
            elif sign.shard is None and sign.beat != seen.sign.beat:
                seen.moved = now
            if sign.shard is None:
                seen.since, seen.steps = now, sign.steps
            seen.sign = sign
            if now - seen.moved >= self.hang_s:
                found[name] = (sign, now - seen.moved)
                seen.moved = now  # what is done about it takes effect, or it is named again
        return found

    def slow(self, now: float) -> list[str]:
        """At the end of a window of hang_s / 2: a line on each worker that is SLOW times slower than the others."""
        if now - self._window < self.hang_s / WINDOWS:
            return []
        start, self._window = self._window, now
        busy = {name: seen for name, seen in self._seen.items() if seen.since <= start}
        rates = {name: (seen.sign.steps - seen.steps) / (now - seen.since) for name, seen in busy.items()}
        lines = []
        for name, seen in busy.items():
            others = [rate for other, rate in rates.items() if other != name]
            usual, process = statistics.median(others or [0.0]), (name, seen.sign.pid)
            if rates[name] * SLOW < usual and process not in self._named:
                self._named.add(process)
                lines.append(
                    f"{seen.sign}, is slow: {rates[name]:.2g} steps/s, the others do {usual:.2g}; the build goes on"
                )
        for seen in self._seen.values():
            seen.since, seen.steps = now, seen.sign.steps
        return lines

    def forget(self, name: str) -> None:
        """This worker is no more."""
        self._seen.pop(name, None)
