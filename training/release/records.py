"""What a run has left in files: one line per step in `log.jsonl`, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

LAST = 20  # steps that the final loss is a mean of: one batch says little


def read_log(run: Path) -> list[dict[str, float]]:
    """The lines of `log.jsonl` in the folder of a run, one per step; one that a killed process left half is skipped."""
    *lines, _half = (run / "log.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def final_loss(lines: Sequence[Mapping[str, float]]) -> float:
    """The mean loss of the last steps, `LAST` of them where there are as many."""
    losses = [line["loss"] for line in lines[-LAST:]]
    return sum(losses) / len(losses)
