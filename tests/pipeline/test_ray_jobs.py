"""The build as a Ray job: a head with its dashboard, and both ways to type `ray job submit`."""

from __future__ import annotations

import http.client
import os
import secrets
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


@pytest.fixture(scope="module", params=["disabled", "token"])
def head(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, str]]]:
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
        "RAY_AUTH_MODE": request.param,
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
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


def submit(head: tuple[str, dict[str, str]], *words: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` of these words, from the repository's root."""
    address, environment = head
    command = [*RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *words]
    return subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_submitted_job_leaves_the_bytes_of_a_local_one_with_and_without_a_token(
    request: pytest.FixtureRequest,
    head: tuple[str, dict[str, str]],
    store: Path,
    settings: Callable[..., list[str]],
    contents: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    python = ["python"] if "token" in request.node.name else []  # both ways to type it
    done = submit(head, *python, "pipeline/build_shards.py", *settings(tmp_path / "store"))
    assert "succeeded" in done.stdout, (done.stdout + done.stderr)[-4000:]
    assert done.returncode == 0
    assert contents(tmp_path / "store") == contents(store)


@pytest.mark.slow
def test_a_submitted_job_refuses_a_store_inside_its_copy_of_the_working_folder(
    head: tuple[str, dict[str, str]], settings: Callable[..., list[str]]
) -> None:
    done = submit(head, "pipeline/build_shards.py", *settings("runs/store"))
    assert done.returncode != 0
    assert "error: store=runs/store is relative: in a Ray job it would lie in" in done.stdout
