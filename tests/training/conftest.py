"""Tiny parts from a seed, a store made of them with the project's own writers, and runs of several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.manifest import create_or_check, write_commit, write_manifest
from pipeline.schema import SAMPLES, Column, Commit, EncoderSpec, Sample, StoreSpec, tar_path
from pipeline.shard import TarWriter, sample_json
from pipeline.storage import Storage
from training.toy.models import VOCABULARY, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BLOCKS, GRID, WIDTH = (1, 2, 4), 4, 32
WORDS = ["red", "green", "blue", "big", "small", "circle", "square", "left", "right", "above", "one", "two", "the", "a"]


def write_tokenizer(folder: Path) -> None:
    rng = np.random.default_rng(0)
    texts = {str(number): " ".join(rng.choice(WORDS, 8)) + "." for number in range(200)}
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, []))


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `llm` (with a tokenizer) and `clip`."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, initializer_range=0.1, **shape))
    llm.save_pretrained(folder / "llm")
    write_tokenizer(folder / "llm")
    shape |= {"hidden_size": WIDTH, "num_hidden_layers": 5}
    CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **shape)).save_pretrained(folder / "clip")
    return folder


def sample(number: int, rng: np.random.Generator) -> Sample:
    key, image = f"{number:09d}", None if number % 6 == 5 else f"{number}.jpg"
    answer = " ".join(rng.choice(WORDS, int(rng.integers(2, 20)))) + "."
    question = ("<image>\n" if image else "") + " ".join(rng.choice(WORDS, int(rng.integers(2, 12)))) + "?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    tree = {"key": key, "image": image, "width": 32, "height": 32, "conversations": [{"id": key, "turns": turns}]}
    return Sample.model_validate(tree)


def write_store(
    folder: Path,
    clip: Path,
    samples: int,
    per_shard: int = 32,
    blocks: tuple[int, ...] = BLOCKS,
    grid: int = GRID,
    width: int = WIDTH,
    patch_size: int = 8,
) -> Path:
    storage, rng = Storage(str(folder)), np.random.default_rng(1)
    names = [f"block{block:02d}" for block in blocks]
    records = [sample(number, rng) for number in range(samples)]
    for shard in range(samples // per_shard):
        mine = records[shard * per_shard : (shard + 1) * per_shard]
        files = {}
        for name in (SAMPLES, *names):
            path = folder / tar_path(name, shard)
            path.parent.mkdir(parents=True, exist_ok=True)
            with TarWriter(path) as tar:
                for record in mine:
                    if name == SAMPLES:
                        tar.add(f"{record.key}.json", sample_json(record))
                    elif record.image is None:
                        tar.skip()
                    else:
                        values = torch.from_numpy(rng.standard_normal((grid**2, width))).to(torch.bfloat16)
                        tar.add(f"{record.key}.{name}.bf16", values.view(torch.uint8).numpy().tobytes())
                files[name] = tar.finish()
        lengths = tuple(tuple(sum(len(t.value.split()) for t in c.turns) for c in r.conversations) for r in mine)
        keys, images = tuple(r.key for r in mine), tuple(r.image for r in mine)
        write_commit(storage, Commit(shard=shard, keys=keys, images=images, words=lengths, files=files, failures=()))
    size = {"width": width, "image_size": grid * patch_size, "patch_size": patch_size}
    encoder = EncoderSpec(id=str(clip), revision="0", blocks=max(blocks), **size)
    spec = StoreSpec(
        dataset="0" * 64,
        samples=samples,
        shards=samples // per_shard,
        shard_size=per_shard,
        seed=0,
        encoder=encoder,
        aspect="pad",
        compute="float32",
        codec="bf16",
        columns=tuple(Column(name=name, tokens=grid**2, width=width) for name in names),
    )
    create_or_check(storage, spec)
    write_manifest(storage, spec, ())
    return folder


@pytest.fixture(scope="session")
def new_store() -> Callable[..., Path]:
    """new_store(folder, clip, samples, ...): a store of random features in the folder."""
    return write_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Path:
    """128 samples in 4 shards, every sixth without an image."""
    return write_store(tmp_path_factory.mktemp("store") / "store", parts / "clip", 128)


def merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        place = tree
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return tree


@pytest.fixture(scope="session")
def settings(store: Path, parts: Path) -> Callable[..., dict[str, Any]]:
    """settings(run, stage, {"a.b": value}): what TrainConfig takes, 20 steps of 8 examples in fp32."""

    def make(run: Path, stage: int, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        tree = {
            "run": str(run),
            "train": ["connector"] if stage == 1 else ["connector", "llm"],
            "model": {"llm": str(parts / "llm"), "frozen_dtype": "float32", "connector": {"blocks": BLOCKS}},
            "data": {"store": str(store), "template": "v1", "max_length": 128, "threads": 1, "window_shards": 2},
            "optimizer": {"lr": 2e-3, "warmup_ratio": 0.1, "clip_grad_norm": 1.0},
            "checkpoint": {"interval": "4ba"},
            "global_batch_size": 8,
            "microbatch_size": 2,
            "steps": 20,
            "precision": "fp32",
            "boards": [],
            "device": "cpu",
        }
        return merged(tree, changes or {})

    return make


@pytest.fixture(scope="session")
def run_jobs() -> Callable[..., list[list[int]]]:
    """run_jobs(folder, jobs): exit codes of each rank of each job (ranks.py); what they said is in <run>/output."""

    def run(folder: Path, jobs: list[dict[str, Any]], environment: dict[str, str] | None = None) -> list[list[int]]:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "jobs.json"
        path.write_text(json.dumps(jobs, default=str))
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(path)]
        variables |= environment or {}
        done = subprocess.run(command, check=False, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return [job["codes"] for job in json.loads(path.with_suffix(".out.json").read_text())]

    return run


@pytest.fixture(scope="session")
def read_log() -> Callable[[Path], list[dict[str, float]]]:
    """The lines of a run's log."""
    return lambda run: [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
