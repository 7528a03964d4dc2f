"""The one way into Ray: the cluster that is named, or a local one."""

from __future__ import annotations

import os
from pathlib import Path

import ray


def connect(address: str | None, num_gpus: int | None, object_store_memory: int) -> None:
    """Join the cluster at `address`, or at RAY_ADDRESS, which `ray job submit` sets; else start a local one.

    Args:
        address: as for `ray.init`; None for the environment's.
        num_gpus: of a local cluster; None for all there are.
        object_store_memory: bytes, of a local cluster.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address)
        return
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH")) if path)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Otherwise Ray writes a token to the home folder, and later clusters of this user ask for it.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        address="local",
        num_gpus=num_gpus,
        include_dashboard=False,
        object_store_memory=object_store_memory,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
