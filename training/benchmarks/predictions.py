"""Files of predictions: LLaVA's JSON lines, or what the benchmark's server takes. Nothing is dropped silently."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.benchmarks.questions import Answer, Benchmark, identifier

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

    def problems(self) -> dict[str, Any]:
        """Counts and the first names of each kind, for the file of scores."""
        kinds = ("missing", "duplicates", "malformed", "unknown")
        return {kind: {"count": len(getattr(self, kind)), "first": getattr(self, kind)[:NAMED]} for kind in kinds}


def read_predictions(path: Path, benchmark: Benchmark) -> Predictions:
    """Read `path`: JSON lines, JSON, a spreadsheet, or a folder of them (MME: a folder of text files).

    Raises:
        ValueError: if there is no such file, or nothing in it belongs to the benchmark.
    """
    if not path.exists():
        raise ValueError(f"predictions {path}: there is no such file or folder")
    result = Predictions()
    records = list(_records(path, result.malformed))
    benchmark.arrange([record for _, record in records if isinstance(record, Mapping)])
    for place, record in records:
        _take(place, record, benchmark, result)
    if not result.answers:
        example = benchmark.questions[0].id if benchmark.questions else "none"
        found = "; ".join([*result.unknown[:2], *result.malformed[:2]]) or "nothing"
        raise ValueError(
            f"{path} holds no prediction for {benchmark.name} {benchmark.split}: found {found}; its questions have ids "
            f"such as {example!r}"
        )
    result.missing = [q.id for q in benchmark.questions if q.id not in result.answers]
    return result


def _take(place: str, record: Any, benchmark: Benchmark, result: Predictions) -> None:
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


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(str(key) for key in record if key not in ("file", "row")) or "nothing"


def _records(path: Path, malformed: list[str]) -> Iterator[tuple[str, Any]]:
    """Every record of a file or folder, with its place for a message."""
    if path.is_dir():
        for file in sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl", ".txt", ".xlsx")):
            yield from _records(file, malformed)
    elif path.suffix == ".xlsx":
        yield from _spreadsheet(path)
    elif path.suffix == ".txt":
        yield from _mme_lines(path, malformed)
    else:
        yield from _json_records(path, malformed)


def _json_records(path: Path, malformed: list[str]) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, list):
        for number, record in enumerate(whole, 1):
            yield f"{path.name} entry {number}", record
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
            yield (
                f"{path.name}:{number}",
                {"file": path.name, "row": row, **record} if isinstance(record, dict) else record,
            )
        row += 1


def _by_id(path: Path, whole: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Id -> answer; ScienceQA's results hold texts as `outputs`, or indices as `results`."""
    texts = whole.get("outputs")
    key, table = ("text", texts) if isinstance(texts, dict) else ("answer", whole.get("results", whole))
    for id, value in (table if isinstance(table, dict) else whole).items():
        yield f"{path.name} entry {id}", {"question_id": id, key: value}


def _mme_lines(path: Path, malformed: list[str]) -> Iterator[tuple[str, Any]]:
    """MME's results: <category>.txt with image, question, truth and answer, separated by tabs."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        fields = line.rstrip("\r\n").split("\t")
        if len(fields) != 4:
            malformed.append(
                f"{path.name}:{number}: {len(fields)} fields, image, question, truth and answer were expected"
            )
            continue
        image, question, _, answer = fields
        yield f"{path.name}:{number}", {"question_id": f"{path.stem}/{image}", "prompt": question, "answer": answer}


def _spreadsheet(path: Path) -> Iterator[tuple[str, Any]]:
    from openpyxl import load_workbook

    try:
        rows = load_workbook(path, read_only=True, data_only=True).active.iter_rows(values_only=True)
        names = [str(name) for name in next(rows)]
    except Exception as error:  # openpyxl raises whatever its zip and XML readers meet
        raise ValueError(f"{path} is not a spreadsheet: {error}") from error
    if "index" not in names or "prediction" not in names:
        raise ValueError(f"{path} has the columns {', '.join(names)}; index and prediction are needed")
    for number, values in enumerate(rows, 2):
        if any(value is not None for value in values):
            record = dict(zip(names, values, strict=False))
            yield f"{path.name} row {number}", {"index": record["index"], "prediction": record["prediction"]}
