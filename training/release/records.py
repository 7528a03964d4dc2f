"""What a run has written of itself, read: `log.jsonl`, one line per step, and the loss that it came to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
LAST = 20  # steps that the final loss is a mean of: one batch says little


def read_log(run: Path, name: str = LOG) -> list[dict[str, Any]]:
    """The lines of a run's log `name`, in the order of steps; none if the run has not begun.

    A line that a killed process left unfinished is skipped.
    """
    path = run / name
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # half a line: its step is done again, and written anew
            continue
    return lines


def final_loss(lines: Sequence[dict[str, float]]) -> float:
    """Mean loss of the last steps, at most `LAST`.

    Raises:
        ValueError: if there are no lines.
    """
    if not lines:
        raise ValueError(f"a run without a step has no final loss; its {LOG} holds no line: let it train first")
    last = [line["loss"] for line in lines[-LAST:]]
    return sum(last) / len(last)
