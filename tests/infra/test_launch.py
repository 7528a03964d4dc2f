"""A scheduler's environment becomes the right Composer command; two nodes of real processes meet and are stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.launch import count_gpus, find_place

ROOT = Path(__file__).resolve().parents[2]
SCHEDULERS = ("SLURM_", "SKYPILOT_", "JOB_COMPLETION_INDEX", "MASTER_", "NODES", "CUDA_VISIBLE_DEVICES")
SLURM = {"SLURM_JOB_ID": "70042", "SLURM_STEP_ID": "0", "SLURM_NNODES": "3", "SLURM_NODEID": "2"}
SLURM |= {"SLURM_JOB_NODELIST": "gpu[07-09]", "MASTER_ADDR": "gpu07", "SLURM_GPUS_ON_NODE": "8"}
INDEXED_JOB = {"JOB_COMPLETION_INDEX": "1", "NODES": "2", "MASTER_ADDR": "train-0.train"}
SKYPILOT = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "SKYPILOT_NUM_GPUS_PER_NODE": "4"}


def environment(**more: str) -> dict[str, str]:
    """This process's, without the traces of a scheduler that may run these tests."""
    return {k: v for k, v in os.environ.items() if not k.startswith(SCHEDULERS)} | {"PYTHONPATH": str(ROOT)} | more


def launch(*words: str, fails: bool = False, **more: str) -> str:
    command = [sys.executable, "training/launch.py", *words]
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment(**more), capture_output=True, text=True)
    assert (done.returncode != 0) is fails, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (SLURM, "-n 8 --world_size 24 --node_rank 2 --master_addr gpu07 --master_port 30042"),
        (INDEXED_JOB, "-n 1 --world_size 2 --node_rank 1 --master_addr train-0.train --master_port 7777"),
        (SKYPILOT, "-n 4 --world_size 8 --node_rank 1 --master_addr 10.0.0.4 --master_port 7777"),
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, "composer -n 2 training/finetune.yaml"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "composer -n 1 training/finetune.yaml"),
        ({**INDEXED_JOB, "MASTER_PORT": "9000", "CUDA_VISIBLE_DEVICES": "0"}, "--master_port 9000"),
    ],
)
def test_a_schedulers_environment_becomes_composers_command(given: dict[str, str], said: str) -> None:
    more = {"CUDA_VISIBLE_DEVICES": ""} | given
    assert f"{said}" in launch("--dry-run", "training/finetune.yaml", "optimizer.lr=1e-5", **more)


def test_the_trainings_own_arguments_pass_unchanged() -> None:
    said = launch("--dry-run", "--nproc", "3", "training/finetune.yaml", "--check", "run=a b", "steps=2")
    assert said.endswith("-n 3 training/finetune.yaml --check 'run=a b' steps=2\n")


def test_a_host_list_knows_its_own_address() -> None:
    here, other = "127.0.0.1", "192.0.2.1"  # the second is of a net reserved for documentation
    assert find_place({}, f"{other},{here}").rank == 1
    assert find_place({}, f"{other},{here}").leader == other
    assert find_place({}, f"{here},{here}", node_rank=1).rank == 1
    assert find_place({}, f"{other},{socket.gethostname()}").rank == 1
    with pytest.raises(ValueError, match=r"number 0 and 1 are .*--node-rank"):
        find_place({}, f"{here},{here}")
    with pytest.raises(ValueError, match="none of them is"):
        find_place({}, f"{other},{other}")


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "24"}, "srun --ntasks-per-node=1"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}, "start this with `srun --ntasks-per-node=1`"),
        ({k: v for k, v in SLURM.items() if k != "MASTER_ADDR"} | {"PATH": ""}, "set MASTER_ADDR"),
        ({"JOB_COMPLETION_INDEX": "0", "NODES": "2"}, "MASTER_ADDR is not set"),
        ({"JOB_COMPLETION_INDEX": "2", "NODES": "2", "MASTER_ADDR": "a"}, "node rank 2 is not one of 2 nodes"),
        ({"JOB_COMPLETION_INDEX": "0", "NODES": "two", "MASTER_ADDR": "a"}, "NODES is 'two', expected a number"),
        ({"SKYPILOT_NODE_RANK": "0"}, "SKYPILOT_NODE_IPS is not set"),
    ],
)
def test_what_is_missing_is_named(given: dict[str, str], missing: str) -> None:
    assert missing in launch("--dry-run", "training/finetune.yaml", fails=True, **given)


def test_a_file_that_is_not_there_is_named() -> None:
    assert "'training/finetun.yaml' is not a file" in launch("training/finetun.yaml", fails=True)
    assert "no training file" in launch("--dry-run", fails=True)


def test_help_comes_without_torch() -> None:
    code = "import sys, training.launch; sys.exit(bool({'torch', 'composer', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, env=environment()).returncode == 0


def test_gpus_are_counted_by_what_is_visible(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f2a,GPU-11c0")
    assert count_gpus() == 2
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho '  MIG 1g.10gb Device 0: (UUID: MIG-1)'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert count_gpus() == 1


RANK = """
import json, os, signal, sys
from pathlib import Path
import torch
from composer.utils import dist

out = Path(sys.argv[1].partition("=")[2])
dist.initialize_dist("cpu", timeout=float(os.environ["PATIENCE_S"]))
total = torch.tensor([2.0 ** dist.get_global_rank()])
dist.all_reduce(total)
said = {"sum": total.item(), "node": dist.get_node_rank(), "world": dist.get_world_size()}

def stop(number, frame):
    (out / f"stopped{dist.get_global_rank()}").write_text(str(number))
    sys.exit(0)

signal.signal(signal.SIGUSR1, stop)
(out / "new").mkdir(exist_ok=True)
place = out / "new" / f"rank{dist.get_global_rank()}"
place.write_text(json.dumps(said))
place.rename(out / place.name)  # it is there with all that it says
while True:
    signal.pause()
"""


@pytest.fixture(scope="module")
def free_port() -> str:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return str(trial.getsockname()[1])


def test_two_nodes_meet_and_a_signal_to_their_process_groups_reaches_the_ranks(
    tmp_path: Path, free_port: str, hang_s: int
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    more = environment(MASTER_PORT=free_port, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PATIENCE_S=str(hang_s))
    nodes = []
    for rank in ("0", "1"):
        hosts = ["--hosts", "127.0.0.1,127.0.0.1", "--node-rank", rank]
        command = [sys.executable, "training/launch.py", *hosts, str(script), f"run={tmp_path}"]
        with (tmp_path / f"node{rank}.log").open("w") as log:
            nodes.append(subprocess.Popen(command, cwd=ROOT, env=more, stdout=log, stderr=log, start_new_session=True))
    try:
        while not all((tmp_path / f"rank{rank}").exists() for rank in (0, 1)):
            assert all(node.poll() is None for node in nodes), [p.read_text() for p in sorted(tmp_path.glob("*.log"))]
            time.sleep(0.1)
        for rank in (0, 1):
            said = json.loads((tmp_path / f"rank{rank}").read_text())
            assert said == {"sum": 3.0, "node": rank, "world": 2}
        for node in nodes:
            os.killpg(node.pid, signal.SIGUSR1)
        assert [node.wait() for node in nodes] == [128 + signal.SIGUSR1] * 2
        assert [(tmp_path / f"stopped{rank}").read_text() for rank in (0, 1)] == [str(int(signal.SIGUSR1))] * 2
    finally:
        for node in nodes:
            node.terminate()
            node.wait()


def test_ctrl_c_goes_to_the_ranks_and_a_second_one_kills_them(tmp_path: Path) -> None:
    rank = (
        "import pathlib, signal, sys\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "signal.signal(signal.SIGINT, lambda *_: (here / 'saving').touch())\n"
        "(here / 'ready').touch()\n"
        "while True: signal.pause()\n"
    )
    # As Composer's launcher: a process whose child is the rank, and which ends with it.
    parent = "import subprocess, sys; sys.exit(abs(subprocess.call([sys.executable, '-c', sys.argv[1], sys.argv[2]])))"
    command = [sys.executable, "-c", parent, rank, str(tmp_path)]
    run = f"import sys; from training.launch import run; sys.exit(run({command!r}))"
    node = subprocess.Popen([sys.executable, "-c", run], cwd=ROOT, env=environment(), start_new_session=True)
    for file in ("ready", "saving"):
        while not (tmp_path / file).exists():
            assert node.poll() is None
            time.sleep(0.01)
        os.killpg(node.pid, signal.SIGINT)
    assert node.wait() == 128 + signal.SIGINT


@pytest.mark.parametrize(("end", "code"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_what_failed_is_the_exit_code(end: str, code: int) -> None:
    run = f"import sys; from training.launch import run; sys.exit(run([sys.executable, '-c', {end!r}]))"
    assert subprocess.run([sys.executable, "-c", run], check=False, cwd=ROOT, env=environment()).returncode == code
