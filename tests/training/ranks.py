"""Trains with several ranks, real processes over gloo, many runs after one import: `ranks.py JOBS.json`.

A job is {"config": settings of TrainConfig, "ranks": n, "signal": number, "rank": to whom, or all, "at": step}. The
signal is sent from outside, when the run's log shows that step; whoever comes to the last step but one waits for it.
Writes {"codes": exit codes} per job to JOBS.out.json. No clock ends a job; a rank that fails takes the others with it.
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

from training.config import TrainConfig
from training.fit import stage
from training.fit.callbacks import StepLog

SENT = "signal-sent"  # a file in the folder of a run


def keep_all_weights() -> None:
    """Let every run write all its weights, the frozen ones too, to `all.safetensors` before it finishes."""
    finish = stage.finish

    def finish_and_keep(config: TrainConfig, parts: Any, engine: Any, state: Any, steps: int) -> None:
        weights = engine.whole_weights(state, lambda name: True)
        if weights:
            save_file({name: weight.contiguous() for name, weight in weights.items()}, f"{config.run}/all.safetensors")
        finish(config, parts, engine, state, steps)

    stage.finish = finish_and_keep


def wait_before_the_end(last: int, sent: Path) -> None:
    """Let no rank pass step `last` before the file `sent` is there."""
    write = StepLog.batch_end

    def write_and_wait(self: StepLog, state: Any, logger: Any) -> None:
        write(self, state, logger)
        while state.timestamp.batch.value == last and not sent.exists():
            time.sleep(0.003)

    StepLog.batch_end = write_and_wait


def one_rank(job: dict[str, Any], rank: int, port: int, run: Path) -> None:
    """The body of a forked process; never returns."""
    config, ranks = job["config"], job["ranks"]
    with (run / "output").open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    local = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in local.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 1
    try:
        keep_all_weights()
        if "signal" in job:
            wait_before_the_end(config["steps"] - 1, run / SENT)
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
            one_rank(job, rank, port, run)
        pids.append(pid)
    codes: dict[int, int] = {}
    sent, well = "signal" not in job, {0}
    while len(codes) < len(pids):
        if not sent and not codes and steps_done(run) >= job["at"]:
            sent = True
            to = pids if job.get("rank") is None else [pids[job["rank"]]]
            # Those to be killed are stopped first, all of them: none sees another die and fails of that.
            for number in (signal.SIGSTOP, job["signal"]) if job["signal"] == signal.SIGKILL else (job["signal"],):
                for pid in to:
                    os.kill(pid, number)
            (run / SENT).touch()
            well = {128 + job["signal"], -job["signal"]}  # it stopped of itself, or was killed
        if set(codes.values()) - well:
            for pid in set(pids) - set(codes):  # they may wait for the one that failed
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
