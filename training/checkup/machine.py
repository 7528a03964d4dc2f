"""Is the machine ready? Packages, GPUs, the links between ranks, shared memory."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from training.config import TrainConfig
from training.fit.finding import Finding, Level, ThisRank

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

PROJECT = "compact-vision-tokens"
# Wider than the pins: up to `make TORCH=newest`, with the GPU benchmark's versions in between.
ALSO_TESTED = {"torch": ">=2.7.0,<=2.14.1", "transformers": ">=5.17.0,<=5.23.0"}
WAIT_S = 60  # for the other ranks


def versions() -> Iterator[Finding]:
    """The packages that this project pins, as they are installed."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    try:
        required = [Requirement(line) for line in importlib.metadata.requires(PROJECT) or []]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("fail", "versions", f"{PROJECT} is not installed: pip install -e . where pyproject.toml is")
        return
    installed = {}
    for requirement in required:
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue  # of an extra, or another platform
        try:
            installed[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("fail", "versions", f"{requirement} is not installed: pip install -e .")
            continue
        tested = SpecifierSet(ALSO_TESTED.get(requirement.name, str(requirement.specifier)))
        if not tested.contains(Version(installed[requirement.name]).public, prereleases=True):
            found = f"{requirement.name} {installed[requirement.name]}"
            yield Finding(
                "warn", "versions", f"{found} is installed, this project is tested with {requirement.name}{tested}"
            )
    shown = [f"{name} {installed[name]}" for name in ("torch", "mosaicml", "transformers") if name in installed]
    yield Finding("ok", "versions", ", ".join([f"python {sys.version.split()[0]}", *shown]))


def gpus(config: TrainConfig | None, rank: ThisRank) -> Iterator[Finding]:
    """A free GPU for each rank of this node, which computes in the precision of the run."""
    import torch

    wanted = "auto" if config is None else config.device
    count = torch.cuda.device_count()
    if wanted == "cpu" or not count:
        level: Level = {"cpu": "ok", "gpu": "fail"}.get(wanted, "warn")  # type: ignore[assignment]
        text = "the CPU is used, as device says" if wanted == "cpu" else "none found: look at nvidia-smi and the driver"
        yield Finding(level, "gpus", text + (", or say device=cpu" if wanted == "gpu" else ""))
        return
    if count < rank.local_size:
        text = f"{count} for {rank.local_size} ranks of this node; start composer with -n {count}"
        yield Finding("fail", "gpus", text)
        return
    free, total = torch.cuda.mem_get_info(rank.local_rank)
    name = torch.cuda.get_device_name(rank.local_rank)
    capability = torch.cuda.get_device_capability(rank.local_rank)  # such as (9, 0)
    missing = lacks_kernels(capability, torch.cuda.get_arch_list())
    if missing:
        text = f"torch {torch.__version__} has no kernels for {name} ({missing}); make a newer one: TORCH=newest"
        yield Finding("fail", "gpus", text)
        return
    if free < 0.95 * total:
        text = f"{(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB of {name} are in use; end what uses it (nvidia-smi)"
        yield Finding("warn", "gpus", text)
    if config is not None and config.precision == "amp_bf16" and capability < (8, 0):
        yield Finding("warn", "gpus", f"{name} has no bf16 units, which precision amp_bf16 needs to be fast; use fp32")
    yield Finding("ok", "gpus", f"{count} x {name}, {total / 1e9:.1f} GB, CUDA {torch.version.cuda}")


def lacks_kernels(capability: tuple[int, int], built_for: list[str]) -> str:
    """The architecture of a GPU for which this torch has neither machine code nor code to compile; "" if it has.

    Machine code (`sm_90`) runs on GPUs of the same major version; drivers compile `compute_90` for all later ones too.
    """
    major, minor = capability
    known = [name for name in built_for if name.startswith(("sm_", "compute_"))]  # ROCm's are others
    for name in known:
        kind, _, number = name.rstrip("af").partition("_")
        of = (int(number[:-1]), int(number[-1]))
        portable = kind == "compute" and not name.endswith(("a", "f"))  # compute_90a is only for 9.0
        if of <= capability and (portable or of[0] == major):
            return ""
    return f"sm_{major}{minor}" if known else ""


def meet(rank: ThisRank) -> TCPStore:
    """The store of keys that all ranks have in common, which rank 0 keeps.

    Raises:
        RuntimeError: if not all ranks come within `WAIT_S`.
    """
    from torch import distributed

    host, port = _meeting_point()
    return distributed.TCPStore(  # type: ignore[attr-defined]
        host, port, rank.size, is_master=rank.rank == 0, timeout=timedelta(seconds=WAIT_S)
    )


def unreached(rank: ThisRank, error: Exception) -> Finding:
    """What to look at if the ranks did not find each other."""
    host, port = _meeting_point()
    text = (
        f"rank {rank.rank} of {rank.size} did not reach the others at {host}:{port} within {WAIT_S} s ({error}); are "
        "all nodes started with this address and --world_size, is the port open? NCCL_DEBUG=INFO says more"
    )
    return Finding("fail", "links", " ".join(text.split()))  # torch's messages have several lines


def _meeting_point() -> tuple[str, int]:
    """Address and port of rank 0, as the launcher tells them."""
    return os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))


def links(config: TrainConfig | None, rank: ThisRank, store: TCPStore) -> Iterator[Finding]:
    """An all-reduce between all ranks, by NCCL or gloo, whose sum is known, and how fast it was."""
    import torch
    from torch import distributed

    on_gpu = torch.cuda.is_available() and (config is None or config.device != "cpu")
    backend, wait = "nccl" if on_gpu else "gloo", timedelta(seconds=WAIT_S)
    seconds = []
    try:
        distributed.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.size, timeout=wait)
        tensor = torch.empty(2**24 if on_gpu else 2**20, device=f"cuda:{rank.local_rank}" if on_gpu else "cpu")
        for _ in range(3):  # the first one also makes the connections
            tensor.fill_(rank.rank + 1)
            total = float(tensor[-1])  # reading a number waits until the device has filled it
            start = time.perf_counter()
            distributed.all_reduce(tensor)
            total = float(tensor[-1])
            seconds.append(time.perf_counter() - start)
    except RuntimeError as error:
        yield unreached(rank, error)
        return
    expected = rank.size * (rank.size + 1) / 2  # 1 + 2 + ... + size
    if total != expected:
        text = f"the sum over {rank.size} ranks is {total}, not {expected}: a broken link; NCCL_DEBUG=INFO says more"
        yield Finding("fail", "links", text)
        return
    # What NCCL calls bus bandwidth: a ring sends each byte 2 (n - 1) / n times.
    rate = 2 * (rank.size - 1) / rank.size * tensor.nbytes / min(seconds) / 1e9
    text = f"all-reduce of {tensor.nbytes / 2**20:.0f} MiB between {rank.size} ranks by {'NCCL' if on_gpu else 'gloo'}"
    yield Finding("ok", "links", f"{text}: {min(seconds) * 1e3:.1f} ms, {rate:.2f} GB/s per rank")


def shared_memory() -> Iterator[Finding]:
    """/dev/shm, through which NCCL and worker processes of one node talk."""
    usage = shutil.disk_usage("/dev/shm")
    if usage.free < 2**30:
        text = f"{usage.free / 2**20:.0f} MiB free in /dev/shm; start the container with --shm-size=8g"
        yield Finding("warn", "shared memory", text)
    else:
        yield Finding("ok", "shared memory", f"{usage.free / 1e9:.1f} GB free in /dev/shm")
