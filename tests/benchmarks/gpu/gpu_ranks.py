"""bench_gpu.py, ranks: NCCL between as many GPUs as there are, and a run that is saved, killed and resumed on them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_part import BLOCKS, ROOT, TINY_CLIP, Job, Rows, wait, write_store

STEPS, KILLED_AT = 8, 5


def _one_rank(rank: int, ranks: int, port: int, cpu: bool, out: str) -> None:
    """Seconds to begin, and GB/s of an all-reduce: a ring moves 2 (n - 1) / n of the tensor's bytes per rank."""
    import torch.distributed as dist

    device = "cpu" if cpu else "cuda"
    if not cpu:
        torch.cuda.set_device(rank)
    start = time.perf_counter()
    dist.init_process_group("gloo" if cpu else "nccl", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    tensor = torch.ones(2**16 if cpu else 2**28, device=device, dtype=torch.bfloat16)
    dist.all_reduce(tensor)
    wait(device)
    began = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(5):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    wait(device)
    seconds = (time.perf_counter() - start) / 5
    right = bool((tensor == ranks).all())
    if rank == 0:
        moved = 2 * (ranks - 1) / ranks * tensor.nbytes
        row = {"ranks": ranks, "init_s": began, "all_reduce_ms": 1e3 * seconds, "bus_gb_per_s": moved / seconds / 1e9}
        Path(out).write_text(json.dumps({**row, "right": right}))
    dist.destroy_process_group()


def all_reduce(job: Job, ranks: int) -> dict[str, Any]:
    """In processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = job.scratch / "all-reduce.json"
    torch.multiprocessing.spawn(_one_rank, (ranks, port, job.cpu, str(out)), nprocs=ranks)
    row: dict[str, Any] = json.loads(out.read_text())
    if not row.pop("right"):
        raise ValueError("the sum over the ranks is wrong")
    return row


def resumed(job: Job, ranks: int) -> dict[str, Any]:
    """A small run three times: undisturbed; killed in the middle; and the killed one once more. Equal losses?"""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from training.toy.models import VOCABULARY, train_tokenizer

    small = replace(job, cpu=True)
    llm, clip = job.scratch / "small-llm", job.scratch / "small-clip"
    CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP)).save_pretrained(clip)
    store = write_store(small, "small", 64, (8, 20), str(clip))
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **shape)).save_pretrained(llm)
    (llm / "tokenizer.model").write_bytes(train_tokenizer({str(n): f"one two {n}" for n in range(99)}, []))
    engine = "fsdp" if ranks > 1 else "ddp"
    tree = {
        "train": ["connector", "llm"],
        "model": {"llm": str(llm), "connector": {"blocks": BLOCKS}, "frozen_dtype": "float32"},
        "data": {"store": str(store), "template": "v1", "max_length": 1024, "threads": 2},
        "optimizer": {"lr": 1e-3},
        "global_batch_size": 4 * ranks,
        "microbatch_size": 2,
        "checkpoint": {"interval": "2ba"},
        "steps": STEPS,
        "parallelism": engine,
        "precision": "fp32" if job.cpu else "amp_bf16",
        "boards": [],
        "device": "cpu" if job.cpu else "gpu",
    }
    whole, killed = ({**tree, "run": str(job.scratch / name)} for name in ("whole", "killed"))
    jobs = [{"config": whole, "ranks": ranks}]
    jobs += [{"config": killed, "ranks": ranks, "signal": signal.SIGKILL, "at": KILLED_AT}]
    jobs += [{"config": killed, "ranks": ranks}]
    start = time.perf_counter()
    codes = _run(job, jobs)
    seconds = time.perf_counter() - start
    logs = [Path(run["run"], "log.jsonl").read_text().splitlines() for run in (whole, killed)]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    expected = [[0] * ranks, [-signal.SIGKILL] * ranks, [0] * ranks]
    if codes != expected:
        said = Path(whole["run"], "output").read_text() + Path(killed["run"], "output").read_text()
        print(said, file=sys.stderr)
        raise ValueError(f"the three runs ended with {codes}: {said.strip().splitlines()[-1]}")
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    row = {"ranks": ranks, "engine": engine, "killed_at": KILLED_AT, "steps": STEPS, "three_runs_s": seconds}
    return {**row, "largest_difference_of_losses": difference, "bit_equal": losses[0] == losses[1]}


def _run(job: Job, jobs: list[dict[str, Any]]) -> list[list[int]]:
    """tests/fixtures/ranks.py imports everything once, then forks the ranks of each job."""
    path = job.scratch / "jobs.json"
    path.write_text(json.dumps(jobs))
    # Asking the driver, not CUDA, how many GPUs there are: a process that has begun with CUDA cannot be forked.
    environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "OMP_NUM_THREADS": "1" if job.cpu else "4"}
    environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, str(ROOT / "tests/fixtures/ranks.py"), str(path)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    done = json.loads(path.with_suffix(".out.json").read_text())
    return [run["codes"] for run in done]


def main() -> None:
    """Both rows."""
    job = Job.from_command_line()
    ranks = 2 if job.cpu else torch.cuda.device_count()
    rows = Rows(job)
    rows.row("all-reduce of 512 MB", lambda: all_reduce(job, ranks), 5)
    rows.row("saved, killed, resumed", lambda: resumed(job, ranks), 50)


if __name__ == "__main__":
    main()
