"""Files of predictions: JSON lines, JSON, or what the benchmark declares. Nothing is dropped silently."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.benchmarks.questions import Answer, Benchmark, Found, identifier
from training.benchmarks.report import Problem

NAMED = 5  # how many of each kind of problem are named


@dataclass
class Predictions:
    """Answers by question, in the file's order, and everything that is wrong with the file.

    Attributes:
        malformed: places that hold no prediction, with what is wrong.
        duplicates: questions answered again; the last answer counts, as in the official scripts.
        unknown: ids that no question of the benchmark has.
        missing: questions without an answer; they count as wrong.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    malformed: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def problems(self) -> dict[str, Problem]:
        """Counts and the first names of each kind, for the file of scores."""
        kinds = ("missing", "duplicates", "malformed", "unknown")
        return {kind: {"count": len(getattr(self, kind)), "first": getattr(self, kind)[:NAMED]} for kind in kinds}


def read_predictions(path: Path, benchmark: Benchmark) -> Predictions:
    """Read `path`: JSON lines, JSON, a file of the benchmark's kinds, or a folder of them.

    Raises:
        ValueError: if there is no such file, or nothing in it belongs to the benchmark.
    """
    if not path.exists():
        raise ValueError(f"predictions {path}: there is no such file or folder; name a file of answers")
    result = Predictions()
    found = list(_records(path, benchmark, result.malformed))
    benchmark.arrange([each.record for each in found if isinstance(each.record, Mapping)])
    for each in found:
        _take(each, benchmark, result)
    if not result.answers:
        example = benchmark.questions[0].id if benchmark.questions else "none"
        instead = "; ".join([*result.unknown[:2], *result.malformed[:2]]) or "nothing"
        raise ValueError(
            f"{path} holds no prediction for {benchmark.name} {benchmark.split}: found {instead}; name a file of its "
            f"answers, whose questions have ids such as {example!r}"
        )
    result.missing = [q.id for q in benchmark.questions if q.id not in result.answers]
    return result


def _take(found: Found, benchmark: Benchmark, result: Predictions) -> None:
    """Put one record where it belongs: to the answers, or to a kind of problem.

    `text` is what a model said; `prediction`, `answer` and `output` are post-processed already, as servers take them.
    """
    place, record = found
    if not isinstance(record, Mapping):
        result.malformed.append(f"{place}: {type(record).__name__}, an object was expected")
        return
    kind = next((key for key in ("text", "prediction", "answer", "output") if key in record), None)
    if kind == "text" and "answer" in record and "question_id" not in record:
        kind = "answer"
    if kind is None:
        result.malformed.append(
            f"{place}: no text, prediction or answer; it has {', '.join(map(str, record)) or 'nothing'}"
        )
        return
    value = record[kind]
    if value is None:
        value = ""  # an empty cell
    if not isinstance(value, str):
        if isinstance(value, bool | dict | list):
            result.malformed.append(f"{place}: {kind} is {type(value).__name__}, text was expected")
            return
        value = identifier(value)
    question = benchmark.identify(record, result.answers)
    if question is None:
        name = next(
            (record[key] for key in ("question_id", "questionId", "index", "image", "id") if key in record), None
        )
        result.unknown.append(f"{place}: {name!r}" if name is not None else f"{place}: no id")
        return
    if question not in benchmark.kept:
        return  # beyond --limit
    if question in result.answers:
        result.duplicates.append(question)
        del result.answers[question]  # so that the order is that of the answers that count
    result.answers[question] = Answer(value.strip() if kind == "text" else value, final=kind != "text")


def _records(path: Path, benchmark: Benchmark, malformed: list[str]) -> Iterator[Found]:
    """Every record of a file or folder."""
    if path.is_dir():
        for file in sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl", *benchmark.prediction_files)):
            yield from _records(file, benchmark, malformed)
    else:
        yield from benchmark.prediction_files.get(path.suffix, _json_records)(path, malformed)


def _json_records(path: Path, malformed: list[str]) -> Iterator[Found]:
    """The records of a list, of an object id -> answer, or of JSON lines, whichever the file is."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}; give JSON or JSON lines") from error
    try:
        whole = json.loads(text)
    except ValueError:  # not one JSON value: JSON lines, read below, where a bad line is named
        whole = None
    if isinstance(whole, list):
        for number, record in enumerate(whole, 1):
            yield Found(f"{path.name} entry {number}", record)
        return
    if isinstance(whole, dict) and not {"text", "prediction", "answer"} & whole.keys():
        yield from _by_id(path, whole)
        return
    row = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            malformed.append(f"{path.name}:{number}: not JSON: {line.strip()[:60]!r}")
        else:  # POPE's own answers have no ids: they are told by file and row
            told = {"file": path.name, "row": row, **record} if isinstance(record, dict) else record
            yield Found(f"{path.name}:{number}", told)
        row += 1


def _by_id(path: Path, whole: Mapping[str, Any]) -> Iterator[Found]:
    """Id -> answer; ScienceQA's results hold texts as `outputs`, or indices as `results`."""
    texts = whole.get("outputs")
    key, table = ("text", texts) if isinstance(texts, dict) else ("answer", whole.get("results", whole))
    for id, value in (table if isinstance(table, dict) else whole).items():
        yield Found(f"{path.name} entry {id}", {"question_id": id, key: value})
