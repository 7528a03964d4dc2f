"""A real SLURM of several hosts on one machine: a host is a set of namespaces, the network between them a bridge."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTROLLER = "10.77.0.254"

SLURM_CONF = """
ClusterName=emulated
SlurmctldHost=controller({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdTimeout=45
SlurmctldTimeout=10
MessageTimeout=5
KillWait=5
InactiveLimit=0
MinJobAge=3600
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# The first process of a host: when it is killed, the kernel ends all others of its PID namespace, as when power fails.
HOST = """
mount --bind {folder}/hosts /etc/hosts
mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && mount -t tmpfs tmpfs /dev/shm
hostname {name}
until ip link set eth0 up 2>/dev/null; do sleep 0.05; done
ip addr add {address}/24 dev eth0
ip link set lo up
slurmd -D -N {name}
"""


class Cluster:
    """`hosts` nodes of 2 CPUs, named node1, node2, ...; commands of SLURM run from the controller."""

    def __init__(self, folder: Path, hosts: int) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
        self.environment |= {
            "HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "SLURM_WAIT": "5",
        }
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{self.environment['PATH']}"
        self.addresses = {f"node{number}": f"10.77.0.{number}" for number in range(1, hosts + 1)}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Bring up the network, the controller and every host, and wait until all are idle."""
        names = {"localhost": "127.0.0.1", "controller": CONTROLLER, **self.addresses}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))
        nodes = [f"NodeName={n} NodeAddr={a} CPUs=2 RealMemory=4000 State=UNKNOWN" for n, a in self.addresses.items()]
        conf = SLURM_CONF.format(controller=CONTROLLER, folder=self.folder, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "state").mkdir()
        token = self.folder / "home" / ".ray" / "auth_token"  # what any ray.init() of a user leaves behind
        token.parent.mkdir(parents=True)
        token.write_text("0" * 64)
        self._spawn(
            "controller",
            f"mount --bind {self.folder}/hosts /etc/hosts; hostname controller; ip link set lo up\n"
            "ip link add br0 type bridge && ip link set br0 up\n"
            f"ip addr add {CONTROLLER}/24 dev br0 && slurmctld -D",
        )
        self.wait_until("the controller answers", lambda: "UP" in self.run("scontrol", "ping", check=False))
        self.start_hosts()

    def start_hosts(self) -> None:
        """Start those that are not there yet, or were killed; returns when all are idle."""
        for name in self.addresses:
            if name not in self.processes:
                self._start_host(name)
        self.wait_until("all hosts are idle", lambda: self._idle() == len(self.addresses))

    def _start_host(self, name: str) -> None:
        self._spawn(name, HOST.format(folder=self.folder, name=name, address=self.addresses[name]))
        peer = ["type", "veth", "peer", "name", "eth0", "netns", str(self._first_process(name))]
        self.run("ip", "link", "add", name, *peer)
        self.run("ip", "link", "set", name, "master", "br0", "up")

    def _spawn(self, name: str, script: str) -> None:
        own = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.folder / f"{name}.out").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [*own, "sh", "-c", script], env=self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )

    def _first_process(self, name: str) -> int:
        """The first process of a host's PID namespace, as this machine counts."""
        process = self.processes[name].pid
        children = Path(f"/proc/{process}/task/{process}/children")
        self.wait_until(f"{name} is there", lambda: bool(children.read_text().split()))
        return int(children.read_text().split()[0])

    def _idle(self) -> int:
        return self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split().count("idle")

    def run(self, *command: str, check: bool = True) -> str:
        """A command on the controller; its output."""
        controller = self._first_process("controller")
        inside = ["nsenter", f"--target={controller}", "--net", "--uts", "--mount", f"--wd={ROOT}", *command]
        done = subprocess.run(inside, check=False, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def kill_host(self, name: str) -> None:
        """The power of a host fails."""
        os.kill(self._first_process(name), signal.SIGKILL)
        self.processes.pop(name).wait()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait_for_job(
        self, number: str, what: str, holds: Callable[[dict[str, str]], bool] | None = None
    ) -> dict[str, str]:
        """What SLURM knows of a job once that holds; by default, once it is in the state `what`.

        Raises AssertionError, with all logs, if it has ended before.
        """

        def reached() -> bool:
            now = self.job(number)
            if now["JobState"] == what if holds is None else holds(now):
                return True
            going_on = now["JobState"] in {"PENDING", "RUNNING", "COMPLETING", "NODE_FAIL", "REQUEUED"}
            assert going_on, f"job {number} is {now['JobState']}: not {what}\n{self.logs()}"
            return False

        self.wait_until(f"job {number}: {what}", reached)
        return self.job(number)

    def wait_until(self, what: str, holds: Callable[[], bool]) -> None:
        """Raises AssertionError, with all logs, if a host's processes or the controller's have ended before."""
        while not holds():
            gone = [name for name, process in self.processes.items() if process.poll() is not None]
            assert not gone, f"{gone} ended: not {what}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """The end of what every daemon and job said."""
        files = [*self.folder.glob("*.out"), *self.folder.glob("*.log")]
        tails = [f"--- {path.name}\n" + path.read_text(errors="replace")[-2500:] for path in sorted(files)]
        return "\n".join(tails)

    def stop(self) -> None:
        """End every process of the cluster."""
        for name in [*self.addresses, "controller"]:
            if name in self.processes and self.processes[name].poll() is None:
                self.kill_host(name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests on an emulated cluster take minutes and root: only `make cluster-test` runs them."""
    if "cluster" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("cluster"):
                item.add_marker(pytest.mark.skip(reason="needs a cluster of emulated hosts: make cluster-test"))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three hosts; skipped where they cannot be."""
    missing = [tool for tool in ("slurmctld", "slurmd", "sbatch", "unshare", "nsenter", "ip") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing: apt-get install slurmctld slurmd slurm-client iproute2 util-linux")
    if os.geteuid() != 0:
        pytest.skip("namespaces and SLURM's daemons need root")
    if subprocess.run(["unshare", "--net", "ip", "link", "add", "br0", "type", "bridge"], check=False).returncode:
        pytest.skip("this kernel gives no bridge in a network namespace")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), hosts=3)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
