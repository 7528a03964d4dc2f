"""The one way into Ray: the cluster that is named, or a local one that nobody else can use."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOCKET_PATH = 107  # bytes, the longest path of a socket
SOCKET_NAME = "/ray-01234567/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # as Ray makes them
ANSWERS_IN = 10  # s, what is there
LONGEST = 300  # characters of a message of Ray's
TOKEN = secrets.token_hex(32)  # of every local Ray of this process, which reads it once


@contextlib.contextmanager
def joined(address: str | None, num_gpus: int | None, object_store_memory: int) -> Iterator[None]:
    """Join the cluster at `address`, or at RAY_ADDRESS, which `ray job submit` sets; else start a local one.

    Args:
        address: as for `ray.init`; None for the environment's.
        num_gpus: of a local cluster; None for all there are.
        object_store_memory: bytes, of a local cluster.

    Raises:
        ValueError: if the cluster cannot be joined; it names the address and where that was said.
    """
    source = "ray_address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS")
    with contextlib.ExitStack() as stack:
        if address and address != "local":
            _join(address, source)
        else:
            stack.enter_context(_local(num_gpus, object_store_memory))
        import ray

        try:
            yield
        finally:
            ray.shutdown()


def _join(address: str, source: str) -> None:
    """Connect to a cluster that runs; `source` is the setting that holds its address."""
    cure = f"give {source} the address of a cluster that runs (HOST:6379), or unset it for a Ray on this machine"
    if address.startswith(("http://", "https://")):
        raise ValueError(f"{source}={address} is the address of a dashboard, where jobs are submitted; {cure}")
    import ray
    from ray._private.services import canonicalize_bootstrap_address  # what "auto" stands for

    try:
        # Ray itself asks an address where nobody is for many minutes.
        if "://" not in address:
            ask(canonicalize_bootstrap_address(address, None) or address)
        ray.init(address=address)
    except Exception as error:  # Ray raises any, plain `Exception` too
        raise ValueError(f"no Ray cluster to join at {source}={address}: {_short(error)}; {cure}") from error


def ask(gcs_address: str) -> None:
    """Ask the control process (GCS) of a cluster for a sign of life.

    Raises:
        TimeoutError: if it does not answer within 10 s.
        ConnectionError: if there is none, or it does not hear this process.
    """
    import grpc
    from ray._private.gcs_utils import create_gcs_channel
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
    from ray.exceptions import AuthenticationError

    try:
        with create_gcs_channel(gcs_address) as channel:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=ANSWERS_IN)
    except AuthenticationError as error:
        raise ConnectionError(_short(error)) from error
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise TimeoutError(f"no answer within {ANSWERS_IN} s") from error
        fault = _short(error.details() or error.code().name).rpartition("last error: ")[2]
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            fault = "it asks for a token (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH)"
        raise ConnectionError(fault) from error


@contextlib.contextmanager
def _local(num_gpus: int | None, object_store_memory: int) -> Iterator[None]:
    """A Ray of this process on this machine: it listens on loopback, and only who holds its random token is heard.

    Ray reads these variables when it is imported; its processes inherit them.

    Raises:
        ValueError: if it does not start.
    """
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH")) if path)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # there Ray keeps to loopback; this asks for it here too
    import ray

    folder = _private_folder()
    try:
        ray.init(
            address="local",
            num_gpus=num_gpus,
            include_dashboard=False,
            object_store_memory=object_store_memory,
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder / "ray"),  # Ray opens it to everyone; the folder around it stays closed
        )
    except Exception as error:  # as above
        raise ValueError(f"Ray does not start here: {_short(error)}; its logs are in {folder}") from error
    try:
        yield
    except BaseException:
        print(f"\nRay's logs stay in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _private_folder() -> Path:
    """A new folder that only this user may enter, short enough for the sockets below it."""
    place = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(place + SOCKET_NAME)) > SOCKET_PATH:
        place = "/tmp"
    return Path(tempfile.mkdtemp(prefix="ray-", dir=place))


def _short(error: object) -> str:
    """What an error says in one line, without the pages of advice behind it."""
    words = " ".join(str(error).split()) or repr(error)
    return (words if len(words) <= LONGEST else f"{words[:LONGEST]}...").rstrip(".")
