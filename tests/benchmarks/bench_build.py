#!/usr/bin/env python
"""How fast a store is built, beside its limits and peers: `runs/bench/build.json` and the same as a table.

    python tests/benchmarks/bench_build.py [large] [small] [gpu] [write] [memory] [codec]

large, small   pipeline efficiency: (whole job in its steady state) / (bare loop: decode, then CLIP, one process, same
               batch, same cores), with ViT-L/14-336's architecture and with a CLIP of a tenth of its weights
gpu            the job on a GPU, if there is one, beside CLIP's forward pass alone at its best batch size; MFU
write          a shard's features to a RAM disk, MB/s: codec, tars and checksums, beside webdataset.ShardWriter (.npy)
memory         peak of all processes of the job, with 1,000 and with 10,000 images
codec          bytes, MB/s and relative error of every codec, on features of ViT-L/14-336's architecture

Weights are random and images drawn: speeds depend on neither. Parts that are not named keep their results of an
earlier run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
import torch.utils.flop_counter  # noqa: E402
from PIL import Image  # noqa: E402

from pipeline.codec import from_payload, payload_bytes, to_payload  # noqa: E402
from pipeline.demo_data import draw  # noqa: E402
from pipeline.encoder import Encoder, columns_of, describe_encoder  # noqa: E402
from pipeline.encoders.clip import Clip  # noqa: E402
from pipeline.encoders.decode import load_image  # noqa: E402
from pipeline.plan import CODECS  # noqa: E402
from pipeline.schema import Column  # noqa: E402
from pipeline.shard import TarWriter  # noqa: E402

CPUS = os.cpu_count() or 1
CUDA = torch.cuda.is_available()
COMPUTE = "bfloat16"
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SMALL = {"hidden_size": 448, "intermediate_size": 1792, "num_hidden_layers": 12, "num_attention_heads": 7}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
PAPER_BLOCKS = (3, 6, 9, 12, 15, 18, 21, 24)
PEAK = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}  # FLOP/s, bf16, without sparsity
Ratio = dict[str, Any]


def save_clip(folder: Path, shape: dict[str, int], image_size: int = 336, patch_size: int = 14) -> Path:
    """A CLIP with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(**shape, image_size=image_size, patch_size=patch_size)
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


def save_images(folder: Path, count: int) -> None:
    """Photos' size and weight: 640 x 480, about 60 kB of JPEG; `data.json` names them."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.jpg", quality=85)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
        records.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))


def build(folder: Path, watch: Callable[[subprocess.Popen[bytes]], None], **settings: object) -> None:
    """The job as a user runs it, with one worker that has the whole machine; `watch` is called while it runs."""
    fixed = {
        "data": folder / "data.json",
        "images": folder / "images",
        "store": folder / "store",
        "encoder": folder / "clip",
        "compute": COMPUTE,
        "num_cpus": CPUS,
        "num_gpus": int(CUDA),
        "workers": 1,
    }
    command = [sys.executable, "pipeline/build_shards.py", *(f"{k}={v}" for k, v in {**fixed, **settings}.items())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "", "HF_HUB_OFFLINE": "1"}
    environment["RAY_worker_niceness"] = "0"  # Ray's own is 15; the bare loop has 0
    with (folder / "log").open("wb") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while job.poll() is None:
            watch(job)
            time.sleep(0.2)
    if job.returncode:
        sys.exit((folder / "log").read_text()[-4000:])


def efficiency(shape: dict[str, int], blocks: tuple[int, ...], batch: int, shards: int, folder: Path) -> dict[str, Any]:
    """Images/s of the bare loop (before and after, averaged) and of the job between its first and last commit."""
    save_images(folder, batch * shards)
    clip = save_clip(folder / "clip", shape)
    paths = sorted((folder / "images").iterdir())
    half = len(paths) // 2 // batch * batch
    before = bare_loop(clip, blocks, paths[:half], batch)
    job = steady_rate(folder, blocks, batch)
    after = bare_loop(clip, blocks, paths[-half:], batch)
    bare = 2 / (1 / before + 1 / after)
    return {"bare_images_per_s": bare, "job_images_per_s": job, "bare_runs": [before, after], "images": len(paths)}


def steady_rate(folder: Path, blocks: tuple[int, ...], batch: int) -> float:
    """Images/s of the job between its first and its last commit; one batch makes a shard."""
    build(folder, lambda job: None, blocks=list(blocks), batch_size=batch, shard_size=batch)
    ends = sorted(path.stat().st_mtime for path in (folder / "store/commits").iterdir())
    return batch * (len(ends) - 1) / (ends[-1] - ends[0])


def bare_loop(clip: Path, blocks: tuple[int, ...], paths: list[Path], batch: int) -> float:
    """Images/s of decode and CLIP alone, one after the other, after one batch that warms up."""
    torch.set_num_threads(CPUS)
    columns = columns_of(describe_encoder(str(clip), None), blocks, ())
    encoder = Encoder(str(clip), None, columns, COMPUTE, "cuda" if CUDA else "cpu")

    def forward(part: list[Path]) -> None:
        pixels = [torch.from_numpy(Clip().pixels(load_image(path.read_bytes()), "pad", 336)) for path in part]
        features = encoder(torch.stack(pixels))
        if CUDA:
            torch.cuda.synchronize()
        del features

    forward(paths[:batch])
    start = time.perf_counter()
    for first in range(0, len(paths), batch):
        forward(paths[first : first + batch])
    return len(paths) / (time.perf_counter() - start)


def large(folder: Path) -> tuple[dict[str, Ratio], dict[str, Any]]:
    """ViT-L/14-336, the paper's eight blocks."""
    batch, shards = (64, 24) if CUDA else (4, 7)
    found = efficiency(LARGE, PAPER_BLOCKS, batch, shards, folder)
    ratio = found["job_images_per_s"] / found["bare_images_per_s"]
    return {"pipeline efficiency, ViT-L/14-336": at_least(ratio, 0.90)}, found


def small(folder: Path) -> tuple[dict[str, Ratio], dict[str, Any]]:
    """A tenth of the weights, eight blocks."""
    batch, shards = (64, 48) if CUDA else (8, 10)
    found = efficiency(SMALL, (1, 3, 4, 6, 7, 9, 10, 12), batch, shards, folder)
    ratio = found["job_images_per_s"] / found["bare_images_per_s"]
    return {"pipeline efficiency, a tenth of the weights": at_least(ratio, 0.80)}, found


def gpu(folder: Path) -> tuple[dict[str, Ratio], dict[str, Any]]:
    """The job on a GPU beside the forward pass alone, at the batch size that is best for that; MFU of both."""
    if not CUDA:
        return {}, {"skipped": "no CUDA device"}
    clip = save_clip(folder / "clip", LARGE)
    encoder = Encoder(str(clip), None, columns_of(describe_encoder(str(clip), None), PAPER_BLOCKS, ()), COMPUTE, "cuda")
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        encoder(torch.zeros(1, 3, 336, 336))
    forward = {}
    for batch in (32, 64, 128, 256):
        pixels = torch.randn(batch, 3, 336, 336, device="cuda")
        for repeat in range(6):
            if repeat == 1:
                torch.cuda.synchronize()
                start = time.perf_counter()
            encoder(pixels)
        torch.cuda.synchronize()
        forward[batch] = 5 * batch / (time.perf_counter() - start)
    batch = max(forward, key=lambda size: forward[size])
    del encoder, pixels
    torch.cuda.empty_cache()
    save_images(folder, 24 * batch)
    job = steady_rate(folder, PAPER_BLOCKS, batch)
    peak = next((flops for name, flops in PEAK.items() if name in torch.cuda.get_device_name()), None)
    figures: dict[str, Any] = {"batch": batch, "forward_images_per_s": forward, "job_images_per_s": job}
    if peak:
        flops = counter.get_total_flops()
        figures |= {"mfu_forward": forward[batch] * flops / peak, "mfu_job": job * flops / peak}
    return {"whole job on the GPU, of CLIP's forward pass": at_least(job / forward[batch], 0.90)}, figures


def write(folder: Path) -> tuple[dict[str, Ratio], dict[str, Any]]:
    """The same features through our writer and through webdataset's, taking turns."""
    import webdataset as wds

    count, rounds = 64, 5
    columns = [Column(name=f"block{block:02d}", tokens=576, width=1024) for block in PAPER_BLOCKS]
    features = {c.name: torch.randn(count, c.tokens, c.width).bfloat16() for c in columns}
    halves = {name: value.half().numpy() for name, value in features.items()}
    megabytes = count * len(columns) * payload_bytes(columns[0], "bf16") / 1e6

    def ours() -> None:
        for name, value in features.items():
            with TarWriter(folder / f"{name}.tar") as tar:
                for row, payload in enumerate(to_payload(value, "bf16").numpy()):
                    tar.add(f"{row:09d}.{name}.bf16", payload)
                tar.finish()

    def theirs() -> None:
        with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=count, maxsize=2**40, verbose=0) as tar:
            for row in range(count):
                tar.write({"__key__": f"{row:09d}", **{f"{name}.npy": value[row] for name, value in halves.items()}})

    rates: dict[str, list[float]] = {"ours": [], "webdataset": []}
    for _ in range(rounds + 1):
        for name, writer in (("ours", ours), ("webdataset", theirs)):
            start = time.perf_counter()
            writer()
            rates[name].append(megabytes / (time.perf_counter() - start))
            for path in folder.glob("*.tar"):
                path.unlink()
    best = {name: float(np.median(values[1:])) for name, values in rates.items()}
    ratio = at_least(best["ours"] / best["webdataset"], 2.0)
    return {"writing a shard, of webdataset.ShardWriter": ratio}, {f"{k}_mb_per_s": v for k, v in best.items()}


def memory(folder: Path) -> tuple[dict[str, Ratio], dict[str, Any]]:
    """Peak of the proportional set size of the driver, Ray and the worker together."""
    peaks = {}
    for images in (1_000, 10_000):
        part = folder / str(images)
        draw(part, images=images, heldout=4, image_size=48)
        (part / "chat.json").rename(part / "data.json")
        save_clip(part / "clip", TINY, image_size=32, patch_size=8)
        peak = 0

        def watch(job: subprocess.Popen[bytes]) -> None:
            nonlocal peak
            peak = max(peak, sum(_share(p) for p in [psutil.Process(job.pid), *_children(job.pid)]))

        build(part, watch, blocks=[2, 4], shard_size=64, batch_size=16)
        peaks[images] = peak
        shutil.rmtree(part)
    ratio = at_least(peaks[1_000] / peaks[10_000], 0.9)
    return {"peak memory with 1,000 images, of 10,000": ratio}, {f"peak_mb_{n}": p / 1e6 for n, p in peaks.items()}


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _share(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def codec(folder: Path) -> tuple[dict[str, Ratio], dict[str, Any]]:
    """Every codec on the features of two images."""
    save_images(folder, 2)
    clip = save_clip(folder / "clip", LARGE)
    columns = columns_of(describe_encoder(str(clip), None), PAPER_BLOCKS, ())
    pixels = [Clip().pixels(load_image(p.read_bytes()), "pad", 336) for p in sorted((folder / "images").iterdir())]
    features = Encoder(str(clip), None, columns, "float32")(torch.from_numpy(np.stack(pixels)))
    rows: dict[str, Any] = {}
    for name in CODECS:
        error, seconds = {}, {"encode": 0.0, "decode": 0.0}
        for column in columns:
            value = features[column.name]
            bf16 = value.bfloat16()
            payload = _timed(seconds, "encode", lambda bf16=bf16, name=name: to_payload(bf16, name))
            back = _timed(
                seconds,
                "decode",
                lambda payload=payload, column=column, name=name: from_payload(payload, column, name, torch.bfloat16),
            )
            error[column.name] = float((back.float() - value).norm() / value.norm())
        megabytes = sum(value.numel() * 2 for value in features.values()) / 1e6
        rows[name] = {
            "bytes_per_image": sum(payload_bytes(column, name) for column in columns),
            "encode_mb_per_s": megabytes / seconds["encode"],  # of bf16 features that go in
            "decode_mb_per_s": megabytes / seconds["decode"],  # and that come out
            "relative_error": error,
        }
    return {}, rows


def _timed(seconds: dict[str, float], name: str, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    call()
    start = time.perf_counter()
    result = call()
    seconds[name] += time.perf_counter() - start
    return result


def at_least(value: float, target: float) -> Ratio:
    """A ratio and whether it is what was aimed for."""
    return {"value": round(value, 3), "target": target, "met": bool(value >= target)}


PARTS = {"large": large, "small": small, "gpu": gpu, "write": write, "memory": memory, "codec": codec}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure (default: everything)")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"), help="a RAM disk (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/build.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    scratch = arguments.scratch if arguments.scratch.is_dir() else Path(tempfile.gettempdir())
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() and arguments.parts else {}
    result = {"bench": "build", "ratios": {}, "figures": {}, **result, "environment": environment()}
    for name in arguments.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=scratch) as folder:
            ratios, figures = PARTS[name](Path(folder))
        result["ratios"] |= ratios
        result["figures"][name] = figures
        print(f"{name}: {json.dumps(figures)}", flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    for name, ratio in result["ratios"].items():
        print(f"{name:50} {ratio['value']:>7} (target {ratio['target']}) {'met' if ratio['met'] else 'MISSED'}")


def environment() -> dict[str, Any]:
    """What the figures were measured on and with."""
    names = ("torch", "transformers", "ray", "webdataset", "numpy", "pillow")
    return {
        "command": "python tests/benchmarks/bench_build.py",
        "cpus": CPUS,
        "gpu": torch.cuda.get_device_name() if CUDA else None,
        "compute": COMPUTE,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


if __name__ == "__main__":
    main()
