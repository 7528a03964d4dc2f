"""What is found when one looks at a run beforehand, and on which rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from training.answers.processes import numbers_told

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    check: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:4}  {self.check:14} {self.text}"


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
        """As Composer's launcher tells it; one process where it does not. By default as many are planned as run.

        Raises:
            ValueError: if it tells no numbers, or none that can be.
        """
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
        rank, size, local_rank, local_size, port = numbers_told(names)
        if port > 65535:
            raise ValueError(f"MASTER_PORT={port} in the environment: ports end at 65535; unset it or start anew")
        return cls(rank, size, local_rank, local_size, planned or size)
