"""Files of predictions, judged record by record against the questions. Nothing is dropped silently."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.regular import check_regular
from training.benchmarks.questions import REPLIES, SAID, Answer, Benchmark, Found, Question, Row, identifier
from training.benchmarks.records import records_of
from training.benchmarks.report import Problem

NAMED = 5  # how many of each kind of problem are named
_IDS = ("question_id", "questionId", "index", "id", "image", "file", "row", "category", "prompt", "question")
_TOLD = ("file", "row")  # what the reader adds to a record
_TELLING = 12  # characters: a shorter line of a question occurs in other questions too


@dataclass
class Predictions:
    """Answers by question, in the file's order, and everything that is wrong with the file.

    Attributes:
        rows: every reply as it stands in the file, also those that are no question's.
        malformed: places that hold no prediction, with what is wrong.
        duplicates: questions answered again; the last answer counts (the official scripts of POPE and TextVQA count
            each of them).
        unknown: ids that no question of the benchmark has.
        missing: questions without an answer; they count as wrong.
        differing: places whose prompt or image is not that of the question with their id.
        notes: what a person should know beside.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problems(self) -> dict[str, Problem]:
        """Counts and the first names of each kind, for the file of scores."""
        kinds = ("missing", "duplicates", "malformed", "unknown")
        return {kind: {"count": len(getattr(self, kind)), "first": getattr(self, kind)[:NAMED]} for kind in kinds}


def read_predictions(path: Path, benchmark: Benchmark) -> Predictions:
    """Read `path`: JSON lines, JSON, a table, a file of the benchmark's kinds, or a folder of them.

    Raises:
        ValueError: if there is no such file, nothing in it belongs to the benchmark, or most of it to another.
    """
    if not path.exists():
        raise ValueError(f"predictions {path}: there is no such file or folder; name a file of answers")
    check_regular(path)
    result = Predictions()
    found = list(records_of(path, benchmark, result.malformed))
    benchmark.arrange([each.record for each in found if isinstance(each.record, Mapping) and not _odd(each.record)])
    asked = _Asked(benchmark.questions)
    compared = sum(_take(each, benchmark, asked, result) for each in found)
    _refuse_others(path, benchmark, compared, result)
    result.missing = [q.id for q in benchmark.questions if q.id not in result.answers]
    if result.differing:
        result.notes.append(
            f"{len(result.differing)} of {compared} answers name another prompt or image than the question of their "
            f"id: first {'; '.join(result.differing[:NAMED])}"
        )
    result.notes += benchmark.remarks(len(result.missing), len(result.unknown))
    return result


def _refuse_others(path: Path, benchmark: Benchmark, compared: int, result: Predictions) -> None:
    """ValueError if nothing, or less than half, of a file is about the benchmark's questions."""
    what = f"{benchmark.name} {benchmark.split}"
    hint = f"; {benchmark.hint}" if benchmark.hint else ""
    if not result.answers:
        example = benchmark.questions[0].id if benchmark.questions else "none"
        instead = "; ".join([*result.unknown[:2], *result.malformed[:2]]) or "nothing"
        raise ValueError(
            f"{path} holds no prediction for {what}: found {instead}; name a file of its answers, whose questions have "
            f"ids such as {example!r}{hint}"
        )
    known = len(result.rows) - len(result.unknown)
    if 2 * known < len(result.rows):
        raise ValueError(
            f"{path}: only {known} of {len(result.rows)} answers are to questions of {what}, first others "
            f"{'; '.join(result.unknown[:2])}; name the answers to this benchmark, split and version{hint}"
        )
    if 2 * len(result.differing) > compared:
        raise ValueError(
            f"{path}: {len(result.differing)} of {compared} answers name another prompt or image than the question of "
            f"{what} with their id, first {'; '.join(result.differing[:2])}; name the answers to this benchmark and "
            "split"
        )


def _odd(record: Mapping[str, Any]) -> str | None:
    """The first key that should tell a question and holds a list or an object."""
    return next((key for key in _IDS if isinstance(record.get(key), list | dict)), None)


def _take(found: Found, benchmark: Benchmark, asked: _Asked, result: Predictions) -> bool:
    """Put one record to the answers, or to a kind of problem; whether its prompt or image could be compared."""
    place, record = found
    if not isinstance(record, Mapping):
        result.malformed.append(f"{place}: {type(record).__name__}, an object was expected")
        return False
    if key := _odd(record):
        result.malformed.append(f"{place}: {key} is {type(record[key]).__name__}, text or a number was expected")
        return False
    id = benchmark.identify(record, result.answers)
    try:
        answer = _reply(record, benchmark, asked.questions.get(id or ""))
    except ValueError as error:
        result.malformed.append(f"{place}: {error}")
        return False
    result.rows.append(Row(record, id, answer))
    if id is None:
        name = next((record[key] for key in _IDS[:5] if key in record), None)
        result.unknown.append(f"{place}: {str(name)[:80]!r}" if name is not None else f"{place}: no id")
        return False
    if id not in benchmark.kept:
        return False  # beyond --limit
    agrees = asked.agrees(id, record)
    if agrees is False:
        named = next(record[key] for key in ("prompt", "question", "image") if key in record)
        result.differing.append(f"{place}: {str(named)[:60]!r}")
    if id in result.answers:
        result.duplicates.append(id)
        del result.answers[id]  # so that the order is that of the answers that count
    result.answers[id] = answer
    return agrees is not None


def _reply(record: Mapping[str, Any], benchmark: Benchmark, question: Question | None) -> Answer:
    """What a record says in reply to its question.

    Raises:
        ValueError: if it is not to be told, or no text, with what was found.
    """
    keys = [key for key in REPLIES[:-1] if key in record]
    if "text" in keys and "prompt" in record:
        keys = ["text"]  # LLaVA's line: whatever else it holds came with its question
    elif "text" in keys and question is not None and plain(record["text"]) in (plain(question.text), _first(question)):
        keys.remove("text")  # a question, its reply is under another key
        if not keys and question.origin is not None:
            raise ValueError("text is the question, and there is no reply")
    if len({str(record[key]).strip() for key in keys}) > 1:
        raise ValueError(f"{' and '.join(keys)} differ, which one is the reply? Keep one")
    kind = keys[0] if keys else "answer"
    if kind not in record:
        others = ", ".join(repr(key) for key in record if key not in _TOLD) or "nothing"
        raise ValueError(f"no reply, which is one of {', '.join(REPLIES)}; it has {others[:200]}")
    value = record[kind]
    if isinstance(value, int | float) and not isinstance(value, bool) and benchmark.numbers and math.isfinite(value):
        value = identifier(value)
    if not isinstance(value, str):
        shown = "null" if value is None else f"{type(value).__name__} {str(value)[:60]}"
        raise ValueError(f"{kind} is {shown}, text was expected")
    value = value.encode(errors="replace").decode()  # half a surrogate pair is no text that can be written
    return Answer(value.strip() if kind in SAID else value, final=kind not in SAID)


class _Asked:
    """What a prompt must hold to be that of a question: the lines that not every question of the benchmark has."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = {q.id: q for q in questions}
        self._lines = {q.id: [plain(line) for line in q.text.split("\n") if line.strip()] for q in questions}
        self._shared = set[str]().union(*self._lines.values()).intersection(*self._lines.values())

    def agrees(self, id: str, record: Mapping[str, Any]) -> bool | None:
        """Whether a record's prompt and image are the question's; None where nothing can be compared."""
        found = [self._prompt_agrees(id, record.get("prompt", record.get("question")))]
        image, mine = record.get("image"), self.questions[id].image
        # A table's images have no names, and some files name images by number.
        if isinstance(image, str) and mine is not None and Path(mine).suffix and Path(image).suffix:
            found.append(Path(image).stem == Path(mine).stem)
        compared = [each for each in found if each is not None]
        return all(compared) if compared else None

    def _prompt_agrees(self, id: str, prompt: Any) -> bool | None:
        """Templates differ, so one telling line of the question in the prompt is enough, or the reverse."""
        own = [line for line in self._lines[id] if line not in self._shared]
        text = plain(prompt) if isinstance(prompt, str) else ""
        if not own or not text:
            return None
        longest = max(own, key=len)
        telling = [line for line in own if line is longest or len(line) >= _TELLING]
        return any(line in text for line in telling) or any(text in line for line in self._lines[id])


def plain(text: Any) -> str:
    """A prompt without its placeholder, in lower case and with single spaces, whether or not `\\n` was left in it."""
    return " ".join(str(text).replace("\\n", " ").replace("<image>", " ").lower().split())


def _first(question: Question) -> str:
    """The question without what the benchmark adds to it, if it stands in the first line."""
    return plain(question.text.split("\n")[0])
