"""A tiny CLIP, drawn scenes, one Ray for the session, and the build job as a user runs it."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
RAY_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 starves beside other tests
    "HF_HUB_OFFLINE": "1",
    # A dead node is noticed within about 2 s, not 15; one that only answers late is not dead (tests/conftest.py).
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}

GAVE_UP = "timed out during startup"  # what `ray start` says after 30 s, a bound that no setting changes: once more


class Cluster:
    """Ray nodes on this machine, each started as an operator does, with `ray start`."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = {**RAY_ENVIRONMENT, **environment}
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: sockets' paths are limited
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.address = ""
        self.started = 0

    def add(self, cpus: int) -> subprocess.Popen[bytes]:
        """Start a node, the head if it is the first, and wait until it has joined."""
        self.started += 1
        log = self.folder / f"{self.started}.log"
        command = ["setpriv", "--pdeathsig", "SIGTERM"] if shutil.which("setpriv") else []  # if the tests are killed
        command += [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={cpus}"]
        command += ["--object-store-memory=80000000", "--disable-usage-stats", "--include-log-monitor=false"]
        if self.address:
            command += [f"--address={self.address}"]
        else:
            command += ["--head", f"--port={_free_port()}", f"--ray-client-server-port={_free_port()}"]
            command += [f"--temp-dir={self.folder / 'ray'}", "--include-dashboard=false"]
        node = self._start(command, log)
        while "Ray runtime started" not in log.read_text():
            if node.poll() is not None:
                assert GAVE_UP in log.read_text(), log.read_text()
                self.kill(node)
                node = self._start(command, log)
            time.sleep(0.05)
        if not self.address:
            found = re.search(r"ray start --address='([^']+)'", log.read_text())
            assert found is not None, log.read_text()
            self.address = found[1]
        return node

    def _start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            environment = {**os.environ, **self.environment}
            node = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        self.nodes.append(node)
        return node

    def processes(self, node: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """Every process of a node: raylet, agents and workers."""
        try:
            top = psutil.Process(node.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def send(self, node: subprocess.Popen[bytes], number: signal.Signals) -> None:
        """A signal to every process of a node at once, as when the machine itself stops."""
        for process in self.processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """SIGKILL to a whole node, for good."""
        self.send(node, signal.SIGKILL)
        node.wait()
        self.nodes.remove(node)

    def actors(self) -> list[psutil.Process]:
        """The encoding actors of all nodes that run."""
        everyone = [process for node in self.nodes if node.poll() is None for process in self.processes(node)]
        return [process for process in everyone if _title(process).startswith("ray::MapWorker")]

    def close(self) -> None:
        """End every node."""
        for node in self.nodes:
            self.send(node, signal.SIGKILL)
            node.wait()
        self.nodes = []
        shutil.rmtree(self.folder, ignore_errors=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def new_cluster() -> type[Cluster]:
    """new_cluster(environment): a Ray cluster of the test's own, still without nodes."""
    return Cluster


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray of one node with two CPUs, which the tests share."""
    shared = Cluster({})
    try:
        shared.add(cpus=2)
        yield shared.address
    finally:
        shared.close()


@pytest.fixture(scope="session")
def s3(s3: dict[str, str]) -> dict[str, str]:
    """The server has a bucket `chaos`."""
    boto3.client("s3").create_bucket(Bucket="chaos")
    return s3


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded CLIP of 4 blocks, 32 pixels, 16 patch tokens of width 32."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("clip")
    CLIPVisionModel(CLIPVisionConfig(**shape, image_size=32, patch_size=8)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 drawn images with captions (chat.json) and conversations that share them (instruct.json)."""
    from pipeline.demo_data import draw

    folder = tmp_path_factory.mktemp("scenes")
    draw(folder, images=60, heldout=4, image_size=48)
    return folder


@pytest.fixture(scope="session")
def settings(clip: Path, scenes: Path) -> Callable[..., list[str]]:
    """settings(store, key=value, ...): arguments of a small build."""

    def of(store: Path | str, **more: object) -> list[str]:
        chosen = {
            "data": scenes / "chat.json",
            "images": scenes / "images",
            "store": store,
            "encoder": clip,
            "blocks": "[2,4]",
            "compute": "float32",
            "shard_size": 16,
            "batch_size": 8,
            "workers": 1,
            **more,
        }
        return [f"{name}={value}" for name, value in chosen.items()]

    return of


@pytest.fixture(scope="session")
def run(ray_address: str) -> Callable[..., str]:
    """run(script, *arguments, fails=False, env={}): its output, after checking its exit code."""

    def call(*command: str, fails: bool = False, env: dict[str, str] | None = None) -> str:
        environment = {**os.environ, **RAY_ENVIRONMENT, "RAY_ADDRESS": ray_address, **(env or {})}
        done = subprocess.run(
            [sys.executable, *command],
            check=False,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        output = done.stdout + done.stderr
        assert (done.returncode != 0) is fails, output[-4000:]
        return output

    return call


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """call(script, *arguments, fails=False): as `run`, but in this process; for what starts no Ray."""

    def here(script: str, *arguments: str, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        code: object = None
        try:
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()
        except SystemExit as ended:
            code = ended.code
        output = "".join((*capfd.readouterr(), f"{code}\n" if isinstance(code, str) else ""))
        assert bool(code) is fails, output[-4000:]
        return output

    return here


@pytest.fixture(scope="session")
def store(
    tmp_path_factory: pytest.TempPathFactory, settings: Callable[..., list[str]], run: Callable[..., str]
) -> Path:
    """The small build, undisturbed."""
    folder = tmp_path_factory.mktemp("stores") / "undisturbed"
    run("pipeline/build_shards.py", *settings(folder, workers=2))
    return folder


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a store that must be equal between two builds, by name."""

    def of(folder: Path) -> dict[str, bytes]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    return of


@pytest.fixture
def own_data(tmp_path: Path) -> Callable[[list[dict[str, object]]], Path]:
    """own_data(records): a JSON file of these, in a folder with room for images."""

    def write(records: list[dict[str, object]]) -> Path:
        (tmp_path / "images").mkdir(exist_ok=True)
        path = tmp_path / "data.json"
        path.write_text(json.dumps(records))
        return path

    return write
