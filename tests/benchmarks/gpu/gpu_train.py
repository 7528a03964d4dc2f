"""bench_gpu.py, training: the real train.py under Composer on random weights, beside a bare PyTorch loop."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import shutil
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from composer.core.engine import Engine
from gpu_part import BLOCKS, Job, Rows, llama_folder, median_seconds, random_llama, wait, write_store

import training.checkpoints.checkpoint
import training.cost.mfu
import training.engines
import training.fit.build
import training.fit.callbacks
import training.fit.parts
import training.fit.stage
import training.fit.trainer
from training.config import TrainConfig
from training.cost.memory import GRADIENT, MOMENTS, WEIGHT
from training.cost.mfu import StepFlops
from training.fit.callbacks import StepLog
from training.fit.composer_model import TrainableModel, microbatches, token_counts
from training.fit.optimizer import build_optimizer

WARM_UP = 2  # steps of each run that do not count
CONNECTOR = {"blocks": BLOCKS}
ALL_TOKENS = {"arm": "mbtf", "blocks": BLOCKS}  # 576 vision tokens
LORA = {"rank": 128, "alpha": 256}  # LLaVA-1.5's


class Bench:
    """Runs of one size of language model. Weights are random, nothing is saved or exported."""

    def __init__(self, job: Job, size: str) -> None:
        self.job, self.size = job, size
        self.llm = llama_folder(job, size)
        # As long as CC-595K's captions, and as the answers of Instruct-158K's conversations.
        # A batch for each step: nothing is read ahead across the end of an epoch.
        captions, talk = (32, 32) if job.cpu else (7 * 64, 8 * 16)
        self.stores = {1: write_store(job, "captions", captions, (8, 20)), 2: write_store(job, "talk", talk, (60, 200))}
        make = random_llama(job.device)
        training.fit.build.empty_llm = lambda llm, dtype: make(llm.llm, llm.revision, dtype)  # not empty: random
        training.fit.stage.finish, training.fit.stage.end_needs = lambda *_: None, lambda *_: []  # no export
        training.checkpoints.checkpoint.Checkpoints.save = lambda *_: None  # type: ignore[method-assign]
        training.fit.callbacks.peak_flops = lambda: 1.0  # `mfu` in the log is then the step's FLOP/s
        self.nominal = training.cost.mfu.peak_flops() or float("nan")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as train.py, also in `bare`

    def settings(self, stage: int, steps: int, **changes: Any) -> dict[str, Any]:
        """What TrainConfig takes; `changes` are `model__lora=...` for model.lora."""
        tree: dict[str, Any] = {
            "run": str(self.job.scratch / "run"),
            "train": ["connector"] if stage == 1 else ["connector", "llm"],
            "model": {"llm": str(self.llm), "connector": CONNECTOR, "loss_chunks": 1 if stage == 1 else 4},
            "data": {
                "store": str(self.stores[stage]),
                "template": "plain" if stage == 1 else "v1",
                "max_length": 2048,
                "group_by_length": stage == 2,
            },
            "optimizer": {"lr": 1e-5},
            "global_batch_size": 4 if self.job.cpu else 64 if stage == 1 else 16,
            "microbatch_size": 2 if self.job.cpu else 16 if stage == 1 else 8,
            "checkpoint": {"interval": "1000ep", "autoresume": False},
            "steps": steps,
            "boards": [],
            "device": "cpu" if self.job.cpu else "gpu",
            "precision": "fp32" if self.job.cpu else "amp_bf16",
        }
        for name, value in changes.items():
            *path, last = name.split("__")
            place = tree
            for key in path:
                place = place[key]
            place[last] = value
        return tree

    def run(self, stage: int, steps: int = 4, **changes: Any) -> dict[str, Any]:
        """train.py, in this process: medians over the steps after the warm-up."""
        config = TrainConfig.model_validate(self.settings(stage, WARM_UP + steps, **changes))
        shutil.rmtree(config.run, ignore_errors=True)
        try:
            training.fit.stage.train(config)
        finally:  # Composer registers it with the whole state, which would stay in memory
            atexit.unregister(Engine._close)
        lines = [json.loads(line) for line in (Path(config.run) / "log.jsonl").read_text().splitlines()]
        row = _medians(lines[WARM_UP:])
        row["first_step_s"] = lines[0]["step_s"]
        return self._rates(row)

    def bare(self, stage: int, steps: int = 4, **changes: Any) -> dict[str, Any]:
        """The same model, batches, microbatches and optimizer in a plain PyTorch loop, batches in pinned memory."""
        config, model, store, stream = self._assembled(stage, WARM_UP + steps, **changes)
        columns = tuple(next(c for c in store.columns if c.name == name) for name in model.connector.columns)
        dtype = torch.float32 if self.job.cpu else torch.bfloat16
        trainable = TrainableModel(model, columns, store.codec, dtype).to(self.job.device)
        optimizer, flops = build_optimizer(model, config.optimizer), StepFlops(model, config.train)
        wanted, lines = WARM_UP + steps, []
        start = time.perf_counter()
        while len(lines) < wanted:  # an epoch may be shorter
            for batch in stream:
                total = token_counts(batch)
                for part in microbatches(batch, config.microbatch_size, model.config.image_token_id, not self.job.cpu):
                    with torch.autocast(self.job.device, torch.bfloat16, enabled=not self.job.cpu):
                        loss = trainable(_moved(part, self.job.device)).loss
                        loss = loss * (part["tokens"]["predicted"] / total["predicted"])
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                wait(self.job.device)
                seconds = time.perf_counter() - start
                start = time.perf_counter()
                lengths = total["lengths"]
                work = flops(lengths, len(batch["image_rows"]), total["predicted"])
                rates = {"samples_per_s": len(lengths) / seconds, "tokens_per_s": sum(lengths) / seconds}
                lines.append({"step_s": seconds, **rates, "mfu": work / seconds})
                if len(lines) == wanted:
                    break
        return self._rates(_medians(lines[WARM_UP:]))

    def masks(self) -> dict[str, Any]:
        """Forward and backward of the frozen LLM: rows without a mask, with one that hides nothing, and padded ones."""
        _, model, _, _ = self._assembled(1, 1)
        rows, length = (2, 16) if self.job.cpu else (16, 256)
        llm = model.llm.model
        embeds = torch.randn(rows, length, llm.config.hidden_size, device=self.job.device, dtype=llm.dtype)
        embeds.requires_grad_()
        mask = torch.ones(rows, length, dtype=torch.int64, device=self.job.device)
        padded = mask.clone()
        padded[1:, -1] = 0  # one position is enough

        def step(given: torch.Tensor | None) -> None:
            with torch.autocast(self.job.device, torch.bfloat16, enabled=not self.job.cpu):
                out = llm(inputs_embeds=embeds, attention_mask=given, use_cache=False).last_hidden_state
            out.float().mean().backward()

        row: dict[str, Any] = {}
        for name, given in (("none", None), ("full", mask), ("padded", padded)):
            row[f"{name}_s"] = median_seconds(lambda given=given: step(given), self.job.device, rounds=3)
            row[f"{name}_kernel"] = _attention_op(lambda given=given: step(given))
        return {**row, "padded_of_none": row["padded_s"] / row["none_s"]}

    def trace(self, stage: int, **changes: Any) -> dict[str, Any]:
        """Steps 4 and 5 under the profiler: share without a kernel, and how much of the copies runs beside kernels.

        In step 6 the lines that wait for the device are counted.
        """
        seen: dict[str, Any] = {"waits": []}

        class Traced(StepLog):
            """Profiles two steps, and counts in the next."""

            def batch_start(self, state: Any, logger: Any) -> None:
                if state.timestamp.batch.value == 3:
                    seen["profiler"] = torch.profiler.profile(activities=_activities())
                    seen["profiler"].__enter__()
                    seen["start"] = time.time_ns()
                if state.timestamp.batch.value == 5:
                    seen["watch"] = _waits(seen["waits"])
                    seen["watch"].__enter__()
                super().batch_start(state, logger)

            def batch_end(self, state: Any, logger: Any) -> None:
                super().batch_end(state, logger)
                if state.timestamp.batch.value == 5:
                    torch.cuda.synchronize() if torch.cuda.is_available() else None
                    seen["ns"] = time.time_ns() - seen["start"]
                    seen["profiler"].__exit__(None, None, None)
                if state.timestamp.batch.value == 6:
                    seen["watch"].__exit__(None, None, None)

        training.fit.trainer.StepLog = Traced  # type: ignore[misc]
        try:
            self.run(stage, 4, **changes)
        finally:
            training.fit.trainer.StepLog = StepLog  # type: ignore[misc]
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
        row = read_trace(seen["profiler"], seen["ns"])
        if "detail" in row:
            row["waits_in_a_step"] = len(seen["waits"])
            row["detail"]["waits by line"] = dict(Counter(seen["waits"]).most_common(20))
        return row

    def fits(self) -> tuple[bool, str]:
        """Whether full tuning with fp32 Adam fits the card, by the bytes of the weights alone."""
        from transformers import AutoConfig, LlamaForCausalLM

        with torch.device("meta"):
            weights = sum(p.numel() for p in LlamaForCausalLM(AutoConfig.from_pretrained(self.llm)).parameters())
        if self.job.cpu:
            return True, ""
        # autocast keeps a bf16 copy of each weight from forward to backward; 6 GB for activations
        need, there = (
            (WEIGHT + GRADIENT + MOMENTS + 2) * weights / 1e9 + 6,
            torch.cuda.get_device_properties(0).total_memory / 1e9,
        )
        return need < there, f"weights, gradients, moments and bf16 copies take {need:.0f} GB, the card has {there:.0f}"

    def _assembled(self, stage: int, steps: int, **changes: Any) -> tuple[Any, ...]:
        config = TrainConfig.model_validate(self.settings(stage, steps, **changes))
        store, _, model, stream, _ = training.fit.parts.open_parts(config, 0, 1)
        training.engines.engine_of(config, 1).place(model)
        return config, model.to(self.job.device), store, stream

    def _rates(self, row: dict[str, Any]) -> dict[str, Any]:
        """FLOP/s as shares: of what was measured on this card, and of the maker's figure, where it is known."""
        flops = row.pop("mfu")
        return {**row, "of_limit": flops / self.job.flops, "mfu": flops / self.nominal}


def _moved(batch: Any, device: str) -> Any:
    """As Composer moves it: without waiting for what is pinned."""
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
    moved["columns"] = {name: value.to(device, non_blocking=True) for name, value in batch["columns"].items()}
    return type(batch)(moved)


def _medians(lines: list[dict[str, float]]) -> dict[str, Any]:
    names = ("step_s", "samples_per_s", "tokens_per_s", "data_wait", "mfu", "padding")
    return {name: statistics.median(line[name] for line in lines) for name in names if name in lines[0]}


@contextlib.contextmanager
def _waits(found: list[str]) -> Iterator[None]:
    """Note the line of each operation that makes the host wait for the device."""
    if not torch.cuda.is_available():
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            texts = [warning for warning in caught if "synchroniz" in str(warning.message)]
            found += [f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in texts]


def _activities() -> list[Any]:
    from torch.profiler import ProfilerActivity

    return [ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]


def _attention_op(step: Any) -> str:
    """The operators whose name speaks of attention, in one step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    names = {event.key.removeprefix("aten::") for event in profiler.key_averages() if "attention" in event.key}
    inner = sorted(name for name in names if name.startswith("_") and not name.endswith("backward"))
    return ", ".join(inner) or "none"


def read_trace(profiler: Any, window_ns: int) -> dict[str, Any]:
    """Kernels and copies of a window: idle share, share of the copies' time beside kernels, the longest kernels."""
    kernels: list[tuple[int, int]] = []
    copies: list[tuple[int, int]] = []
    by_name: dict[str, int] = {}
    for event in profiler.profiler.kineto_results.events():
        if "CUDA" not in str(event.device_type()):
            continue
        span = (event.start_ns(), event.start_ns() + event.duration_ns())
        name = event.name()
        if name.startswith("Memcpy HtoD"):
            copies.append(span)
        elif not name.startswith(("Memcpy", "Memset")):
            kernels.append(span)
        by_name[name] = by_name.get(name, 0) + event.duration_ns()
    if not kernels:
        return {"note": "no device to trace"}
    busy = _union(kernels)
    idle = 1 - sum(stop - start for start, stop in busy) / window_ns
    copied = sum(stop - start for start, stop in copies)
    beside = sum(max(0, min(b, d) - max(a, c)) for a, b in copies for c, d in busy if c < b and a < d)
    top = sorted(by_name.items(), key=lambda item: -item[1])[:15]
    detail = {name[:100]: round(ns / window_ns, 4) for name, ns in top}
    gaps = sorted((c - b for (_, b), (c, _) in itertools.pairwise(busy)), reverse=True)[:10]
    return {
        "idle": idle,
        "kernels": len(kernels),
        "copies_of_step": copied / window_ns,
        "copies_beside_kernels": beside / copied if copied else float("nan"),
        "detail": {"share of the window": detail, "longest gaps, ms": [round(gap / 1e6, 2) for gap in gaps]},
    }


def _union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joined spans, in order."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined


def beside(row: dict[str, Any], peer: dict[str, Any], name: str) -> dict[str, Any]:
    """`row` with its peer's seconds a step, and how many times faster it is."""
    if "step_s" not in row or "step_s" not in peer:
        return row
    return {**row, "peer": name, "x": peer["step_s"] / row["step_s"]}


def prepared(job: Job, size: str) -> tuple[Rows, Bench]:
    """Stores and settings, and a first short run that counts for nothing: kernels are loaded, memory is taken."""
    rows, benches = Rows(job), []

    def prepare() -> dict[str, Any]:
        benches.append(Bench(job, size))
        benches[0].run(1, 1)
        return {}

    rows.row("preparation", prepare, 0)
    if not benches:
        sys.exit(1)  # the row says why
    return rows, benches[0]


def main() -> None:
    """All rows of 7B, the most telling ones first."""
    job = Job.from_command_line()
    rows, bench = prepared(job, "7b")
    few = 2 if job.cpu else 4  # examples of a microbatch
    lora, saved = {"model__lora": LORA}, {"model__activation_checkpointing": True}
    plain = rows.row("stage 2, LoRA", lambda: bench.run(2, **lora), 12)
    fits, why = bench.fits()
    full = {**saved, "microbatch_size": few}
    rows.row("stage 2, full", lambda: bench.run(2, **full) if fits else {"skipped": why}, 20)
    bare = rows.row("stage 1, bare loop", lambda: bench.bare(1), 12)
    ours = rows.row("stage 1", lambda: beside(bench.run(1), bare, "bare loop"), 12)
    rows.row("stage 1, trace of 2 steps", lambda: bench.trace(1), 12)
    compiled = {"model__compile": ["connector"] if job.cpu else ["connector", "llm"]}
    rows.row("stage 1, compiled", lambda: beside(bench.run(1, **compiled), ours, "not compiled"), 45)
    rows.row("7B forward and backward, 16 x 256, by mask", bench.masks, 12)
    rows.row("stage 2, LoRA, checkpointing", lambda: beside(bench.run(2, **lora, **saved), plain, "without"), 12)
    all_tokens = {**lora, **saved, "microbatch_size": few, "model__connector": ALL_TOKENS}
    many = rows.row("stage 2, LoRA, 576 tokens", lambda: bench.run(2, **all_tokens), 12)
    fewer = {**lora, **saved, "microbatch_size": few}
    rows.row("stage 2, LoRA, 144 tokens", lambda: beside(bench.run(2, **fewer), many, "576 tokens"), 12)
    rows.row("stage 2, LoRA, trace of 2 steps", lambda: bench.trace(2, **lora), 12)


if __name__ == "__main__":
    main()
