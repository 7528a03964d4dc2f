"""The runs of an ablation on a Ray cluster: each a task that takes a group of GPUs of one node, as groups come free."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.cluster import joined
from training.sweep.plan import Run

LOG = "ablate.log"  # in the folder of a run: what its process says
OBJECT_STORE = 100_000_000  # bytes of a local cluster; nothing goes through it


def on_ray(command: Sequence[str], plan: Sequence[Run], gpus: int | None, questions: str) -> list[Run]:
    """Do the runs of `plan` that are not done; returns those that failed.

    A run is a separate process, `composer ... training/ablate.py COMMAND --part I/N`. If its node is lost it starts
    again on another and goes on from its last checkpoint, so every node must see `run` and the stores.

    Args:
        command: the configuration and the settings, as they were typed.
        plan: every run of the ablation; their numbers are their places here.
        gpus: per run; None for one if the cluster has any, else none.
        questions: the digest of what is asked (`plan.asked`).

    Raises:
        ValueError: if the cluster cannot hold one run, or the folder of the runs is a different one on each node.
    """
    if not plan[0].folder.is_absolute():
        raise ValueError(f"run={plan[0].folder.parents[1]} is another folder on every node; give an absolute path")
    with joined(None, None, OBJECT_STORE):
        import ray

        total = ray.cluster_resources()
        gpus = int(total.get("GPU", 0) > 0) if gpus is None else gpus
        at_once = int(total.get("GPU", 0) // gpus if gpus else total.get("CPU", 0))
        if at_once < 1:
            raise ValueError(
                f"no run of {gpus} GPUs fits the cluster, which has {total.get('GPU', 0):g}; give --gpus another number"
            )
        waiting = [number for number, run in enumerate(plan) if not run.has_answered(questions)]
        print(f"{len(waiting)} of {len(plan)} runs to do, up to {at_once} at once, of {gpus} GPUs each", flush=True)
        return _follow(command, plan, waiting, gpus)


def _follow(command: Sequence[str], plan: Sequence[Run], waiting: Sequence[int], gpus: int) -> list[Run]:
    """Start what is waiting, say what has ended; the runs that failed.

    Ray starts a task when its GPUs are free, so all are handed over at once; `waiting` are numbers in `plan`.
    """
    import ray

    task = ray.remote(num_gpus=gpus, num_cpus=max(1, gpus), max_retries=3)(_one_part)
    running = {}
    for number in waiting:
        folder = str(plan[number].folder)
        words = [*command, "--part", f"{number}/{len(plan)}"]
        running[task.options(name=folder).remote(words, folder, gpus)] = plan[number]
    failed: list[Run] = []
    start, total = time.monotonic(), len(running)
    while running:
        (ended, *_), _ = ray.wait(list(running), num_returns=1)
        run = running.pop(ended)
        wrong = _what_went_wrong(ended)
        done = total - len(running)
        eta = (time.monotonic() - start) / done * len(running)
        print(f"{done}/{total} {run.arm.name}, seed {run.seed}: {wrong or 'done'}  ETA {eta:.0f} s", flush=True)
        if wrong:
            failed.append(run)
    return failed


def _what_went_wrong(ended: Any) -> str:
    """Why a task's run is not done, with the end of its output; "" if it is."""
    import ray

    try:
        code, tail = ray.get(ended)
    except ray.exceptions.RayError as error:
        return f"lost by Ray: {error}"
    return f"ended with {code}\n{tail}\n" if code else ""


def _one_part(command: Sequence[str], folder: str, gpus: int) -> tuple[int, str]:
    """In a task: one run as a process; its exit code and the end of what it said."""
    launcher = [str(Path(sys.executable).with_name("composer")), "-n", str(gpus)] if gpus > 1 else []
    log = Path(folder) / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as out:
        done = subprocess.run(
            [sys.executable, *launcher, "training/ablate.py", *command], check=False, stdout=out, stderr=out
        )
    return done.returncode, log.read_text(encoding="utf-8", errors="replace")[-2000:]
