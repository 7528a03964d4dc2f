"""One of several processes that share the questions, and how they are started on one machine."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple


def numbers_told(defaults: Mapping[str, int]) -> list[int]:
    """Numbers that a launcher has put into the environment, each with what holds where it is not set.

    Raises:
        ValueError: if one is no number, or a rank is not one of those that there are.
    """
    given = {name: os.environ.get(name, str(default)) for name, default in defaults.items()}
    wrong = [f"{name}={value!r}" for name, value in given.items() if not value.isdecimal()]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} in the environment: a number was expected; unset it or start anew")
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank in given and size in given and int(given[rank]) >= int(given[size]):
            raise ValueError(
                f"{rank}={given[rank]} and {size}={given[size]} in the environment: ranks are 0 to {size} - 1; unset "
                "them or start anew"
            )
    return [int(value) for value in given.values()]


class AnsweringProcess(NamedTuple):
    """This process, number `rank` of `world_size`, as Composer's launcher and torchrun tell it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among those of its machine

    @classmethod
    def of_environment(cls) -> AnsweringProcess:
        """RANK, WORLD_SIZE and LOCAL_RANK; one process where they are not set.

        Raises:
            ValueError: as `numbers_told`.
        """
        return cls(*numbers_told({"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}))

    @property
    def is_first(self) -> bool:
        """Whether this process gathers the answers of all."""
        return self.rank == 0

    def device(self) -> str:
        """The GPU of this process, or the CPU, whose cores the processes share."""
        import torch

        if torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        if self.world_size > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.world_size))
        return "cpu"

    def progress(self, done: int, total: int, seconds: float) -> None:
        """Say on standard error how many of this process's questions are answered."""
        who = f"process {self.rank} of {self.world_size}: " if self.world_size > 1 else ""
        rate = done / seconds
        left = (total - done) / rate
        print(f"{who}answered {done}/{total}  {rate:.1f} questions/s  ETA {left:.0f} s", file=sys.stderr, flush=True)

    def wait_for_others(self) -> None:
        """Return when every process has written its last answer; one that dies ends the job through its launcher."""
        if self.world_size == 1:
            return
        from datetime import timedelta

        import torch.distributed

        if not torch.distributed.is_initialized():  # in an ablation, training has done so
            # The shares may take hours more or less than each other: the bound is a week.
            torch.distributed.init_process_group(
                "gloo", rank=self.rank, world_size=self.world_size, timeout=timedelta(days=7)
            )
        torch.distributed.barrier()


def in_processes(count: int, command: Sequence[str]) -> int:
    """Run `command` in `count` processes on this machine; the first that fails ends all. Returns the exit code."""
    import socket
    import subprocess

    with socket.socket() as probe:  # the system names a free port, where the processes then meet
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What torchrun would set, so that `AnsweringProcess.of_environment` reads it alike.
    common = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)
    ]
    try:
        while any(process.poll() is None for process in processes):
            failed = [process.returncode for process in processes if process.returncode]
            if failed:
                return int(failed[0])
            time.sleep(0.1)
        return max((process.returncode for process in processes), key=abs)
    finally:
        for process in processes:
            process.kill()
            process.wait()
