"""bench_gpu.py, the device: what it is, its limits, and the store's codecs decoded on it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gpu_part import Job, Rows, median_seconds, wait

from pipeline.codec import from_payload, payload_bytes, to_payload
from pipeline.schema import Codec, Column


def describe(job: Job) -> dict[str, Any]:
    """Name, memory and versions."""
    import os

    import transformers

    detail = {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda}
    detail |= {"python": platform.python_version(), "cores": os.cpu_count(), "seed": 0}
    if job.cpu:
        return {"name": platform.processor() or "cpu", "devices": 0, **detail}
    properties = torch.cuda.get_device_properties(0)
    memory = {"total_gb": properties.total_memory / 1e9, "devices": torch.cuda.device_count()}
    return {"name": properties.name, **memory, **detail}


def matrix_product(job: Job) -> dict[str, Any]:
    """The limit of all that computes: random numbers, as zeros run faster."""
    side = 512 if job.cpu else 8192
    a, b = (torch.randn(side, side, device=job.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = median_seconds(lambda: a @ b, job.device, rounds=7, inner=1 if job.cpu else 10)
    return {"tflops": 2 * side**3 / seconds / 1e12, "side": side}


def copies(job: Job, how: str) -> dict[str, Any]:
    """GB/s of a copy on the device (read and written both count), or from the host to it."""
    size = 2**24 if job.cpu else 2**31
    if how == "device":
        source, target = (torch.empty(size, dtype=torch.uint8, device=job.device) for _ in range(2))
        source.random_(0, 255)
        return {"gb_per_s": 2 * size / median_seconds(lambda: target.copy_(source), job.device) / 1e9}
    source = torch.ones(size // 4, dtype=torch.uint8, pin_memory=how == "pinned" and not job.cpu)
    target = torch.empty_like(source, device=job.device, pin_memory=False)
    seconds = median_seconds(lambda: target.copy_(source, non_blocking=how == "pinned"), job.device)
    return {"gb_per_s": size / 4 / seconds / 1e9}


def decoding(job: Job, codec: Codec) -> dict[str, Any]:
    """Payload of images on the device -> bf16 features there: GB/s of payload, and the share of the copy's speed."""
    images = 4 if job.cpu else 256
    column = Column(name="block03", tokens=576, width=1024)
    if codec == "bf16":
        return {"note": "a view of the payload: no work"}
    payload = to_payload(torch.randn(images, 576, 1024, device=job.device, dtype=torch.bfloat16), codec)
    wait(job.device)
    seconds = median_seconds(lambda: from_payload(payload, column, codec, torch.bfloat16), job.device)
    size = images * payload_bytes(column, codec)
    row = {"payload_gb_per_s": size / seconds / 1e9, "images_per_s": images / seconds / 8}
    moved = size + images * 576 * 1024 * 2  # read the payload, write bf16
    return {**row, "of_limit": moved / seconds / job.copy}


def main() -> None:
    """All rows."""
    job = Job.from_command_line()
    rows = Rows(job)
    rows.row("device", lambda: describe(job))
    rows.row("bf16 matrix product", lambda: matrix_product(job))
    rows.row("copy on the device", lambda: copies(job, "device"))
    rows.row("host to device, pinned", lambda: copies(job, "pinned"))
    rows.row("host to device, pageable", lambda: copies(job, "pageable"))
    known = replace(job, limits=rows.found)
    for codec in ("bf16", "fp16", "fp8", "int8"):
        call: Callable[[], dict[str, Any]] = lambda codec=codec: decoding(known, codec)  # noqa: E731
        rows.row(f"decode {codec}, 8 blocks", call)


if __name__ == "__main__":
    main()
