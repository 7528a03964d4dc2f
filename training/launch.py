#!/usr/bin/env python
"""Start Composer on this node of a cluster: `python training/launch.py training/finetune.yaml key=value ...`.

Run the same line once on every node. Which node this is, and where the first one is, comes from SkyPilot, a Kubernetes
Indexed Job, SLURM (one task per node) or --hosts; without any of them this machine is the whole cluster.

The exit code is 0 when the training has finished, 128 + N when signal N stopped it before, else that of a failed rank.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

PORT = 7777  # of the rendezvous on node 0; SLURM jobs, which may share a node, take another each
STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # schedulers' before they take a node away; Ctrl-C


@dataclass(frozen=True)
class Place:
    """Where this node stands: `rank` of `nodes`, met by the others at `leader`:`port`; `processes` if it was said."""

    scheduler: str
    nodes: int
    rank: int
    leader: str
    port: int = PORT
    processes: int | None = None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the command of this node and stop")
    parser.add_argument("--nproc", type=int, help="processes per node; default: its GPUs, or 1")
    parser.add_argument("--hosts", help="host0,host1,...: a cluster without a scheduler")
    parser.add_argument("--node-rank", type=int, help="with --hosts: which of them this is; default: by its address")
    parser.add_argument("training", nargs=argparse.REMAINDER, help="FILE key=value ...: what every process runs")
    arguments = parser.parse_args()
    try:
        if not arguments.training:
            raise ValueError("no training file is named; say training/launch.py training/finetune.yaml run=runs/one")
        place = find_place(os.environ, arguments.hosts, arguments.node_rank)
        command = composer_command(place, arguments.nproc or place.processes or count_gpus() or 1, arguments.training)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{place.scheduler}, node {place.rank} of {place.nodes}: {shlex.join(command)}", flush=True)
    if not arguments.dry_run:
        sys.exit(run(command))


def find_place(environment: Mapping[str, str], hosts: str | None = None, node_rank: int | None = None) -> Place:
    """Read this node's place from `hosts`, or from what the scheduler has put into the environment.

    MASTER_ADDR and MASTER_PORT, where they are set, name the meeting point instead.

    Raises:
        ValueError: if something that is needed is missing, or says that the job is not one task per node.
    """
    if hosts is not None:
        place = _hosts(hosts, node_rank)
    elif "SKYPILOT_NODE_RANK" in environment:
        place = _skypilot(environment)
    elif "JOB_COMPLETION_INDEX" in environment:
        place = _kubernetes(environment)
    elif "SLURM_JOB_ID" in environment:
        place = _slurm(environment)
    else:
        place = Place("one machine", 1, 0, "127.0.0.1")
    if not 0 <= place.rank < place.nodes:
        raise ValueError(
            f"{place.scheduler}: node rank {place.rank} is not one of {place.nodes} nodes (0, 1, ...); give each node "
            "another one of these"
        )
    leader = environment.get("MASTER_ADDR", place.leader)
    port = _number(environment, "MASTER_PORT", str(place.port))
    return Place(place.scheduler, place.nodes, place.rank, leader, port, place.processes)


def _hosts(hosts: str, node_rank: int | None) -> Place:
    """This node's place in a list of hosts, by its rank or by its address."""
    names = [name.strip() for name in hosts.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--hosts {hosts!r} names no host; say --hosts host0,host1")
    if node_rank is None:
        here = [rank for rank, name in enumerate(names) if _is_here(name)]
        if len(here) != 1:
            said = "none of them is" if not here else f"number {' and '.join(map(str, here))} are"
            raise ValueError(f"--hosts {hosts}: {said} {socket.gethostname()}; say --node-rank (0, 1, ...)")
        node_rank = here[0]
    return Place("host list", len(names), node_rank, names[0])


def _is_here(name: str) -> bool:
    """Whether a host name is this machine's: only its own addresses can be bound."""
    try:
        address = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(address[0], socket.SOCK_STREAM) as trial:
            trial.bind((address[4][0], 0))
    except OSError:  # another machine's address, or a name that nobody resolves: then the names themselves decide
        return name.partition(".")[0] == socket.gethostname().partition(".")[0]
    return True


def _skypilot(environment: Mapping[str, str]) -> Place:
    addresses = _need(environment, "SKYPILOT_NODE_IPS", "SkyPilot").split()
    processes = _number(environment, "SKYPILOT_NUM_GPUS_PER_NODE", "0")
    rank = _number(environment, "SKYPILOT_NODE_RANK")
    return Place("SkyPilot", len(addresses), rank, addresses[0], processes=processes or None)


def _kubernetes(environment: Mapping[str, str]) -> Place:
    why = "a Kubernetes Indexed Job: set it in the pod's env (see infra/kubernetes/base/train.yaml)"
    nodes = _number(environment, "NODES", _need(environment, "NODES", why))
    leader = _need(environment, "MASTER_ADDR", why)
    return Place("Kubernetes", nodes, _number(environment, "JOB_COMPLETION_INDEX"), leader)


def _slurm(environment: Mapping[str, str]) -> Place:
    """This task's place in a step of `srun`; outside a step, the one node of the job."""
    nodes = _number(environment, "SLURM_NNODES", "1")
    if "SLURM_STEP_ID" not in environment:  # a batch script or a shell of salloc: it runs only on node 0
        if nodes > 1:
            raise ValueError(f"this SLURM job has {nodes} nodes; start this with `srun --ntasks-per-node=1`")
        return Place("SLURM", 1, 0, "127.0.0.1")
    # A step may have fewer nodes than the job.
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", str(nodes))
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", str(nodes))
    if tasks != nodes:
        raise ValueError(
            f"srun started {tasks} tasks on {nodes} nodes; Composer starts the processes of a node itself, so one task "
            "per node is needed: `srun --ntasks-per-node=1`"
        )
    listed = environment.get("SLURM_STEP_NODELIST") or _need(environment, "SLURM_JOB_NODELIST", "SLURM")
    leader = environment.get("MASTER_ADDR") or _first_host(listed)
    port = 20000 + _number(environment, "SLURM_JOB_ID") % 20000  # the same on all nodes, another for each job
    processes = _number(environment, "SLURM_GPUS_ON_NODE", "0")
    return Place("SLURM", nodes, _number(environment, "SLURM_NODEID"), leader, port, processes or None)


def _first_host(listed: str) -> str:
    """The first of `node[1-3,7]`, as SLURM itself reads it."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", listed], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"`scontrol show hostnames {listed}` does not work here ({error}); set MASTER_ADDR to the job's first node"
        ) from error
    return done.stdout.split()[0]


def _need(environment: Mapping[str, str], name: str, why: str) -> str:
    if not environment.get(name):
        raise ValueError(f"{name} is not set; it is needed in {why}")
    return environment[name]


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name, default)
    if text is None or not text.isdecimal():
        raise ValueError(f"{name} is {text!r}, expected a number")
    return int(text)


def count_gpus() -> int:
    """GPUs that this node's processes may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in {"", "-1"}])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no driver: a machine without GPUs
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def composer_command(place: Place, processes: int, training: Sequence[str]) -> list[str]:
    """Composer's launcher with this node's part of the job.

    Raises:
        ValueError: if it is not installed beside this Python, or the file to run is not there.
    """
    launcher = Path(sys.executable).with_name("composer")
    if not launcher.is_file():
        raise ValueError(f"{launcher} is not there; run this with the Python of the project's environment")
    if not Path(training[0]).is_file():
        raise ValueError(
            f"{training[0]!r} is not a file (current folder: {Path.cwd()}); name one, e.g. training/finetune.yaml"
        )
    if processes < 1:
        raise ValueError(f"--nproc {processes}: at least one process per node is needed")
    command = [sys.executable, str(launcher), "-n", str(processes)]
    if place.nodes > 1:
        command += ["--world_size", str(place.nodes * processes), "--node_rank", str(place.rank)]
        command += ["--master_addr", place.leader, "--master_port", str(place.port)]
    return [*command, *training]


def run(command: list[str]) -> int:
    """Run it to its end and return the exit code; a signal to stop goes to the ranks, not to their launcher.

    Composer's launcher dies of SIGTERM and SIGUSR1 and leaves its ranks behind; at Ctrl-C it gives them 30 seconds. So
    it gets a new session, which a signal to the process group does not reach. The ranks hear of the signal from here:
    they save, which may take its time, and exit. A second Ctrl-C kills them.
    """
    stopped: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, _frame: FrameType | None) -> None:
        again = number == signal.SIGINT in stopped
        stopped.append(number)
        if process is not None and process.returncode is None:
            _tell_ranks(process.pid, signal.SIGKILL if again else number)

    for number in STOP:
        signal.signal(number, forward)
    process = subprocess.Popen(command, start_new_session=True)
    if stopped:  # before there was anybody to tell
        _tell_ranks(process.pid, stopped[-1])
    code = process.wait()
    if stopped:
        return 128 + stopped[-1]
    return 128 - code if code < 0 else code  # Python says -N of a process that signal N killed, a shell 128 + N


def _tell_ranks(launcher_pid: int, number: int) -> None:
    """Send a signal to the launcher's children, or to itself while it has none."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended by itself
        launcher = psutil.Process(launcher_pid)
        for process in launcher.children() or [launcher]:
            process.send_signal(number)


if __name__ == "__main__":
    main()
