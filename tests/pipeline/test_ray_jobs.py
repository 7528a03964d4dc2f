"""The build as a Ray job: a head with its dashboard, and both ways to type `ray job submit`."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")


def answers(address: str) -> bool:
    """Whether a server is there and in order, if only to say that it has no such page."""
    try:
        with urllib.request.urlopen(address):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, http.client.HTTPException):
        return False


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, dict[str, str]]]:
    """The job server's address of a Ray head that lives for this module, and the environment to talk to it."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie in it
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in PORTS]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = dict(zip(PORTS, (each.getsockname()[1] for each in sockets), strict=True))
    environment = {
        **os.environ,
        "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # the script's own #! finds this python
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    start = ["start", "--head", "--block", "--include-dashboard=true", "--dashboard-host=127.0.0.1", "--num-cpus=2"]
    start += [f"--temp-dir={folder}/ray", "--object-store-memory=100000000"]
    command = [*RAY, *start, *(f"--{name}={port}" for name, port in ports.items())]
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        for place in (f"{address}/api/jobs/", f"http://127.0.0.1:{ports['dashboard-agent-listen-port']}/"):
            while not answers(place):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
        yield address, environment
    finally:
        with suppress(psutil.NoSuchProcess):
            for each in psutil.Process(process.pid).children(recursive=True):  # SIGTERM would take half a minute
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("typed", [["pipeline/build_shards.py"], ["python", "pipeline/build_shards.py"]])
def test_a_submitted_job_leaves_the_bytes_of_a_local_one(
    typed: list[str],
    head: tuple[str, dict[str, str]],
    store: Path,
    settings: Callable[..., list[str]],
    contents: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    address, environment = head
    submit = [*RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *typed]
    done = subprocess.run(
        [*submit, *settings(tmp_path / "store")],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "succeeded" in done.stdout, (done.stdout + done.stderr)[-4000:]
    assert done.returncode == 0
    assert contents(tmp_path / "store") == contents(store)
