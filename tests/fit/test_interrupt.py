"""Ctrl-C as a terminal sends it, to the whole process group: the ranks save, the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "composer": [str(Path(sys.executable).with_name("composer")), "-n", "2", "training/train.py"],
    "launch": ["training/launch.py", "--nproc", "2", "training/train.py"],
}


def start(launcher: str, run: Path, config: dict[str, Any]) -> subprocess.Popen[bytes]:
    """A job of two ranks in a process group of its own, as a shell starts it; what it says goes to <run>.output."""
    file = run.with_name(f"{run.name}.yaml")
    file.write_text(yaml.safe_dump(config))
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with run.with_name(f"{run.name}.output").open("ab") as out:
        return subprocess.Popen(
            [sys.executable, *LAUNCHERS[launcher], str(file)],
            cwd=ROOT, env=variables, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip


def wait_for_step(job: subprocess.Popen[bytes], run: Path, step: int) -> None:
    log = run / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= step):
        assert job.poll() is None, run.with_name(f"{run.name}.output").read_text()[-3000:]
        time.sleep(0.003)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(
    settings: Callable[..., Any], read_log: Callable[..., Any], tmp_path: Path
) -> None:
    run, seen = tmp_path / "run", 0
    config = settings(run, 1, {"steps": 4000, "checkpoint.interval": "1000ba"})
    for launcher in LAUNCHERS:
        job = start(launcher, run, config)
        wait_for_step(job, run, seen + 3)
        os.killpg(job.pid, signal.SIGINT)
        code, said = job.wait(), run.with_name("run.output").read_text()
        assert code == 128 + signal.SIGINT, said[-3000:]
        assert "Ctrl-C again ends it at once" in said
        assert "stopped   by signal 2 after a checkpoint; the same command goes on" in said
        assert seen == 0 or f"resumed   from the checkpoint of step {seen}; step {seen + 1} is next" in said
        steps = [line["step"] for line in read_log(run)]
        assert steps == list(range(1, len(steps) + 1))
        seen = len(steps)


def listen(heard: Connection) -> None:
    from training.checkpoints.checkpoint import StopRequest

    with StopRequest() as stop:
        heard.send("ready")
        while not stop.signal:
            time.sleep(0.003)
        heard.send(stop.signal)
        while True:
            signal.pause()


def test_a_second_ctrl_c_ends_the_process_at_once(fork: ForkServerContext) -> None:
    heard, there = fork.Pipe()
    process = fork.Process(target=listen, args=(there,))
    process.start()
    assert heard.recv() == "ready"
    os.kill(process.pid, signal.SIGINT)
    assert heard.recv() == signal.SIGINT
    os.kill(process.pid, signal.SIGTERM)  # which Composer's launcher sends when it hears of Ctrl-C
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == -signal.SIGINT


@pytest.mark.parametrize(
    ("got", "remembered"),
    [
        ([signal.SIGINT, signal.SIGTERM], signal.SIGINT),
        ([signal.SIGTERM, signal.SIGINT], signal.SIGINT),  # as when one handler runs within the other
        ([signal.SIGTERM, signal.SIGUSR1], signal.SIGTERM),
        ([signal.SIGUSR1, signal.SIGTERM], signal.SIGUSR1),
    ],
)
def test_ctrl_c_is_remembered_before_what_a_launcher_sends_upon_it(
    got: list[signal.Signals], remembered: signal.Signals
) -> None:
    from training.checkpoints.checkpoint import StopRequest

    with StopRequest() as stop:
        for number in got:
            os.kill(os.getpid(), number)
    assert stop.signal == remembered


def test_signals_do_what_they_did_before_once_training_has_ended() -> None:
    from training.checkpoints.checkpoint import SIGNALS, StopRequest

    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGTERM
    assert [signal.getsignal(number) for number in SIGNALS] == before
