"""The way into Ray: which addresses are refused, and who can use a local Ray of ours."""

from __future__ import annotations

import http.client
import http.server
import ipaddress
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from pipeline import cluster

ROOT = Path(__file__).resolve().parents[2]
BUILD = "pipeline/build_shards.py"
VICTIM = """
import sys
from pipeline.cluster import joined
with joined(None, 0, 80_000_000):
    import ray
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""
TWICE = """
from pipeline.cluster import joined
for number in range(2):
    with joined(None, 0, 80_000_000):
        import ray
        print(ray.get(ray.remote(num_cpus=0)(lambda number: number).remote(number)))
"""
ATTACK = """
import pathlib, ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
ray.get(ray.remote(num_cpus=0)(lambda path: pathlib.Path(path).touch()).remote(sys.argv[2]))
"""


@pytest.fixture
def ports() -> Iterator[dict[str, int]]:
    """Ports where nobody listens, where a web server does, and where somebody never says a word."""
    with ExitStack() as stack:
        web = stack.enter_context(http.server.HTTPServer(("", 0), http.server.BaseHTTPRequestHandler))
        threading.Thread(target=web.serve_forever, daemon=True).start()
        stack.callback(web.shutdown)
        closed, mute = (stack.enter_context(socket.socket()) for _ in range(2))
        for each in (closed, mute):
            each.bind(("", 0))  # Ray asks at the outer address
        mute.listen()
        yield {"closed": closed.getsockname()[1], "web": web.server_port, "mute": mute.getsockname()[1]}


@pytest.mark.parametrize(
    ("kind", "said"), [("closed", "Connection refused"), ("web", "HTTP/2"), ("mute", "no answer within 1 s")]
)
def test_an_address_without_a_cluster_is_named_with_the_cause(
    ports: dict[str, int], monkeypatch: pytest.MonkeyPatch, kind: str, said: str
) -> None:
    monkeypatch.setattr(cluster, "ANSWERS_IN", 1)
    address = f"127.0.0.1:{ports[kind]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        pytest.raises(ValueError, match=f"no Ray cluster to join at RAY_ADDRESS={address}: .*{said}.*or unset it"),
        cluster.joined(None, 0, 1),
    ):
        pass
    with pytest.raises(ValueError, match=f"at ray_address={address}: "), cluster.joined(address, 0, 1):
        pass


def test_the_address_of_a_dashboard_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with (
        pytest.raises(
            ValueError, match=r"RAY_ADDRESS=http://127\.0\.0\.1:8265 is the address of a dashboard.*HOST:6379"
        ),
        cluster.joined(None, 0, 1),
    ):
        pass


@pytest.mark.parametrize("kind", [Exception, RuntimeError, OSError, AssertionError])
def test_whatever_ray_raises_at_its_start_is_one_message(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], tmp_path: Path
) -> None:
    """As of a node that a full disk keeps from starting, a plain Exception."""

    def fails(**_: object) -> None:
        raise kind("The current node timed out during startup.")

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "")  # as they were, afterwards
    monkeypatch.setattr("ray.init", fails)
    monkeypatch.setattr(cluster, "_private_folder", lambda: tmp_path)
    with (
        pytest.raises(ValueError, match=r"Ray does not start here: The current node timed.*; its logs are in "),
        cluster.joined("local", 0, 1),
    ):
        pass


@pytest.mark.parametrize("name", ["store", "data", "images"])
def test_in_a_ray_job_a_relative_path_is_refused_with_the_cure(
    settings: Callable[..., list[str]],
    call: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    said = call(BUILD, *settings(tmp_path / "store"), f"{name}=some/where", fails=True)
    assert f"error: {name}=some/where is relative: in a Ray job it would lie in Ray's temporary copy" in said
    assert not (tmp_path / "store").exists()


def test_a_relative_path_is_said_from_the_root(
    store: Path, settings: Callable[..., list[str]], call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)
    assert f"{store}: 60 samples in 4 shards, 0 to do" in call(BUILD, *settings(store.name))


def outsiders(address: str, home: Path, mark: Path, **token: str) -> subprocess.Popen[bytes]:
    """A process of somebody who knows the address of a Ray: it lets the Ray write a file."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Without this Ray asks at the outer address of this machine, where nobody listens.
    environment = {**known, "HOME": str(home), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **token}
    return subprocess.Popen(
        [sys.executable, "-c", ATTACK, address, str(mark)], cwd=home, env=environment, stderr=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_a_process_starts_one_local_ray_after_the_other() -> None:
    """As a build does that makes new shards and adds a column to old ones."""
    known = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", TWICE], check=False, cwd=ROOT, env=known, capture_output=True, text=True
    )
    assert done.stdout.split() == ["0", "1"], done.stderr[-4000:]


def asked(port: int, job: bytes) -> int | None:
    """What a port says to a job, None if it speaks another protocol; it may take its time."""
    page = f"http://127.0.0.1:{port}/api/job_agent/jobs/"
    try:
        answer = urllib.request.urlopen(urllib.request.Request(page, job, {"Content-Type": "application/json"}))
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None
    return int(answer.status)


@pytest.mark.slow
def test_only_who_holds_its_token_can_use_a_local_ray(tmp_path: Path) -> None:
    with ExitStack() as stack:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        victim = stack.enter_context(subprocess.Popen([sys.executable, "-c", VICTIM], cwd=ROOT, **pipes))
        stack.callback(victim.kill)
        address = victim.stdout.readline().decode().strip()
        processes = [psutil.Process(victim.pid), *psutil.Process(victim.pid).children(recursive=True)]
        token = next(p.environ()["RAY_AUTH_TOKEN"] for p in processes if p.name() == "gcs_server")
        listening = [c.laddr for p in processes for c in p.net_connections() if c.status == "LISTEN"]
        hosts = {ipaddress.ip_address(each.ip.removeprefix("::ffff:")) for each in listening}
        assert listening and all(host.is_loopback for host in hosts), hosts
        assert not any(token in word for process in processes for word in process.cmdline())
        folder = next(
            Path(w.partition("=")[2]) for p in processes for w in p.cmdline() if w.startswith("--session-dir")
        )
        assert folder.parents[1].stat().st_mode & 0o777 == 0o700  # the sockets and logs are behind it
        assert not [log for log in folder.rglob("logs/*.*") if log.is_file() and token.encode() in log.read_bytes()]

        wrong = [{}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}]
        for number, other in enumerate(wrong):
            attack = stack.enter_context(outsiders(address, tmp_path, tmp_path / f"attacked{number}", **other))
            stack.callback(attack.kill)
        right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        assert outsiders(address, tmp_path, tmp_path / "used", **right).wait() == 0
        assert (tmp_path / "used").exists()  # it works, for who holds the token

        job = json.dumps({"entrypoint": f"touch {tmp_path}/attacked"}).encode()
        ports = {each.port for each in listening}
        asking = stack.enter_context(ThreadPoolExecutor(len(ports)))
        stack.callback(victim.kill)  # before the threads are waited for
        answers = [asking.submit(asked, port, job) for port in ports]
        assert any(answer.result() == 401 for answer in as_completed(answers))
        assert not list(tmp_path.glob("attacked*"))
        victim.communicate(b"")  # ports that do not answer at all close with it
        assert not {200, 201} & {answer.result() for answer in answers}
        assert not folder.parents[1].exists()
