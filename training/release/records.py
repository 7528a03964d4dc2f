"""The files in which a run speaks of itself: `config.json`, `log.jsonl` (a line per step), `summary.json`.

They are written whole or not at all. One that is damaged all the same is named, with what to do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.storage import Storage
from training.checkpoints.history import History
from training.config import TrainConfig

M = TypeVar("M", bound=BaseModel)

CONFIG, LOG, SUMMARY = "config.json", "log.jsonl", "summary.json"
SKIPPED = "skipped.jsonl"  # a line for each example that teaches nothing (fit/skipped)
LAST = 20  # steps that the final loss is a mean of: one batch says little
IN_EVERY_LINE = ("step", "loss", "step_s", "data_wait", "samples_per_s")  # numbers that readers of a log count on
HELD_OUT = ("heldout_loss", "heldout_accuracy")  # numbers in the line of a step after which it was evaluated

_CURE = {
    CONFIG: "put a copy of it back, or delete it and start the run's own command again, which writes it",
    SUMMARY: "delete it and start the run's own command again, which writes it",
}
_LOSS = {  # of a line
    LOG: "its step is then missing in tables and curves",
    SKIPPED: "its example is then not listed",
}


class HeldOut(BaseModel):
    """What a run came to on held-out examples: losses, and the share of their tokens that it got right."""

    first: float | None  # None for a loss that is no number
    best: float | None
    best_step: int | None
    last: float | None
    accuracy_last: float

    @classmethod
    def of(cls, history: History) -> HeldOut | None:
        """That of a run's evaluations; None if there were none."""
        if not history.measured:
            return None
        first, last, best = history.measured[0], history.measured[-1], history.best
        return cls(
            first=first.loss if math.isfinite(first.loss) else None,
            best=None if best is None else best.loss,
            best_step=None if best is None else best.step,
            last=last.loss if math.isfinite(last.loss) else None,
            accuracy_last=last.accuracy,
        )

    def course(self) -> str:
        """How the loss went, for a person."""
        first, last = ("no number" if loss is None else f"{loss:.4f}" for loss in (self.first, self.last))
        best = "" if self.best is None else f", best {self.best:.4f} after step {self.best_step}"
        return f"held-out loss {first} -> {last}{best}"


class StoreSeen(BaseModel):
    """What a run has learned from one of several stores."""

    store: str
    examples: int
    tokens: int | None  # supervised ones; None where lines of the log are lost


class Summary(BaseModel):
    """`summary.json`: what a stage has come to."""

    steps: int
    loss_first: float | None  # of step 1; None where its line is lost, as on the new disk of a lost node
    loss_last: float | None  # see `final_loss`
    seconds: float  # of all steps
    data_wait: float  # share of them that waited for data
    vision_tokens_in: int
    vision_tokens_out: int
    skipped: int | None = None  # examples that taught nothing; None in summaries of the time before they were counted
    heldout: HeldOut | None = None  # None without data.validation
    stores: list[StoreSeen] = []  # empty for a run with a single one

    def course(self) -> str:
        """How the loss went, for a person."""
        if self.loss_last is None:
            return f"loss not known, there is no {LOG}"
        first = "not known" if self.loss_first is None else f"{self.loss_first:.4f}"
        text = f"loss {first} -> {self.loss_last:.4f}"
        text += "" if self.heldout is None else f", {self.heldout.course()}"
        return text + (f", {self.skipped} examples skipped" if self.skipped else "")


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place, bring it to the disk, and rename it."""
    Storage(path.parent).replace(path.name, text.encode())


def read_as(kind: type[M], path: Path, also: Mapping[str, Any] | None = None) -> M:
    """What a JSON file of this project holds, `also` in place of what it says itself.

    Raises:
        ValueError: if it is damaged. OSError: if it cannot be read.
    """
    cure = _CURE.get(path.name, "delete it and run the same command again")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return kind.model_validate(tree | dict(also) if also and isinstance(tree, dict) else tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "(whole file)"
        found = f"{place}: {first['msg']} (found {str(first['input'])[:60]!r})"
        raise ValueError(f"{path} is damaged, or of another version of this program: {found}; {cure}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {cure}") from error


def read_config(run: Path) -> TrainConfig:
    """The settings of the run in a folder; `run` itself is where the folder lies now.

    Raises:
        ValueError: if there is no run, or its settings are damaged or of another version. OSError: if they cannot be
            read.
    """
    path = run / CONFIG
    if not path.is_file():
        raise ValueError(f"{run} is no training run: it has no {CONFIG}; name the folder given as run=...")
    return read_as(TrainConfig, path, {"run": str(run)})


def read_log(run: Path, name: str = LOG, step: int | None = None) -> list[dict[str, Any]]:
    """The lines of a run's `LOG` or `SKIPPED`, each with its step, in the order of steps; none if there is no file.

    With `step` those up to it.

    The last line, which a killed process may have left unfinished, is skipped if it is: its step is done again.

    Raises:
        ValueError: if a line before it is damaged. OSError: if the log cannot be read.
    """
    path = run / name
    numbers, texts = (IN_EVERY_LINE, ()) if name == LOG else (("step",), ("key", "reason"))
    if not path.is_file():
        return []
    lines = []
    found = path.read_bytes().split(b"\n")  # what stands behind the last line's end, mostly nothing, comes last
    for number, text in enumerate(found, start=1):
        try:
            line = json.loads(text)
            known = line if isinstance(line, dict) else {}
            # Of a log all values are numbers; those of an evaluation, which only some lines have, come together.
            wanted = [*numbers, *(known if name == LOG else ()), *(HELD_OUT if known.keys() & HELD_OUT else ())]
            lacking = [key for key in dict.fromkeys(wanted) if not isinstance(known.get(key), int | float)]
            if lacking:
                raise ValueError(f"{str(line)[:40]!r} has not the numbers {', '.join(lacking)}")
            if not all(isinstance(line.get(key), str) for key in texts):
                raise ValueError(f"{str(line)[:40]!r} has not the texts {', '.join(texts)}")
        except (ValueError, RecursionError) as error:
            if number == len(found):
                break
            raise ValueError(
                f"{path}:{number} is damaged ({error}); delete this line ({_LOSS[name]}) and run the same command again"
            ) from error
        lines.append(line)
    return [line for line in lines if step is None or line["step"] <= step]


def _text(lines: Sequence[Mapping[str, Any]]) -> str:
    """The text of a file with these lines."""
    return "".join(json.dumps(line) + "\n" for line in lines)


def cut_log(run: Path, name: str, step: int) -> list[dict[str, Any]]:
    """The lines of a run's `LOG` or `SKIPPED` up to a step; those of later steps, which are done again, are dropped.

    Raises:
        ValueError: as `read_log` does. OSError: if the file cannot be read or written.
    """
    kept = read_log(run, name, step)
    if (run / name).exists():
        write_whole(run / name, _text(kept))
    return kept


def records(run: Path, step: int | None = None) -> dict[str, str]:
    """The texts of what a run says of itself up to a step, None for all, by their names.

    Raises:
        ValueError: if a file is damaged. OSError: if one cannot be read.
    """
    found = {CONFIG: read_config(run).model_dump_json(indent=1)}
    for name in (LOG, SKIPPED):
        lines = read_log(run, name, step)
        found |= {name: _text(lines)} if lines else {}
    return found


def amend_log(run: Path, step: int, values: dict[str, float]) -> None:
    """Put `values` into the line of a step, if the log has it: on a new disk it may not.

    Raises:
        ValueError: as `read_log` does. OSError: if the file cannot be read or written.
    """
    lines = [line | (values if line["step"] == step else {}) for line in read_log(run)]
    if lines:
        write_whole(run / LOG, _text(lines))


def final_loss(lines: Sequence[dict[str, float]]) -> float:
    """Mean loss of the last steps, at most `LAST`.

    Raises:
        ValueError: if there are no lines.
    """
    if not lines:
        raise ValueError(f"a run without a step has no final loss; its {LOG} holds no line: let it train first")
    last: list[float] = [line["loss"] for line in lines[-LAST:]]
    return sum(last) / len(last)
