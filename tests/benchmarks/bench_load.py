#!/usr/bin/env python
"""What a rank holds in its host's memory while a model is loaded, trained for a step, and exported: one table.

    python tests/benchmarks/bench_load.py [--code FOLDER] [--out runs/bench]

Two ranks on CPUs; a Llama of random weights, 1.03 GB as fp16 in three files, which is 2.06 GB in fp32; LoRA, so that
weights and not the optimizer's state are what is measured. Peaks are Linux's own, VmHWM, from the end of the imports
on. With `--code` another copy of this repository is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
LLM = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 40, "num_attention_heads": 8}
BLOCKS = (1, 2, 4)


def write_parts(folder: Path) -> None:
    """CLIP, Llama with a tokenizer, and a store of 32 images."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from fixtures.runs import write_random_store, write_tokenizer
    from pipeline.encoder import describe_encoder
    from training.toy.models import VOCABULARY

    if (folder / "complete").exists():
        return
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 5}
    CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **shape)).save_pretrained(folder / "clip")
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **LLM)).half()
    llm.save_pretrained(folder / "llm", max_shard_size="400MB")
    write_tokenizer(folder / "llm")
    write_random_store(folder / "store", describe_encoder(str(folder / "clip"), None), BLOCKS, 32)
    (folder / "complete").touch()


def settings(folder: Path, engine: str) -> dict[str, Any]:
    """What TrainConfig takes: one step of stage 2."""
    return {
        "run": str(folder / "runs" / engine),
        "train": ["connector", "llm"],
        "model": {
            "llm": str(folder / "llm"),
            "frozen_dtype": "float32",
            "connector": {"blocks": BLOCKS},
            "lora": {"rank": 4},
        },
        "data": {"store": str(folder / "store"), "template": "v1", "max_length": 128, "threads": 1},
        "optimizer": {"lr": 1e-4},
        "checkpoint": {"interval": "100ep", "autoresume": False},
        "global_batch_size": 2,
        "steps": 1,
        "precision": "fp32",
        "parallelism": engine,
        "boards": [],
        "device": "cpu",
    }


def measure(folder: Path, engine: str, code: Path) -> list[dict[str, float]]:
    """Of each rank, its peak up to the first step, and up to the end, in 10^9 bytes."""
    shutil.rmtree(folder / "runs" / engine, ignore_errors=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        places = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "PYTHONPATH": code}
        command = [sys.executable, __file__, "--rank-of", json.dumps(settings(folder, engine))]
        environment = os.environ | {name: str(value) for name, value in places.items()}
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    told = [process.communicate()[0].splitlines()[-1:] for process in ranks]
    assert not any(process.returncode for process in ranks), f"{engine} failed"
    return [json.loads(lines[0]) for lines in told]


def one_rank(config: dict[str, Any]) -> None:
    """Train as one of the ranks, and print the peaks."""
    import composer  # noqa: F401 - as what else is imported, before memory is watched
    import peft  # noqa: F401

    from training.config import TrainConfig
    from training.fit import stage

    if config["parallelism"].startswith("zero"):
        import training.engines.deepspeed_callback  # noqa: F401

    peaks, build = {}, stage.build_trainer

    def build_and_look(*arguments: Any) -> Any:
        built = build(*arguments)
        peaks["loaded"] = peak()
        return built

    stage.build_trainer = build_and_look
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    peaks["start"] = peak()
    stage.train(TrainConfig.model_validate(config))
    print(json.dumps(peaks | {"end": peak()}))


def peak() -> float:
    """Most that this process has held, in 10^9 bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(lines["VmHWM"].split()[0]) * 1024 / 1e9, 2)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, default=ROOT, help="root of the repository that is measured")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--engines", nargs="*", default=ENGINES)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        sys.path.remove(str(Path(__file__).parent))
        return one_rank(json.loads(arguments.rank_of))
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    folder = arguments.out / "load"
    write_parts(folder)
    table = {}
    for engine in arguments.engines:
        table[engine] = measure(folder, engine, arguments.code.resolve())
        one, other = table[engine]
        print(
            f"{engine:6} begins {one['start']:.2f}  loaded {one['loaded']:.2f}, {other['loaded']:.2f}  "
            f"end {one['end']:.2f}, {other['end']:.2f} GB per rank",
            flush=True,
        )
    (arguments.out / "load.json").write_text(json.dumps(table, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
