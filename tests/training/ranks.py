"""Trains with several ranks, real processes over gloo, many runs after one import: `ranks.py JOBS.json`.

A job is {"config": settings of TrainConfig, "ranks": n, "signal": number, "rank": to whom, or all, "at": step}. The
signal is sent from outside, when the run's log shows that step. Writes {"codes": exit codes} per job to JOBS.out.json.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import composer  # noqa: F401 - imported once, before the forks
import peft  # noqa: F401
import torch
import transformers
from composer.loggers import TensorboardLogger  # noqa: F401
from safetensors.torch import save_file
from transformers import LlamaForCausalLM  # noqa: F401

import training.train as stage
from training.config import TrainConfig
from training.engine import whole_weights

PATIENCE_S = 150


def keep_all_weights() -> None:
    """Let every run write all its weights, the frozen ones too, to `all.safetensors` before it finishes."""
    finish = stage.finish

    def finish_and_keep(config: TrainConfig, *arguments: Any) -> None:
        weights = whole_weights(arguments[-2].state, lambda name: True)
        if weights:
            save_file({name: weight.contiguous() for name, weight in weights.items()}, f"{config.run}/all.safetensors")
        finish(config, *arguments)

    stage.finish = finish_and_keep


def one_rank(config: dict[str, Any], rank: int, ranks: int, port: int, log: Path) -> None:
    """The body of a forked process; never returns."""
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    local = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in local.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 1
    try:
        keep_all_weights()
        stage.train(TrainConfig.model_validate(config))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        print(error, flush=True)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def steps_done(run: Path) -> int:
    """Steps in the log."""
    log = run / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def run_job(job: dict[str, Any]) -> list[int]:
    """Fork the ranks, send the signal when it is time, gather exit codes."""
    run = Path(job["config"]["run"])
    run.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            one_rank(job["config"], rank, job["ranks"], port, run / "output")
        pids.append(pid)
    codes: dict[int, int] = {}
    sent, deadline = "signal" not in job, time.monotonic() + PATIENCE_S
    while len(codes) < len(pids):
        if not sent and steps_done(run) >= job["at"]:
            sent = True
            for pid in pids if job.get("rank") is None else [pids[job["rank"]]]:
                os.kill(pid, job["signal"])
        if time.monotonic() > deadline or (any(codes.values()) and "signal" not in job):
            deadline += 5  # a rank that failed leaves the others waiting for it
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    return [codes[pid] for pid in pids]


def main() -> None:
    """All jobs, one after another."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    jobs = Path(sys.argv[1])
    out = [{"codes": run_job(job)} for job in json.loads(jobs.read_text())]
    jobs.with_suffix(".out.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main()
