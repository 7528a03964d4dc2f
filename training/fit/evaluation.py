"""The loss on held-out examples, every so many steps and at the end: is the run still learning, or learning by heart?

Composer has an evaluation loop. This is a callback instead, because that one

    draws its DataLoader's seed from the random states of training, and leaves a batch and outputs in Composer's state;
    runs when the step's line of metrics is written already, and cannot be left when a scheduler wants the node back;
    calls the model within DeepSpeed's engine, and not the engine.

What is measured is a sum over all supervised tokens of all examples, each counted once, divided by their number.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from composer.core import Callback, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from composer.utils.misc import model_eval_mode

from training.checkpoints.checkpoint import StopRequest, most
from training.checkpoints.history import History, Measured
from training.checkpoints.resume import together
from training.config import TrainConfig
from training.engines.base import Engine
from training.fit.callbacks import StepLog
from training.fit.composer_model import microbatches, token_counts
from training.fit.parts import Parts
from training.fit.quiz import Quiz
from training.fit.watch import Watch
from training.model.markers import IGNORE
from training.release.records import amend_log
from training.stream.batch import Batch
from training.stream.stream import Stream


@dataclass(frozen=True)
class Plan:
    """After which steps of a run it is measured: every `every` steps, and after the last."""

    every: int
    steps: int
    patience: int | None = None  # end after so many evaluations without a lower loss
    epoch: int = 0  # steps in one, at whose end own questions are asked; 0 if there are none

    @classmethod
    def of(cls, config: TrainConfig, parts: Parts, steps: int) -> Plan | None:
        """That of a run of so many steps; None if it holds nothing out."""
        settings = config.data.validation
        if settings is None:
            return None
        number, unit = int(settings.interval[:-2]), settings.interval[-2:]
        epoch = len(parts.stream)
        every = number * (epoch if unit == "ep" else 1)
        return cls(every, steps, settings.patience, 0 if settings.questions is None else epoch)

    def due(self, step: int) -> bool:
        """Whether it is measured after this step."""
        return step > 0 and (step % self.every == 0 or self.asks(step) or step == self.steps)

    def asks(self, step: int) -> bool:
        """Whether own questions are asked after this step: the last of an epoch, or of all."""
        return self.epoch > 0 and (step % self.epoch == 0 or step == self.steps)

    def left(self, step: int) -> int:
        """How many evaluations come after this step."""
        return sum(self.due(later) for later in range(step + 1, self.steps + 1))


class Evaluation(Callback):  # type: ignore[misc]
    """Measures the model as it is, without leaving a trace in training; ends a run that no longer improves.

    An evaluation is left when a scheduler wants the process to end: the checkpoint of the step is saved at once, and
    whoever goes on from it measures first. So the numbers of a run are those of one that nobody stopped.

    Args:
        parts: of this rank; their held-out examples come in the same order each time.
        plan: when they are looked at.
        engine: of the run.
        stop: whose wish ends an evaluation.
        watch: is told of every batch.
        log: takes the results into the step's line.

    Attributes:
        history: all evaluations of the run.
        quiz: own questions, if there are any.
    """

    def __init__(self, parts: Parts, plan: Plan, engine: Engine, stop: StopRequest, watch: Watch, log: StepLog) -> None:
        assert parts.held_out is not None
        self.stream = parts.held_out
        self.plan = plan
        self.engine = engine
        self.stop = stop
        self.watch = watch
        self.log = log
        self.history = History(identity(self.stream))
        self.quiz: Quiz | None = None
        self._image_token_id = parts.model.config.image_token_id
        self._filling = self.stream.filling()

    @property
    def over(self) -> bool:
        """Whether the run is to end before its last step, as its loss does not fall any more."""
        return self.history.over(self.plan.patience)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Measure what the process before was stopped in."""
        self.catch_up(state, logger)

    def catch_up(self, state: State, logger: Logger) -> None:
        """Measure after the step of the checkpoint that the run goes on from, if that was left. A collective."""
        step = state.timestamp.batch.value
        if not self.plan.due(step) or (self.history.measured and self.history.measured[-1].step == step):
            return
        # On a GPU, training finds its microbatches in its first step, which is still to come.
        found = self._evaluate(state, 1 if state.auto_microbatching else state.device_train_microbatch_size)
        if found is not None:
            together(dist.get_global_rank() == 0, lambda: amend_log(self.log.run, step, found))
            logger.log_metrics({f"step/{name}": value for name, value in found.items()})

    def batch_end(self, state: State, logger: Logger) -> None:
        """Measure, if it is time, before the step's line is written."""
        step = state.timestamp.batch.value
        if self.plan.due(step) and (found := self._evaluate(state, state.device_train_microbatch_size)) is not None:
            self.log.add(found, found["heldout_s"], self.plan.left(step) * found["heldout_s"])

    def _evaluate(self, state: State, size: int) -> dict[str, float] | None:
        """Measure after the present step, in microbatches of `size`, and note it.

        Returns: what a line of the log says of it; None if it was left.
        """
        start = time.perf_counter()
        with random_states_kept(), torch.no_grad(), model_eval_mode(state.model):
            sums = self._sums(state, size)
            more = {}
            if sums is not None and self.quiz is not None and self.plan.asks(state.timestamp.batch.value):
                right = self.quiz.right(state, size, self._go_on)
                sums, more = (None, {}) if right is None else (sums, {"questions_right": right})
        if sums is None:
            return None
        entropy, right, tokens = sums
        measured = Measured(state.timestamp.batch.value, entropy / tokens, right / tokens)
        self.history.measured.append(measured)
        if self.over and measured.step < self.plan.steps:
            state.stop_training()
            if dist.get_global_rank() == 0:
                print(
                    f"early     no lower held-out loss in {self.plan.patience} evaluations: step {measured.step} is "
                    "the last",
                    flush=True,
                )
        seconds = time.perf_counter() - start
        found = {"heldout_loss": measured.loss, "heldout_accuracy": measured.accuracy, "heldout_s": seconds}
        return found | more

    def _go_on(self) -> bool:
        """Give a sign of life, and hear whether any rank is to stop. A collective."""
        self.watch.evaluated += 1
        self.stop.agree(0)
        return not self.stop.agreed

    def _sums(self, state: State, size: int) -> list[float] | None:
        """Over the held-out examples of all ranks: the sum of cross-entropies, right tokens, supervised tokens."""
        model = self.engine.unwrapped(state)
        sums = torch.zeros(3, dtype=torch.float64, device=self.engine.device())
        with contextlib.closing(iter(self.stream)) as batches:
            for number, batch in enumerate(batches):
                if not self._go_on():
                    return None
                if number == len(self.stream) - 1:  # the rows that fill it up were counted before
                    batch["labels"][self._filling] = IGNORE
                # In parts of training's size and without unsupervised logits: training needs more memory.
                for part in microbatches(batch, size, self._image_token_id, torch.cuda.is_available()):
                    with get_precision_context(state.precision, state.precision_config):
                        outputs = model(Batch(state.device.batch_to_device(part)))
                    tokens = token_counts(part)["predicted"]
                    sums[0] += outputs.loss.double() * tokens
                    sums[1] += outputs.right
                    sums[2] += tokens
        dist.all_reduce(sums, reduce_operation="SUM")
        found: list[float] = sums.tolist()
        return found


def refuse_unlearnable(stream: Stream) -> None:
    """Read held-out examples until one has something to measure on: mostly the first batch does. A collective.

    Raises:
        ValueError: if none has. OSError: if they cannot be read.
    """
    with contextlib.closing(iter(stream)) as batches:
        for batch in batches:
            if most(int(any(skip is None for skip in batch["skipped"])))[0]:
                return
    raise ValueError(
        f"none of the {len(stream.examples)} held-out examples teaches anything, so there is nothing to measure on: "
        f"{batch['skipped'][0].reason}; hold out others (data.validation), or leave it out"
    )


def identity(stream: Stream) -> str:
    """What two streams have in common that read the same examples, whatever the place of their store."""
    found = hashlib.sha256(stream.fingerprint.encode())
    for numbers in (stream.examples.sample, stream.examples.conversation):
        found.update(numbers.tobytes())
    return found.hexdigest()


@contextmanager
def random_states_kept() -> Iterator[None]:
    """What is drawn within, from whichever generator, is as if it had not been."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
