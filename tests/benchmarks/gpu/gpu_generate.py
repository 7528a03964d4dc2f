"""bench_gpu.py, answers: training/efficiency.py on random 7B weights, 576 to 64 vision tokens in one run."""

from __future__ import annotations

from typing import Any

import torch
from gpu_part import LLAMA, TINY_CLIP, TINY_LLAMA, Job, Rows

from training.cost.flops import prefill_flops
from training.cost.measured import Measurement, benchmark

TEXT, NEW, ROUNDS = 64, 12, 2  # tokens, tokens, medians over so many


def measured(job: Job, batch: int) -> list[dict[str, Any]]:
    """A row of efficiency.py for each number of vision tokens, most first."""
    settings = {"model": None, "config": _shape(job), "layers": None, "dtype": "auto", "text_tokens": TEXT}
    settings |= {"device": "cpu" if job.cpu else "cuda", "new_tokens": NEW, "batch_size": batch, "rounds": ROUNDS}
    rows: list[dict[str, Any]] = benchmark(Measurement(**settings))["rows"]
    return rows


def _shape(job: Job) -> str:
    if not job.cpu:
        return "7b"
    from transformers import CLIPVisionConfig, LlamaConfig

    from training.model.model import CompactVisionConfig

    text = LlamaConfig(vocab_size=480, **TINY_LLAMA)
    connector = {"vision_width": TINY_CLIP["hidden_size"], "llm_width": text.hidden_size, "grid": 12}
    config = CompactVisionConfig(text_config=text, vision_config=CLIPVisionConfig(**TINY_CLIP), connector=connector)
    config.save_pretrained(job.scratch / "shape")
    return str(job.scratch / "shape")


def row_of(job: Job, seen: dict[str, Any], first: dict[str, Any], batch: int) -> dict[str, Any]:
    """Milliseconds, and the shares of the limits: prefill computes, a step of decoding reads every weight once."""
    from transformers import LlamaConfig

    text = LlamaConfig(vocab_size=32000, **(TINY_LLAMA if job.cpu else LLAMA["7b"]))
    flops = batch * prefill_flops(text, seen["tokens"] + TEXT)
    layer = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
    read = 2 * (text.num_hidden_layers * layer + text.hidden_size * text.vocab_size)
    names = ("encode", "connector", "prefill", "first token", "per token")
    times = {f"{name.replace(' ', '_')}_ms": seen[name] for name in names}
    return {
        **times,
        "tokens_per_s": seen["tokens/s"],
        "of_limit": flops / (1e-3 * seen["prefill"]) / job.flops,
        "decode_of_limit": read / (1e-3 * seen["per token"]) / job.copy,
        "memory_gb": seen["peak bytes"] / 1e9,
        "peer": f"{first['tokens']} tokens",
        "x": seen["x"],
    }


def main() -> None:
    """Batches of 1 and 16, in one process."""
    job = Job.from_command_line()
    rows = Rows(job)
    torch.manual_seed(0)
    for batch in (1, 2 if job.cpu else 16):
        seen: list[dict[str, Any]] = []

        def measure(batch: int = batch, seen: list[dict[str, Any]] = seen) -> dict[str, Any]:
            seen += measured(job, batch)
            return {"rounds": ROUNDS, "new_tokens": NEW, "text_tokens": TEXT}

        rows.row(f"batch {batch}, efficiency.py", measure, 15)
        for line in seen:
            call = lambda line=line, batch=batch, seen=seen: row_of(job, line, seen[0], batch)  # noqa: E731
            rows.row(f"batch {batch}, {line['tokens']} vision tokens", call, 0)


if __name__ == "__main__":
    main()
