#!/usr/bin/env python
"""What a training step costs, beside its peers: one command, one table, `runs/bench/train.json`.

    python tests/benchmarks/bench_train.py [--steps 16] [--turns 7]

The models are small, with the proportions of CLIP-L and a 7B Llama (a twentieth of the weights see the image). Figures
are ratios of what ran in the same turn, each in its own process, on the same CPU, as no machine is the same at every
minute. `bench_gpu.py` measures a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

from fixtures.kept import kept_bytes  # noqa: E402
from fixtures.runs import write_random_store, write_tokenizer  # noqa: E402
from pipeline.encoder import describe_encoder  # noqa: E402
from training.config import TrainConfig  # noqa: E402
from training.engines import engine_of  # noqa: E402
from training.fit.composer_model import TrainableModel, microbatches  # noqa: E402
from training.fit.optimizer import build_optimizer  # noqa: E402
from training.fit.parts import open_parts  # noqa: E402
from training.stream.batch import Batch  # noqa: E402

BLOCKS, WIDTH = (2, 3, 4, 5, 6, 7, 8), 128
CLIP = {"hidden_size": WIDTH, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4}
LLM = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8}
LLM_VOCABULARY = 8192
WARM_UP = 2  # steps of each run that do not count
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")


def write_parts(folder: Path) -> None:
    """CLIP, Llama with a tokenizer, and a store of 64 images; the tests' own writer."""
    if (folder / "complete").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(image_size=336, patch_size=14, **CLIP)).save_pretrained(folder / "clip")
    LlamaForCausalLM(LlamaConfig(vocab_size=LLM_VOCABULARY, pad_token_id=0, **LLM)).save_pretrained(folder / "llm")
    write_tokenizer(folder / "llm")
    write_random_store(folder / "store", describe_encoder(str(folder / "clip"), None), BLOCKS, 64)
    (folder / "complete").touch()


def settings(folder: Path, run: str, stage: int, steps: int, **changes: Any) -> dict[str, Any]:
    """What TrainConfig takes."""
    tree = {
        "run": str(folder / "runs" / run),
        "train": ["connector"] if stage == 1 else ["connector", "llm"],
        "model": {"llm": str(folder / "llm"), "frozen_dtype": "float32", "connector": {"blocks": BLOCKS}},
        "data": {"store": str(folder / "store"), "template": "v1", "max_length": 1024, "threads": 1},
        "optimizer": {"lr": 1e-4},
        "checkpoint": {"interval": "100ep"},
        "global_batch_size": 4,  # a step of more than half a second on two cores
        "steps": steps,
        "precision": "fp32",
        "device": "cpu",
    }
    return tree | changes


def run_composer(config: dict[str, Any], ranks: int) -> dict[str, float]:
    """A real run of train.py: median seconds of a step, peak GB of rank 0, share of waiting for data."""
    run = Path(config["run"])
    shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.with_suffix(".yaml")
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    launcher = str(Path(sys.executable).with_name("composer"))
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, launcher, "-n", str(ranks), str(ROOT / "training" / "train.py"), str(path)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()][WARM_UP:]
    return {
        "step_s": statistics.median(line["step_s"] for line in lines),
        "memory_gb": max(line["memory_gb"] for line in lines),
        "data_wait": sum(line["data_wait"] * line["step_s"] for line in lines) / sum(line["step_s"] for line in lines),
    }


def bare_loop(config: dict[str, Any], steps: int, live: bool = False, masked: bool = False) -> dict[str, float]:
    """The same model, optimizer and batches in a plain loop, batches in memory.

    Args:
        live: encode pixels instead of reading columns.
        masked: give the decoder the padding's mask, and attention as transformers chooses it.
    """
    parsed = TrainConfig.model_validate(config)
    store, _, model, stream, _ = open_parts(parsed, 0, 1)
    engine_of(parsed, 1).place(model)
    columns = tuple(next(c for c in store.columns if c.name == name) for name in model.connector.columns)
    optimizer = build_optimizer(model, parsed.optimizer)
    batches: list[Batch] = []
    for batch, _ in zip(stream, range(steps), strict=False):
        copied = Batch({**batch, "columns": {name: data.clone() for name, data in batch["columns"].items()}})
        batches += microbatches(copied, len(batch["keys"]), model.config.image_token_id, pin=False)
    trainable = TrainableModel(model, columns, store.codec, torch.float32)
    if masked:
        model.llm.set_attn_implementation("sdpa")
        batches = [Batch({name: value for name, value in batch.items() if name != "learned"}) for batch in batches]
    if live:
        model.vision_tower = CLIPVisionModel.from_pretrained(store.encoder.id).requires_grad_(False)
    seconds = []
    for batch in batches:
        pixels = torch.zeros(len(batch["image_rows"]), 3, 336, 336) if live else None
        start = time.perf_counter()
        if live:
            text = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
            loss = model(**text, pixel_values=pixels, use_cache=False).loss
        else:
            loss = trainable(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return {"step_s": statistics.median(seconds[WARM_UP:])}


def kept(config: dict[str, Any], everywhere: bool, parts: int) -> dict[str, float]:
    """MB that a forward pass keeps for its backward pass, with logits at all positions or at supervised ones alone."""
    parsed = TrainConfig.model_validate(config)
    store, _, model, stream, _ = open_parts(parsed, 0, 1)
    engine_of(parsed, 1).place(model)
    model.loss_chunks = parts
    columns = tuple(next(c for c in store.columns if c.name == name) for name in model.connector.columns)
    batch = next(iter(stream))
    if everywhere:  # where an image is, any token will do
        labels = batch["input_ids"].clamp(max=LLM_VOCABULARY - 1).masked_fill(batch["attention_mask"] == 0, -100)
        batch = Batch({**batch, "labels": labels})
    trainable = TrainableModel(model, columns, store.codec, torch.float32)
    return {"kept_mb": kept_bytes(lambda: trainable(batch), model.parameters())[0] / 1e6}


def alone(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """function(*arguments) in a process of its own, as a run of train.py is one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(folder: Path, steps: int, turns: int) -> dict[str, list[dict[str, float]]]:
    """Every row of the table: what each turn found."""
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)

    def row(name: str, found: dict[str, float]) -> None:
        rows[name].append({key: round(value, 4) for key, value in found.items()})
        print(f"{name:44} " + "  ".join(f"{key} {value}" for key, value in rows[name][-1].items()), flush=True)

    def of(run: str, stage: int = 1, model: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        tree = settings(folder, run, stage, steps, **changes)
        return tree | {"model": tree["model"] | (model or {})}

    compiled = {"compile": ["connector", "llm"]}
    for _ in range(turns):
        row("stage 1, bare loop", alone(bare_loop, of("bare"), steps))
        row("stage 1, Composer and stream", run_composer(of("ours"), 1))
        row("stage 1, the same, compiled", run_composer(of("compiled", model=compiled), 1))
        row("stage 1, bare loop, masked", alone(bare_loop, of("masked"), steps, False, True))
    row("stage 1, bare loop, live CLIP", alone(bare_loop, of("live"), steps, True))
    full = {"connector": {"arm": "mbtf", "blocks": BLOCKS}}
    row("stage 1, bare loop, 576 tokens", alone(bare_loop, of("576", model=full), steps))
    checkpointed = of("kept", 2, model={"activation_checkpointing": True})
    row("stage 2, logits at all positions", kept(checkpointed, True, 1))
    row("stage 2, logits where supervised", kept(checkpointed, False, 1))
    row("stage 2, the same in 4 parts", kept(checkpointed, False, 4))
    for _ in range(min(turns, 3)):
        for engine in ENGINES:
            row(f"stage 2, 2 ranks, {engine}", run_composer(of(engine, 2, parallelism=engine), 2))
    return dict(rows)


def ratios(rows: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Name -> median, least and most of the turns, target, whether it is met; `at most` targets say so by name."""

    def of(name: str, beside: str, key: str = "step_s") -> list[float]:
        one, other = ([found[key] for found in rows[row]] for row in (name, beside))
        if len(one) != len(other):  # measured once: beside the median of the turns
            other = [statistics.median(other)] * len(one)
        return [a / b for a, b in zip(one, other, strict=True)]

    bare, ours, everywhere = "stage 1, bare loop", "stage 1, Composer and stream", "stage 2, logits at all positions"
    checks: list[tuple[str, list[float], float, bool]] = [
        ("a step of ours, of a bare loop (at most)", of(ours, bare), 1.03, False),
        ("waiting for data (at most)", [found["data_wait"] for found in rows[ours]], 0.02, False),
        ("compiled, of not compiled (at most)", of("stage 1, the same, compiled", ours), 1.0, False),
        ("without a mask, of with one (at most)", of(bare, "stage 1, bare loop, masked"), 1.0, False),
        ("live CLIP, of cached features", of("stage 1, bare loop, live CLIP", bare), 1.0, True),
        (
            "kept, of logits at all positions (at most)",
            of("stage 2, the same in 4 parts", everywhere, "kept_mb"),
            1.0,
            False,
        ),
        ("576 tokens, of 144", of("stage 1, bare loop, 576 tokens", bare), 2.0, True),
    ]
    for engine in ENGINES[1:]:
        found = of(f"stage 2, 2 ranks, {engine}", "stage 2, 2 ranks, ddp")
        checks.append((f"{engine} step, of ddp (at most)", found, 1.5, False))
    result = {}
    for name, found, target, at_least in checks:
        value, least, most = (round(of(found), 3) for of in (statistics.median, min, max))
        met = value >= target if at_least else value <= target
        result[name] = {"value": value, "least": least, "most": most, "target": target, "met": met}
    return result


def main() -> None:
    """Make the parts, measure, print the ratios, keep it all in runs/bench/train.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=16, help="of each run, two of which warm up (default: %(default)s)"
    )
    parser.add_argument("--turns", type=int, default=7, help="of what is compared closely (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=ROOT / "runs/bench/train-data", help="where parts and runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench/train.json")
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        sys.exit(f"error: --steps {arguments.steps}: the first {WARM_UP} warm up, so at least {WARM_UP + 1} are needed")
    if arguments.turns < 1:
        sys.exit(f"error: --turns {arguments.turns}: at least 1 is needed")
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())  # of a bare loop, as of a run of one rank
    write_parts(arguments.data)
    rows = measure(arguments.data, arguments.steps, arguments.turns)
    found = ratios(rows)
    for name, line in found.items():
        said = f"{line['value']:>7} [{line['least']}, {line['most']}]"
        print(f"{name:44} {said:26} (target {line['target']}) {'met' if line['met'] else 'MISSED'}")
    environment = {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
    environment["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    environment |= {name: importlib.metadata.version(name) for name in ("torch", "mosaicml", "deepspeed")}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"ratios": found, "environment": environment, "rows": rows, "steps": arguments.steps}
    arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
