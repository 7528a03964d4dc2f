"""Examples that teach nothing: a run goes on without them, says which they are, and ends if they are too many."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from training.checkpoints.checkpoint import StopRequest
from training.checkpoints.resume import together
from training.release.records import SKIPPED, cut_log
from training.stream.stream import Stream
from training.text.collate import Skip

ALLOWED = 10  # at any rate: one bad record of twenty must not stop a trial run
SHOWN = 5  # on screen; the file has all


class SkippedExamples(Callback):  # type: ignore[misc]
    """Lists each example that teaches nothing once in the run's `skipped.jsonl`: key, image, id, reason, step.

    Args:
        run: folder of the run.
        steps: of the whole run.
        max_skipped: share of the examples that the run sees which may be skipped.
        stop: the occasion on which ranks hear of each other after each step.
    """

    def __init__(self, run: Path, stream: Stream, steps: int, max_skipped: float, stop: StopRequest) -> None:
        self.run = run
        self.stop = stop
        self.batch_size = stream.global_batch_size
        self.examples = min(steps * self.batch_size, len(stream.examples))  # different ones that the run sees
        self.max_skipped = max_skipped
        self._reasons: dict[str, str] = {}  # of each key that is listed; equal on all ranks
        self._mine: list[Skip] = []  # of this rank's part of the step's batch

    def fit_start(self, state: State, logger: Logger) -> None:
        """Take up the list of a resumed run, without the steps that it is about to repeat."""
        done = state.timestamp.batch.value
        (lines,) = together(dist.get_global_rank() == 0, lambda: cut_log(self.run, SKIPPED, done))
        self._reasons = {line["key"]: line["reason"] for line in lines}

    def batch_start(self, state: State, logger: Logger) -> None:
        """Note this rank's: where memory did not suffice for a step, Composer keeps but a microbatch of its batch."""
        self._mine = [skip for skip in state.batch["skipped"] if skip is not None]

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """List what is new in the global batch of the step that has ended, before a checkpoint of it is saved.

        Raises:
            SystemExit: with a message on every rank, if too many are skipped.
        """
        if not self.stop.agree(len(self._mine)):  # as in nearly every step
            return
        step = state.timestamp.batch.value
        everyone = [skip for part in dist.all_gather_object(self._mine) for skip in part]
        new = {skip.key: skip for skip in everyone if skip.key not in self._reasons}
        if dist.get_global_rank() == 0:
            self._write(list(new.values()), step)
        self._reasons |= {key: skip.reason for key, skip in new.items()}
        seen = min(step * self.batch_size, self.examples)
        if too_many(len(self._reasons), seen, self.examples, self.max_skipped):
            sys.exit(
                f"error: {len(self._reasons)} of the first {seen} examples teach nothing, more than data.max_skipped "
                f"{self.max_skipped:g} of {self.examples} allows:\n{by_kind(self._reasons.values())}\n"
                f"They are listed in {self.run / SKIPPED}; mend them in the data, or raise data.max_skipped"
            )

    def fit_end(self, state: State, logger: Logger) -> None:
        """Say how many there were."""
        if self._reasons and dist.get_global_rank() == 0:
            print(
                f"skipped   {len(self._reasons)} of {self.examples} examples, listed in {self.run / SKIPPED}",
                flush=True,
            )

    def _write(self, new: list[Skip], step: int) -> None:
        """Add lines to the file, and the first few to the screen."""
        with (self.run / SKIPPED).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**asdict(skip), "step": step}) + "\n" for skip in new)
        for skip in new[: max(0, SHOWN - len(self._reasons))]:
            of = "" if skip.image is None else f" of {skip.image!r:.80}"
            print(f"skipped   {skip.key} (record {skip.id!r:.80}{of}): {skip.reason}", flush=True)
        if len(self._reasons) <= SHOWN < len(self._reasons) + len(new):
            print(f"skipped   more are listed in {self.run / SKIPPED}", flush=True)


def too_many(skipped: int, seen: int, examples: int, rate: float) -> bool:
    """Whether a run should end: more than `rate` of all its examples are skipped, or all that it has seen so far."""
    nothing_else = skipped == seen >= min(ALLOWED + 1, examples)
    return nothing_else or skipped > max(ALLOWED, rate * examples)


def by_kind(reasons: Iterable[str]) -> str:
    """How many examples have each kind of reason, the commonest first, one a line with the first reason whole."""
    kinds: dict[str, list[str]] = {}
    for reason in reasons:
        kinds.setdefault(reason.partition(":")[0], []).append(reason)
    return "\n".join(f"  {len(group)} x {group[0]}" for group in sorted(kinds.values(), key=len, reverse=True))
