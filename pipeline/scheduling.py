"""Spreads shards over a pool of Ray workers, sees that each of them goes on, and says what each shard came to."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import queue
import socket
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import psutil
import ray

from pipeline.cluster import ask
from pipeline.watch import Sign, Watch

if TYPE_CHECKING:
    from pipeline.config import BuildConfig
    from pipeline.schema import StoreSpec
    from pipeline.worker import ShardWorker

log = logging.getLogger(__name__)

ATTEMPTS = 4  # of a shard whose worker dies
HANGS = 2  # of one shard, then the build ends
BEATS = 10  # signs of a worker, and looks at them, while it could hang; at least one every
BEAT_S = 10  # s
BOARD = "compact-vision-build"  # the namespace of Ray's key-value store in which workers leave their signs
ENDS_IN = 60  # s, a process that is told to
RESTARTS_IN = 30  # s, Ray's control process; after 60 s without it Ray ends the build's process with a line of its own
AGAIN = "The shards that are done stay. Mend this, then run the same command again"
READER = "build-outcomes"


def count_workers(config: BuildConfig) -> int:
    """How many workers the settings ask for, else as many as fit the cluster.

    Raises:
        ValueError: if not even one does.
    """
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    fit = min(cpus // config.num_cpus, gpus // config.num_gpus if config.num_gpus else cpus)
    if fit < 1:
        raise ValueError(
            f"no worker of {config.num_cpus:g} CPUs and {config.num_gpus:g} GPUs fits the cluster, which has "
            f"{cpus:g} CPUs and {gpus:g} GPUs; lower num_cpus or num_gpus"
        )
    return config.workers or int(fit)


def schedule(
    config: BuildConfig, spec: StoreSpec, rows: list[dict[str, Any]], workers: int, say: Callable[[str], None]
) -> Generator[dict[str, Any]]:
    """What each shard came to, in the order in which they end.

    A worker that does not go on for `hang_s` seconds is named through `say` and ended; its shard is tried again.

    Raises:
        ValueError: what a worker says is wrong, or that workers die or hang on a shard, with its place.
    """
    board = uuid.uuid4().hex
    outcomes: queue.SimpleQueue[dict[str, Any] | Exception | None] = queue.SimpleQueue()
    guard = _Guard(board, config.hang_s, say)
    threading.Thread(target=_read, args=(_dataset(config, spec, rows, workers, board), outcomes), name=READER).start()
    try:
        while True:
            guard.look()
            try:
                outcome = outcomes.get(timeout=guard.period)
            except queue.Empty:
                continue
            if outcome is None:
                return
            if isinstance(outcome, Exception):
                raise _explained(outcome) from outcome
            if "error" in outcome:
                raise ValueError(f"shard {outcome['shard']}: {outcome['error']}\n{AGAIN}")
            yield outcome
    finally:
        _end_threads()
        guard.clear()


def _dataset(
    config: BuildConfig, spec: StoreSpec, rows: list[dict[str, Any]], workers: int, board: str
) -> ray.data.Dataset:
    """Ray Data's plan: one row is one shard, no feature passes through Ray."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.log_internal_stack_trace_to_stdout = False
    context.execution_no_progress_timeout_s = -1  # it counts whole shards; _Guard sees what happens inside them
    warnings.filterwarnings("ignore", message=".*ray_remote_args_fn.*")  # the one way to say max_task_retries in 2.60
    return ray.data.from_items([{"row": json.dumps(row)} for row in rows], override_num_blocks=len(rows)).map(
        _RayWorker,
        fn_constructor_args=(config, spec, board),
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus or None,
        # Ray starts a dead worker again, as often as it takes, and tries its shard ATTEMPTS times in all.
        ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": ATTEMPTS - 1},
    )


def _read(dataset: ray.data.Dataset, outcomes: queue.SimpleQueue[Any]) -> None:
    """In a thread, which may wait for ever: hand over what Ray Data yields, then its error or None."""
    try:
        for outcome in dataset.iter_rows():
            outcomes.put(json.loads(outcome["outcome"]))
        outcomes.put(None)
    except Exception as error:
        outcomes.put(error)


def _explained(error: Exception) -> ValueError:
    """Why Ray gave up, in words for the user: the innermost reason, never one of the wrappers around it."""
    from ray.exceptions import ActorDiedError, WorkerCrashedError

    if isinstance(error, ActorDiedError | WorkerCrashedError) and "creation task" not in str(error):
        return ValueError(
            f"a worker died {ATTEMPTS} times on one shard, most likely for want of memory; lower batch_size, or give "
            f"it more with num_cpus (fewer workers), then run the same command again: {error}"
        )
    cause: BaseException = error
    while inner := getattr(cause, "cause", None) or cause.__cause__:
        cause = inner
    lines = str(cause).strip().splitlines() or [repr(cause)]
    return ValueError(f"a worker failed: {lines[-1].strip()}\n{AGAIN}")


def _end_threads() -> None:
    """Stop Ray Data's executor and wait for its threads and ours, however long their last step takes.

    A thread that calls Ray after `ray.shutdown` takes the whole process with it, exit code and all. No clock is needed:
    an executor that was told to stop leaves its loop after the present step, and tells its metadata thread to stop.
    """
    names = ("StreamingExecutor-", "ray-data-metadata-", READER)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(names)]
    for thread in threads:
        if (stop := getattr(thread, "shutdown", None)) is not None:  # the executor; nothing happens if it was stopped
            stop(force=True)
    for thread in threads:
        thread.join()


class _RayWorker:
    """Ray Data's view of a worker: JSON text in, JSON text out, so that rows need no schema.

    An error is an outcome too: Ray would wrap it, and hide the reason.
    """

    def __init__(self, config: BuildConfig, spec: StoreSpec, board: str) -> None:
        self._config, self._spec = config, spec
        context = ray.get_runtime_context()
        identity = hash(psutil.Process())
        self._sign = Sign(socket.gethostname(), context.get_node_id(), os.getpid(), identity, beat=0)
        name = f"{board}/{context.get_actor_id()}"
        threading.Thread(target=self._send_signs, args=(name, _period(config.hang_s)), daemon=True).start()

    @cached_property
    def _worker(self) -> ShardWorker:
        from pipeline.worker import ShardWorker

        return ShardWorker(self._config, self._spec, self._report)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        asked = json.loads(row["row"])
        try:
            worker = self._worker  # it imports torch, which counts as no hang: the process is between two shards
            self._sign = dataclasses.replace(self._sign, shard=asked["shard"], place="")
            outcome = worker(asked)
        except Exception as error:
            outcome = {"shard": asked["shard"], "error": f"{_reason(error)} (worker on {self._sign.host})"}
        self._sign = dataclasses.replace(self._sign, shard=None)
        return {"outcome": json.dumps(outcome)}

    def _report(self, place: str) -> None:
        self._sign = dataclasses.replace(self._sign, steps=self._sign.steps + 1, place=place)

    def _send_signs(self, name: str, period: float) -> None:
        """In a thread, as long as the process runs: leave the sign where the driver looks."""
        from ray.experimental.internal_kv import _internal_kv_put

        for beat in itertools.count():
            try:
                _internal_kv_put(name, json.dumps({**dataclasses.asdict(self._sign), "beat": beat}), namespace=BOARD)
            except Exception as error:  # Ray's control process is away for a while
                log.warning("no sign of process %d could be left: %s", os.getpid(), error)
            time.sleep(period)


def _reason(error: Exception) -> str:
    """What an error says; with the place in the code if it is none of the foreseen kinds."""
    if isinstance(error, ValueError | OSError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"


def _period(hang_s: float) -> float:
    """Seconds between two signs of a worker, and between two looks at them."""
    return min(hang_s / BEATS, BEAT_S)


class _Guard:
    """In the driver: looks at the workers' signs, and ends those that hang.

    Args:
        board: under which the workers leave their signs. hang_s: seconds without progress. say: shows a line.
    """

    def __init__(self, board: str, hang_s: float, say: Callable[[str], None]) -> None:
        self.period = _period(hang_s)
        self._board, self._say = board, say
        self._watch = Watch(hang_s)
        self._hangs: Counter[int] = Counter()
        self._watch.moved = self._looked = self._answered = time.monotonic()
        self._said = False  # that nothing moves
        client = ray.util.client.ray.is_connected()  # it does not speak to the control process itself
        self._gcs = None if client else ray.get_runtime_context().gcs_address

    def look(self) -> None:
        """Take note of the workers' signs, if it is time to.

        Raises:
            ValueError: if a shard has hung twice, or no worker moves for twice hang_s.
        """
        now = time.monotonic()
        if now - self._looked < self.period:
            return
        self._looked = now
        if not self._answers(now):
            return
        signs = self._signs()
        for name, (sign, seconds) in self._watch.hung(signs, now).items():
            self._end(name, sign, seconds)
        self._anyone_moves(now - self._watch.moved)
        for line in self._watch.slow(now):
            self._say(line)

    def _anyone_moves(self, idle: float) -> None:
        """Workers that Ray cannot start, or that stop before their first sign, are known by nothing else."""
        cause = f"no worker has moved for {idle:.0f} s and Ray has started no other: the cluster is busy or hangs"
        if idle >= 2 * self._watch.hang_s:
            raise ValueError(f"{cause} (`ray status`). {AGAIN}")
        if (stands := idle >= self._watch.hang_s) and not self._said:
            self._say(f"{cause}; the build waits as long again")
        self._said = stands

    def _answers(self, now: float) -> bool:
        """Whether Ray's control process does; without it the process ends here, as Ray cannot be left in order."""
        try:
            if self._gcs is not None:
                ask(self._gcs)
        except OSError as error:
            late = isinstance(error, TimeoutError)  # it may only be busy
            silent = now - self._answered
            if silent > (max(self._watch.hang_s, RESTARTS_IN) if late else RESTARTS_IN):
                why = f"not for {silent:.0f} s" if late else "it has ended, perhaps for want of memory"
                print(
                    f"\nerror: Ray's control process (GCS) at {self._gcs} does not answer: {error}; {why}. The shards "
                    "that are done stay; run the same command again",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
            return False
        self._answered = now
        return True

    def _signs(self) -> dict[str, Sign]:
        from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

        names = _internal_kv_list(f"{self._board}/", namespace=BOARD)
        return {name.decode(): Sign(**json.loads(_internal_kv_get(name, namespace=BOARD))) for name in names}

    def clear(self) -> None:
        """Take the signs from the board. If that fails, it is said: why the build ends is what counts."""
        from ray.experimental.internal_kv import _internal_kv_del

        try:
            _internal_kv_del(f"{self._board}/", del_by_prefix=True, namespace=BOARD)
        except Exception as error:  # Ray raises several families
            first = str(error).strip().partition("\n")[0]
            self._say(f"the workers' signs stay on Ray's board, in nobody's way ({type(error).__name__}: {first})")

    def _end(self, name: str, sign: Sign, seconds: float) -> None:
        """End a process that hangs: SIGKILL reaches it even if it is stopped. Ray then starts it again."""
        from ray.experimental.internal_kv import _internal_kv_del
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(sign.node, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=there)
        ending = task.remote(sign.pid, sign.identity)
        try:
            was_there = ray.get(ending, timeout=ENDS_IN)
        except ray.exceptions.TaskUnschedulableError:  # its whole node is gone; Ray has seen it
            was_there = False
        except ray.exceptions.RayError as error:
            ray.cancel(ending)  # it may not come later: the worker could have gone on by then
            self._say(f"{sign}, has not moved for {seconds:.0f} s, and its node does not answer: {error}")
            return
        if not was_there:
            self._watch.forget(name)
            _internal_kv_del(name, namespace=BOARD)
            return
        self._watch.moved = time.monotonic()  # from here on Ray starts another one
        said = f"{sign}, had not moved for {seconds:.0f} s and was ended"
        if sign.shard is not None:
            self._hangs[sign.shard] += 1
            if self._hangs[sign.shard] >= HANGS:
                raise ValueError(
                    f"{said}; this shard has hung {HANGS} times. Look at what it reads there; raise hang_s, or lower "
                    f"batch_size, if it is only slow. {AGAIN}"
                )
        self._say(f"{said}; its work is tried again")


def _kill(pid: int, identity: int) -> bool:
    """On the node of a worker: end it, if it still is that process."""
    try:
        process = psutil.Process(pid)
        if hash(process) != identity:
            return False
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True
