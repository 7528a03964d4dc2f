"""What the doctor finds, and on which rank it looks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    check: str
    text: str


Check = Callable[[], Iterator[Finding]]


def run_check(name: str, check: Check) -> list[Finding]:
    """The findings of a check; one that breaks off has failed."""
    try:
        return list(check())
    except (ValueError, OSError, RuntimeError) as error:
        return [Finding("fail", name, str(error))]


@dataclass(frozen=True)
class ThisRank:
    """This process among those that the launcher started; `planned` is how many ranks the run is reckoned with."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    planned: int

    @classmethod
    def of_environment(cls, planned: int | None) -> ThisRank:
        """As Composer's launcher tells it; one process where it does not. By default as many are planned as run."""
        names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
        rank, size, local_rank, local_size = (int(os.environ.get(name, default)) for name, default in names)
        return cls(rank, size, local_rank, local_size, planned or size)
