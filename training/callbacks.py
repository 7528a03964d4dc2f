"""What a run says while it runs: one line of metrics per step, on screen and in `log.jsonl`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.loggers.logger_destination import LoggerDestination
from composer.utils import dist

from training.stream import Stream


class StepLog(LoggerDestination):  # type: ignore[misc]
    """Writes one JSON object per optimizer step to `path` (rank 0) and prints it as one line.

    Keys: step, loss (mean over supervised tokens of the global batch), lr, grad_norm (L2, before any clipping),
    samples_per_s, tokens_per_s (all ranks), data_wait (share of the step this rank waited for data), step_s, eta_s,
    memory_gb (peak, GPU only).
    """

    def __init__(self, path: Path, stream: Stream, total_steps: int) -> None:
        self.path = path
        self.stream = stream
        self.total_steps = total_steps
        self._loss = float("nan")
        self._line: dict[str, float] = {}
        self._step_start = 0.0
        self._tokens = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drop the lines of steps that a resumed run is about to repeat."""
        done = state.timestamp.batch.value
        if dist.get_global_rank() == 0 and self.path.exists():
            lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines() if line]
            kept = [line for line in lines if line["step"] <= done]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._step_start = time.perf_counter()

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Keep the loss that Composer reports: it is already reduced over microbatches and ranks."""
        if "loss/train/total" in metrics:
            self._loss = float(metrics["loss/train/total"])

    def batch_start(self, state: State, logger: Logger) -> None:
        """Note the learning rate that this step will use, before the schedule moves on."""
        self._line = {"lr": state.schedulers[0].get_last_lr()[0]}
        self._tokens = state.timestamp.token.value

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Measure the gradient while it exists."""
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        self._line["grad_norm"] = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0

    def batch_end(self, state: State, logger: Logger) -> None:
        """Write the line of this step."""
        seconds = time.perf_counter() - self._step_start
        self._step_start = time.perf_counter()
        step = state.timestamp.batch.value
        samples = state.timestamp.sample_in_epoch.value and self.stream.global_batch_size
        line: dict[str, float] = {
            "step": step,
            "loss": self._loss,
            **self._line,
            "samples_per_s": samples / seconds,
            "tokens_per_s": (state.timestamp.token.value - self._tokens) / seconds,
            "data_wait": min(1.0, self.stream.data_wait / seconds),
            "step_s": seconds,
            "eta_s": (self.total_steps - step) * seconds,
        }
        if torch.cuda.is_available():
            line["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if dist.get_global_rank() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(_one_line(line, self.total_steps), flush=True)


def _one_line(line: dict[str, float], total: int) -> str:
    text = (
        f"step {line['step']:.0f}/{total}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  |g| {line['grad_norm']:.3f}  "
        f"{line['samples_per_s']:.1f} samples/s  {line['tokens_per_s']:.0f} tokens/s  "
        f"data wait {line['data_wait']:.1%}  ETA {line['eta_s']:.0f} s"
    )
    return text + (f"  {line['memory_gb']:.1f} GB" if "memory_gb" in line else "")


class StopOnNonFiniteLoss(Callback):  # type: ignore[misc]
    """Ends a run whose loss is NaN or infinite, naming the examples of the batch that caused it."""

    def after_loss(self, state: State, logger: Logger) -> None:
        """Check the microbatch's loss before it reaches the weights.

        Raises:
            FloatingPointError: with the keys (`<image>#<conversation>`) of the microbatch.
        """
        assert isinstance(state.loss, torch.Tensor)
        if not bool(torch.isfinite(state.loss)):
            raise FloatingPointError(
                f"loss is {state.loss.item()} at step {state.timestamp.batch.value}; "
                f"the microbatch held the examples {', '.join(state.batch['keys'])}. "
                "Lower optimizer.lr, or look at them."
            )
