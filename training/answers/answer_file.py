"""A file of answers: JSON lines, one model's, written by several processes, whole again after a crash.

gqa.jsonl              the answers; what one process writes goes here at once
gqa.jsonl.1-of-4       what the second of four processes writes, until the first one puts all together
gqa.jsonl.run.json     whose answers these are: a digest of the weights, and the longest answer
"""

from __future__ import annotations

import glob
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from pydantic import RootModel

from pipeline.config import differences
from training.answers.processes import AnsweringProcess
from training.benchmarks.questions import from_json
from training.benchmarks.scores import scores_beside
from training.release.records import read_as, write_whole

_NOTE = ".run.json"  # what the name of its note ends in
Key = tuple[str | int, str | None]  # a question's id and the name of its image: one image may be asked several times


class AnswerLine(TypedDict):
    """One line: the question's own line with what it holds beside these keys, the answer in the place of its text.

    Attributes:
        prompt: what was asked. text: the answer.
    """

    question_id: str | int
    image: str | None
    text: str
    prompt: NotRequired[str]


class AnswerFile:
    """The answers in `path`, and in the files that other processes write beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def claim(self, model: str, max_new_tokens: int) -> None:
        """Note whose answers the file holds.

        Raises:
            ValueError: if it holds another model's, or answers of another length, its scores would replace those of
                another file, or the note is damaged.
        """
        scores = scores_beside(self.path)
        for taken in self.path.parent.glob(f"*{_NOTE}"):
            other = taken.with_name(taken.name.removesuffix(_NOTE))
            if other != self.path and other.exists() and scores_beside(other) == scores:
                raise ValueError(
                    f"the scores of {self.path} would replace those of {other} in {scores.name}; name another file "
                    "with --out"
                )
        # By weights, not by name: a model may move, and another may take its place.
        mine = {"weights": weights_digest(model) or model, "max_new_tokens": max_new_tokens}
        note = self.path.with_name(self.path.name + _NOTE)
        if note.exists() and (self.path.exists() or self._parts()):
            theirs = read_as(RootModel[dict[str, Any]], note).root
            differing = differences(theirs, mine)
            if differing:
                raise ValueError(
                    f"{self.path} holds the answers of another run; name another file with --out, or delete it:\n  "
                    + "\n  ".join(differing)
                )
        write_whole(note, json.dumps(mine, indent=1))

    def answers(self) -> dict[Key, AnswerLine]:
        """Every answer so far, whichever process wrote it; of two to the same question the later one.

        Raises:
            ValueError: if a line is no answer, naming it.
        """
        files = [path for path in (self.path, *self._parts()) if path.exists()]
        return {(line["question_id"], line["image"]): line for path in files for line in answer_lines(path)}

    def part(self, process: AnsweringProcess) -> Path:
        """Where a process writes, without the half line that a crash left at its end."""
        name = self.path.name if process.world_size == 1 else f"{self.path.name}.{process.rank}-of-{process.world_size}"
        path = self.path.with_name(name)
        if path.exists():
            data = path.read_bytes()
            if data and not data.endswith(b"\n"):
                path.write_bytes(data[: data.rfind(b"\n") + 1])
        return path

    def gather(self) -> None:
        """Put the parts of all processes together in `path`, and remove them."""
        parts = self._parts()
        if parts:
            # A crash here loses nothing: the parts go when the whole file is in its place.
            fresh = self.path.with_name(f"{self.path.name}.fresh")
            fresh.write_text("".join(map(as_line, self.answers().values())), encoding="utf-8")
            fresh.replace(self.path)
            for part in parts:
                part.unlink()

    def _parts(self) -> list[Path]:
        """What several processes write beside the file, in the order of their names."""
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.*-of-*"))


def as_line(answer: AnswerLine) -> str:
    """An answer as it stands in the file."""
    return json.dumps(answer, ensure_ascii=False) + "\n"


def answer_lines(path: Path) -> Iterator[AnswerLine]:
    """Answers of one file; half a line at its end, left by a crash, is not one.

    Raises:
        ValueError: if a line is no answer, naming it. OSError: if the file cannot be read.
    """
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if last:
        print(f"note: {path} ends in half a line, which is no answer", file=sys.stderr)
    for number, text in enumerate(lines, 1):
        try:
            record = from_json(text)
            for key, kinds in (("question_id", str | int), ("image", str | None), ("text", str), ("prompt", str)):
                if not isinstance(record[key] if key != "prompt" else record.get(key, ""), kinds):
                    raise TypeError(f"{key} is {type(record[key]).__name__}")
            yield cast(AnswerLine, record)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number} is not an answer ({type(error).__name__}: {error}): {text[:60]!r}; delete that "
                "line, or the file"
            ) from error


def weights_digest(model: str) -> str | None:
    """A digest of a folder's weights, wherever it lies; None for a Hub id.

    Of each file it takes the name, the size, the first and the last MiB: reading whole weights takes minutes.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size}".encode() + file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()
