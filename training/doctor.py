#!/usr/bin/env python
"""Is everything ready for a run? One line for each question: ok, warn or fail, with what to do about it.

    python training/doctor.py training/finetune.yaml data.store=...           # this process alone
    composer -n 8 training/doctor.py training/finetune.yaml data.store=...    # every rank, and the links between them

Nothing is trained or kept; files that are written as a trial are removed. Without a CONFIG only the machine is looked
at. Exit code 1 if anything fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

from pipeline.config import ConfigError, load_config
from training.checkup.preflight import Finding, Launch, Level, of_run, run_check
from training.config import TrainConfig

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

PROJECT = "compact-vision-tokens"
# Wider than the pins: up to `make TORCH=newest`, with the GPU benchmark's versions in between.
ALSO_TESTED = {"torch": ">=2.7.0,<=2.14.1", "transformers": ">=5.17.0,<=5.23.0"}
WAIT_S = 60  # for the other ranks


def main() -> int:
    """Command line: [CONFIG.yaml] key=value ..."""
    parser = argparse.ArgumentParser(
        prog="python training/doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="YAML file of the run, e.g. training/finetune.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. data.store=s3://bucket/store")
    parser.add_argument("--ranks", type=int, help="reckon with so many ranks (default: those that run)")
    arguments = parser.parse_intermixed_args()
    if arguments.config is not None and "=" in arguments.config:
        parser.error(f"settings such as {arguments.config} need a CONFIG before them")
    try:
        config = None if arguments.config is None else load_config(TrainConfig, arguments.config, arguments.settings)
    except ConfigError as error:
        print(f"fail  {'configuration':14} {error}")
        return 1
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    ranks = Launch(rank, size, local_rank, local_size, arguments.ranks or size)
    findings = examine(config, ranks)
    if rank == 0:
        for finding in findings:
            print(f"{finding.level:4}  {finding.check:14} {finding.text}")
        counts = {level: sum(finding.level == level for finding in findings) for level in ("ok", "warn", "fail")}
        print(", ".join(f"{count} {level}" for level, count in counts.items()), flush=True)
    # Rank 0 fails for all: a launcher would end it before it has told, if another failed first.
    return int(rank == 0 and any(finding.level == "fail" for finding in findings))


def examine(config: TrainConfig | None, ranks: Launch) -> list[Finding]:
    """Every finding: on rank 0 those of all ranks that differ, on the others their own."""
    found = run_check("versions", versions) + run_check("gpus", lambda: gpus(config, ranks))
    meeting: list[TCPStore] = []
    if ranks.size == 1:
        found.append(Finding("ok", "links", "one rank; start me with `composer -n N` to try the links between ranks"))
    else:
        found += run_check("links", lambda: links(config, ranks, meeting))
    found += run_check("shared memory", shared_memory)
    if config is not None:
        found += of_run(config, ranks)
    if not meeting:
        return found
    # Through the store, not by a collective: rank 0 shall also hear of ranks whose links are broken.
    mine = json.dumps([asdict(finding) for finding in found])
    meeting[0].set(f"rank {ranks.rank}", mine)
    if ranks.rank > 0:
        return found
    everyone = []
    for rank in range(ranks.size):
        try:
            everyone.append([Finding(**finding) for finding in json.loads(meeting[0].get(f"rank {rank}"))])
        except RuntimeError:
            everyone.append(
                [Finding("fail", "links", f"nothing was heard of it within {WAIT_S} s; look at its output")]
            )
    return together(everyone)


def together(everyone: list[list[Finding]]) -> list[Finding]:
    """The first rank's findings, what is wrong on others alone, and what should be the same everywhere but is not."""
    merged = list(everyone[0])
    for rank, findings in enumerate(everyone[1:], start=1):
        for finding in findings:
            if finding in everyone[0]:
                continue
            if finding.level != "ok":
                merged.append(Finding(finding.level, finding.check, f"rank {rank}: {finding.text}"))
            elif finding.check in ("versions", "store"):
                merged.append(Finding("fail", finding.check, f"rank {rank} differs from rank 0: {finding.text}"))
    return merged


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


def gpus(config: TrainConfig | None, ranks: Launch) -> Iterator[Finding]:
    """A free GPU for each rank of this node, one that computes in the precision of the run."""
    import torch

    wanted = "auto" if config is None else config.device
    count = torch.cuda.device_count()
    if wanted == "cpu" or not count:
        level: Level = {"cpu": "ok", "gpu": "fail"}.get(wanted, "warn")  # type: ignore[assignment]
        text = "the CPU is used, as device says" if wanted == "cpu" else "none found: look at nvidia-smi and the driver"
        yield Finding(level, "gpus", text + (", or say device=cpu" if wanted == "gpu" else ""))
        return
    if count < ranks.local_size:
        text = f"{count} for {ranks.local_size} ranks of this node; start composer with -n {count}"
        yield Finding("fail", "gpus", text)
        return
    free, total = torch.cuda.mem_get_info(ranks.local_rank)
    name = torch.cuda.get_device_name(ranks.local_rank)
    missing = lacks_kernels(torch.cuda.get_device_capability(ranks.local_rank), torch.cuda.get_arch_list())
    if missing:
        text = f"torch {torch.__version__} has no kernels for {name} ({missing}); make a newer one: TORCH=newest"
        yield Finding("fail", "gpus", text)
        return
    if free < 0.95 * total:
        text = f"{(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB of {name} are in use; end what uses it (nvidia-smi)"
        yield Finding("warn", "gpus", text)
    if config is not None and config.precision == "amp_bf16" and torch.cuda.get_device_capability() < (8, 0):
        yield Finding("warn", "gpus", f"{name} has no bf16 units, which precision amp_bf16 needs to be fast; use fp32")
    yield Finding("ok", "gpus", f"{count} x {name}, {total / 1e9:.1f} GB, CUDA {torch.version.cuda}")


def lacks_kernels(capability: tuple[int, int], built_for: list[str]) -> str:
    """The architecture of a GPU for which this torch has neither machine code nor code to compile; "" if it has.

    Machine code runs on GPUs of its own major version; `compute_90`, what a driver compiles, on all later ones too.
    """
    major, minor = capability
    known = [name for name in built_for if name.startswith(("sm_", "compute_"))]  # ROCm's are others
    for name in known:
        kind, _, number = name.rstrip("af").partition("_")
        of = (int(number[:-1]), int(number[-1]))
        portable = kind == "compute" and not name.endswith(("a", "f"))  # compute_90a is for 9.0 alone
        if of <= capability and (portable or of[0] == major):
            return ""
    return f"sm_{major}{minor}" if known else ""


def links(config: TrainConfig | None, ranks: Launch, meeting: list[TCPStore]) -> Iterator[Finding]:
    """An all-reduce between all ranks, by NCCL or gloo, whose sum is known; `meeting` gets the ranks' common store."""
    import torch
    from torch import distributed

    on_gpu = torch.cuda.is_available() and (config is None or config.device != "cpu")
    host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    wait = timedelta(seconds=WAIT_S)
    try:
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            host, port, ranks.size, is_master=ranks.rank == 0, timeout=wait
        )
        meeting.append(store)
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=ranks.rank, world_size=ranks.size, timeout=wait
        )
        tensor = torch.empty(2**24 if on_gpu else 2**20, device=f"cuda:{ranks.local_rank}" if on_gpu else "cpu")
        seconds = []
        for _ in range(3):
            tensor.fill_(ranks.rank + 1)
            total = float(tensor[-1])  # the device has got so far
            start = time.perf_counter()
            distributed.all_reduce(tensor)
            total = float(tensor[-1])
            seconds.append(time.perf_counter() - start)
    except RuntimeError as error:
        text = (
            f"rank {ranks.rank} of {ranks.size} did not reach the others at {host}:{port} within {WAIT_S} s ({error})"
        )
        text += (
            "; are all nodes started with this address and --world_size, is the port open? NCCL_DEBUG=INFO says more"
        )
        yield Finding("fail", "links", " ".join(text.split()))
        return
    expected = ranks.size * (ranks.size + 1) / 2
    if total != expected:
        yield Finding("fail", "links", f"the sum over {ranks.size} ranks is {total}, not {expected}: a broken link")
        return
    rate = 2 * (ranks.size - 1) / ranks.size * tensor.nbytes / min(seconds) / 1e9
    text = f"all-reduce of {tensor.nbytes / 2**20:.0f} MiB between {ranks.size} ranks by {'NCCL' if on_gpu else 'gloo'}"
    yield Finding("ok", "links", f"{text}: {min(seconds) * 1e3:.1f} ms, {rate:.2f} GB/s per rank")


def shared_memory() -> Iterator[Finding]:
    """/dev/shm, through which NCCL and worker processes of one node talk."""
    usage = shutil.disk_usage("/dev/shm")
    if usage.free < 2**30:
        text = f"{usage.free / 2**20:.0f} MiB free in /dev/shm; start the container with --shm-size=8g"
        yield Finding("warn", "shared memory", text)
    else:
        yield Finding("ok", "shared memory", f"{usage.free / 1e9:.1f} GB free in /dev/shm")


if __name__ == "__main__":
    sys.exit(main())
