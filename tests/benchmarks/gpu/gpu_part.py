"""What the parts of bench_gpu.py share: shapes, random models made on the device, a store, and how a row is said."""

from __future__ import annotations

import gc
import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixtures import written
from fixtures.written import WORDS
from training.cost.shapes import CLIP_L, SIZES

ROOT = Path(__file__).resolve().parents[3]
BLOCKS = (3, 6, 9, 12, 15, 18, 21, 24)  # section 3.3 of the paper
LLAMA = {
    "7b": SIZES["7b"],
    "1.3b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
}
TINY_LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 24, "num_attention_heads": 4}
TINY_CLIP |= {"image_size": 96, "patch_size": 8}


@dataclass(frozen=True)
class Job:
    """What the parent says: the part's seconds, where files may go, and the limits that the first rows measured."""

    part: str
    began: float
    seconds: float
    scratch: Path
    cpu: bool
    limits: dict[str, dict[str, Any]]

    @classmethod
    def from_command_line(cls) -> Job:
        """Of this process."""
        tree = json.loads(sys.argv[1])
        return cls(**{**tree, "scratch": Path(tree["scratch"])})

    @property
    def device(self) -> str:
        """As torch names it."""
        return "cpu" if self.cpu else "cuda"

    @property
    def flops(self) -> float:
        """FLOP/s of bf16 matrix products on this card, as measured; NaN if that row failed."""
        return 1e12 * float(self.limits.get("bf16 matrix product", {}).get("tflops") or "nan")

    @property
    def copy(self) -> float:
        """Bytes/s of device memory, read and written, as measured; NaN if that row failed."""
        return 1e9 * float(self.limits.get("copy on the device", {}).get("gb_per_s") or "nan")


class Rows:
    """Says rows to the parent, each with its seconds and its peak of device memory."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.end = time.monotonic() + job.seconds - (time.time() - job.began)
        self.found: dict[str, dict[str, Any]] = {}
        self.say({"row": "start-up", "seconds": round(time.time() - job.began, 1)})

    @property
    def left(self) -> float:
        """Seconds of this part."""
        return self.end - time.monotonic()

    def row(self, name: str, call: Callable[[], dict[str, Any]], needs_s: float = 3) -> dict[str, Any]:
        """Measure one; a failure is a row too. Without `needs_s` seconds left it is not begun."""
        import torch

        start, gpu = time.monotonic(), torch.cuda.is_available() and not self.job.cpu
        found: dict[str, Any]
        if self.left < needs_s and not self.job.cpu:
            found = {"skipped": f"{self.left:.0f} s left, {needs_s:.0f} s needed"}
        else:
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            try:
                found = call()
                if gpu:
                    found.setdefault("memory_gb", torch.cuda.max_memory_allocated() / 1e9)
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {' | '.join(str(error).strip().splitlines()[:2])[:300]}"}
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
        rounded = {key: _rounded(value) for key, value in found.items()}
        self.found[name] = rounded
        self.say({"row": name, "seconds": round(time.monotonic() - start, 1), **rounded})
        return rounded

    def figure(self, row: str, name: str) -> float:
        """A figure of a row of this part; NaN if it has none."""
        found = self.found.get(row, {}).get(name)
        return float("nan") if found is None else float(found)

    @staticmethod
    def say(row: dict[str, Any]) -> None:
        """To the parent."""
        print("\nROW " + json.dumps(row), flush=True)


def _rounded(value: Any) -> Any:
    """A figure as JSON has it: NaN, where a limit is not known, is null."""
    if not isinstance(value, float):
        return value
    return round(value, 5) if math.isfinite(value) else None


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def median_seconds(call: Callable[[], Any], device: str, rounds: int = 5, inner: int = 1) -> float:
    """Median over `rounds` of the seconds of one call, after a warm-up; `inner` calls are timed together."""
    import statistics

    call()
    wait(device)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(inner):
            call()
        wait(device)
        seconds.append((time.perf_counter() - start) / inner)
    return statistics.median(seconds)


def llama_folder(job: Job, size: str) -> Path:
    """A folder with a configuration and a tokenizer, and no weights: `random_llama` makes them."""
    from transformers import LlamaConfig

    from training.toy.models import VOCABULARY, train_tokenizer

    folder = job.scratch / f"llm-{size}"
    if not folder.exists():
        shape = TINY_LLAMA if job.cpu else LLAMA[size]
        words = VOCABULARY if job.cpu else 32000
        LlamaConfig(vocab_size=words, pad_token_id=0, max_position_embeddings=4096, **shape).save_pretrained(folder)
        texts = {str(n): " ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 9)) + "." for n in range(1, 200)}
        (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, []))
    return folder


def random_llama(device: str) -> Callable[..., Any]:
    """Makes a model of random weights where they are needed: (folder or id, revision, dtype)."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    def make(name: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
        config = AutoConfig.from_pretrained(name)
        torch.manual_seed(0)
        with torch.device(device):
            llm = LlamaForCausalLM._from_config(config, dtype=dtype)
        llm.name_or_path = name
        return llm

    return make


def write_store(job: Job, name: str, samples: int, words: tuple[int, int], encoder: str = "random") -> Path:
    """A store of random features, made on the device; answers of so many words, from first to last.

    Args:
        encoder: folder of the CLIP that it names: only an export reads it.
    """
    import numpy as np
    import torch

    from pipeline.encoder import describe_encoder
    from pipeline.schema import Column, EncoderSpec, Sample

    folder = job.scratch / name
    if folder.exists():
        return folder
    clip = TINY_CLIP if job.cpu else CLIP_L
    size = {"image_size": clip["image_size"], "patch_size": clip["patch_size"], "width": clip["hidden_size"]}
    digest = describe_encoder(encoder, None).revision if Path(encoder).is_dir() else "0"  # an export asks for it
    spec = written.store_spec(
        EncoderSpec(id=encoder, revision=digest, blocks=24, **size), BLOCKS, samples, samples, compute="bfloat16"
    )

    def features(column: Column, pictured: list[Sample]) -> Any:
        shape = (len(pictured), column.tokens, column.width)
        values = torch.randn(shape, device=job.device, dtype=torch.bfloat16)
        return values.view(torch.uint8).view(len(pictured), -1).cpu().numpy()

    rng = np.random.default_rng(0)
    return written.write_store(folder, spec, [_sample(number, rng, words) for number in range(samples)], features)


def _sample(number: int, rng: Any, words: tuple[int, int]) -> Any:
    from pipeline.schema import Sample

    key, answer = f"{number:09d}", " ".join(rng.choice(WORDS, int(rng.integers(*words)))) + "."
    turns = [{"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": answer}]
    conversations = [{"id": key, "turns": turns}]
    tree = {"key": key, "image": f"{key}.jpg", "width": 640, "height": 480, "conversations": conversations}
    return Sample.model_validate(tree)
