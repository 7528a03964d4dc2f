"""What a run says while it runs: one line of metrics per step, on screen and in `log.jsonl`; and what stops it."""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.loggers.logger_destination import LoggerDestination
from composer.utils import dist

from training.checkpoints.resume import together
from training.cost.mfu import peak_flops
from training.engines.base import Engine
from training.fit.composer_model import token_counts
from training.fit.mixture import LossByStore
from training.release.records import LOG, cut_log
from training.stream.stream import Stream


class StepLog(LoggerDestination):  # type: ignore[misc]
    """Writes one JSON object per optimizer step to the run's log (rank 0), prints it, sends it to other loggers.

    Keys: step, loss (mean over supervised tokens of the global batch), lr (of the first parameter group; lr_llm of the
    second), grad_norm (L2, before any clipping), samples_per_s, tokens_per_s (all ranks), data_wait (share of the step
    this rank waited for data), step_s, eta_s, memory_gb (peak; of the process where there is no GPU), mfu (of this
    rank; on a known GPU), padding (share of the positions of this rank's microbatches that hold no token). After an
    evaluation also heldout_loss and heldout_accuracy (over all supervised tokens of the held-out examples), and
    heldout_s, which is no part of the step's seconds; at an epoch's end questions_right, a share of the own questions.
    Of several stores also loss_store0, tokens_store0 (supervised ones), ..., of those with any in the global batch.

    Args:
        run: folder of the run.
        engine: has measured the gradient.
        flops: of a batch, by the lengths of its examples, its number of images and of supervised tokens.
        by_store: knows the loss of each of several stores.
    """

    def __init__(
        self,
        run: Path,
        stream: Stream,
        total_steps: int,
        engine: Engine,
        flops: Callable[[list[int], int, int], float],
        by_store: LossByStore,
    ) -> None:
        self.run = run
        self.stream = stream
        self.total_steps = total_steps
        self.engine = engine
        self.flops = flops
        self.by_store = by_store
        self.peak = peak_flops()
        self._line: dict[str, float] = {}
        self._step_start = 0.0
        self._tokens = 0
        self._work = 0.0
        self._positions, self._used = 0, 0
        self._more: dict[str, float] = {}
        self._aside_s = self._aside_ahead_s = 0.0

    def add(self, values: dict[str, float], seconds: float, ahead_s: float) -> None:
        """Put more into the line of the step that ends: what was measured aside from it.

        Args:
            values: of the line. seconds: that it took. ahead_s: what the same is about to take until the run's end.
        """
        self._more, self._aside_s, self._aside_ahead_s = values, seconds, ahead_s

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drop the lines of steps that a resumed run is about to repeat."""
        done = state.timestamp.batch.value

        def cut() -> None:  # its lines stay here: the other ranks need none of them
            cut_log(self.run, LOG, done)

        together(dist.get_global_rank() == 0, cut)
        if dist.get_global_rank() == 0 and done:
            # What was caught up with may have ended the run.
            ended = state.max_duration is not None and state.timestamp >= state.max_duration
            following = "" if ended else f"; step {done + 1} is next"
            print(f"resumed   from the checkpoint of step {done}{following}", flush=True)
        self._step_start = time.perf_counter()

    def batch_start(self, state: State, logger: Logger) -> None:
        """Note the learning rates that this step will use, before the schedule moves on."""
        rates = [group["lr"] for group in state.optimizers[0].param_groups]
        self._line = {"lr": rates[0]} | ({"lr_llm": rates[1]} if len(rates) > 1 and rates[1] != rates[0] else {})
        self._tokens = state.timestamp.token.value
        if self.peak is not None:
            counts = token_counts(state.batch)
            self._work = self.flops(counts["lengths"], len(state.batch["image_rows"]), counts["predicted"])

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Count anew: the step's microbatches begin, or, if memory did not suffice, begin again."""
        self._positions, self._used = 0, 0

    def before_forward(self, state: State, logger: Logger) -> None:
        """Count the positions of a microbatch, and the tokens among them."""
        self._positions += state.batch["input_ids"].numel()
        self._used += sum(token_counts(state.batch)["lengths"])

    def batch_end(self, state: State, logger: Logger) -> None:
        """Write the line of this step."""
        seconds = time.perf_counter() - self._step_start - self._aside_s
        self._step_start = time.perf_counter()
        step = state.timestamp.batch.value
        line: dict[str, float] = {
            "step": step,
            "loss": state.total_loss_dict["loss/train/total"],
            **self._line,
            "grad_norm": self.engine.gradient_norm(state),
            "samples_per_s": self.stream.global_batch_size / seconds,
            "tokens_per_s": (state.timestamp.token.value - self._tokens) / seconds,
            "data_wait": min(1.0, self.stream.data_wait / seconds),
            "step_s": seconds,
            "eta_s": (self.total_steps - step) * seconds + self._aside_ahead_s,
            "memory_gb": _peak_memory() / 1e9,
            "padding": 1 - self._used / self._positions,
        }
        if self.peak is not None:
            line["mfu"] = self._work / seconds / self.peak
        line |= self.by_store.line | self._more
        self._more, self._aside_s = {}, 0.0
        logger.log_metrics({f"step/{name}": value for name, value in line.items() if name != "step"})
        if dist.get_global_rank() == 0:
            with (self.run / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(_one_line(line, self.total_steps), flush=True)


def _peak_memory() -> int:
    """Bytes: of the GPU since the run began, else of the process (Linux counts in KiB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _one_line(line: dict[str, float], total: int) -> str:
    """A step's line for the screen."""
    text = (
        f"step {line['step']:.0f}/{total}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  |g| {line['grad_norm']:.3f}  "
        f"{line['samples_per_s']:.1f} samples/s  {line['tokens_per_s']:.0f} tokens/s  "
        f"data wait {line['data_wait']:.1%}  padding {line['padding']:.1%}  {line['memory_gb']:.1f} GB"
    )
    text += f"  MFU {line['mfu']:.1%}" if "mfu" in line else ""
    if "heldout_loss" in line:
        text += f"  held-out loss {line['heldout_loss']:.4f} ({line['heldout_accuracy']:.1%} of its tokens right)"
    if "questions_right" in line:
        text += f"  own questions {line['questions_right']:.1%} right"
    return f"{text}  ETA {line['eta_s']:.0f} s"


def boards(names: tuple[str, ...], run: Path, project: str) -> list[LoggerDestination]:
    """Composer's loggers of these names; addresses and keys come from the environment.

    Raises:
        ValueError: if the package of one is not installed.
    """
    made: list[LoggerDestination] = []
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"boards: {name} is not installed; pip install 'compact-vision-tokens[{name}]'")
        if name == "tensorboard":
            from composer.loggers import TensorboardLogger

            made.append(TensorboardLogger(log_dir=str(run / "tensorboard"), flush_interval=10))
        elif name == "wandb":
            from composer.loggers import WandBLogger

            made.append(WandBLogger(project=project, name=run.name, init_kwargs={"dir": str(run)}))
        else:
            from composer.loggers import MLFlowLogger

            made.append(MLFlowLogger(experiment_name=project, run_name=run.name, log_system_metrics=False))
    return made


class StopOnBadLoss(Callback):  # type: ignore[misc]
    """Ends a run whose loss is NaN or infinite, or jumps, naming the examples of the batch that caused it.

    Args:
        spike: a step's loss may be at most this many times the median of the last 100; None for any.
        engine: measures the gradient and clips it on this occasion.
        by_store: has more to be read from the device on this occasion.
    """

    def __init__(self, spike: float | None, engine: Engine, by_store: LossByStore) -> None:
        self.spike = spike
        self.engine = engine
        self.by_store = by_store
        self._recent: deque[float] = deque(maxlen=100)
        self._losses: list[torch.Tensor] = []  # (), of the step's microbatches, where they were computed
        self._keys: list[list[str]] = []  # of their examples
        self._batch: list[str] = []  # keys of this rank's part of the step's batch

    def batch_start(self, state: State, logger: Logger) -> None:
        """Note the examples: where memory did not suffice, Composer keeps but a microbatch of the step's batch."""
        self._batch = state.batch["keys"]

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """A step begins, or, if memory did not suffice, begins again."""
        self._losses, self._keys = [], []

    def after_loss(self, state: State, logger: Logger) -> None:
        """Keep the microbatch's loss: reading it here would wait for the device."""
        assert isinstance(state.loss, torch.Tensor)
        self._losses.append(state.loss.detach())
        self._keys.append(state.batch["keys"])

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Clip the gradient, and check the losses before it reaches the weights.

        Raises:
            FloatingPointError: with the keys (`<image>#<conversation>`) of the first microbatch that has such a loss.
        """
        self.engine.clip_gradients(state)
        read = self.engine.read([*self._losses, *self.by_store.sums])
        self.by_store.take(read[len(self._losses) :])
        for loss, keys in zip(read[: len(self._losses)], self._keys, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"loss is {loss} at step {state.timestamp.batch.value}; "
                    f"the microbatch held the examples {', '.join(keys)}. "
                    "Lower optimizer.lr, or look at them."
                )

    def batch_end(self, state: State, logger: Logger) -> None:
        """Check the step's loss, before a checkpoint of the weights that made it, or that it made, is written.

        Raises:
            FloatingPointError: with the keys of the whole global batch.
        """
        loss = state.total_loss_dict["loss/train/total"]
        # A median does not follow a single jump. The first ten steps, where losses fall steeply, have no bound.
        usual = statistics.median(self._recent) if len(self._recent) >= 10 else float("inf")
        self._recent.append(loss)
        if self.spike is not None and loss > self.spike * usual:
            keys: list[Any] = [key for part in dist.all_gather_object(self._batch) for key in part]
            raise FloatingPointError(
                f"loss {loss:.4g} at step {state.timestamp.batch.value} is more than {self.spike:g} times the usual "
                f"{usual:.4g}; the batch held the examples {', '.join(keys)}. The last checkpoint is from before it: "
                "look at them, lower optimizer.lr, or raise stop_on_spike, in another run"
            )
