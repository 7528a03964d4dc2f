"""What a run has measured on held-out examples: the losses so far, the best of them, whether they still improve.

It is kept in the folder of each checkpoint, a file beside the others: who goes on from it knows what is best.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from training.checkpoints.mark import folder_of

HISTORY = "heldout.json"  # in a checkpoint's folder


class Measured(NamedTuple):
    """An evaluation after a step: mean cross-entropy over all supervised tokens, and the share that was right."""

    step: int
    loss: float
    accuracy: float


class History:
    """The evaluations of a run, in the order of their steps.

    Args:
        examples: which they are measured on, as any text, as losses on others cannot be compared; by default those of
            a checkpoint that is taken up.
    """

    def __init__(self, examples: str = "") -> None:
        self.examples = examples
        self.measured: list[Measured] = []

    def take_up(self, checkpoint: Path) -> bool:
        """Go on from what a checkpoint's folder holds. False if that was measured on other examples, and left there.

        Raises:
            ValueError: if it is damaged.
        """
        path = checkpoint / HISTORY
        if not path.is_file():  # of a run that measured nothing up to here
            return True
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            measured = [Measured(int(step), float(loss), float(right)) for step, loss, right in found["measured"]]
            examples = str(found["examples"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged ({error!r}); remove {checkpoint}, then an older one is taken"
            ) from error
        if self.examples not in ("", examples):
            return False
        self.examples, self.measured = examples, measured
        return True

    def write(self, checkpoint: Path) -> None:
        """Write it into a checkpoint's folder, before that is marked as whole."""
        text = json.dumps({"examples": self.examples, "measured": self.measured})
        (checkpoint / HISTORY).write_text(text, encoding="utf-8")

    @property
    def bests(self) -> list[Measured]:
        """Each that was the best when it was measured, the best of all last. A loss that is no number is never one."""
        found: list[Measured] = []
        for each in self.measured:
            if math.isfinite(each.loss) and (not found or each.loss < found[-1].loss):
                found.append(each)
        return found

    @property
    def best(self) -> Measured | None:
        """The lowest loss, the earlier one of equals."""
        return self.bests[-1] if self.bests else None

    def over(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations brought no lower loss; never for None."""
        if patience is None:
            return False
        since = self.best.step if self.best is not None else -1
        return sum(each.step > since for each in self.measured) >= patience

    def kept(self, whole: Sequence[str]) -> set[str]:
        """Names of the checkpoints to keep for being the best.

        Args:
            whole: names of those that are whole. The best of before stays until the best of now is among them.
        """
        names = [folder_of(each.step) for each in self.bests]
        newest = next((number for number in reversed(range(len(names))) if names[number] in whole), 0)
        return set(names[newest:])
