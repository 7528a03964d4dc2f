"""Records of files of predictions: JSON lines, JSON, tables of text, or what the benchmark declares."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.benchmarks.questions import REPLIES, Benchmark, Found, from_json, given_twice, read_text

_TABLES = {".csv": ",", ".tsv": "\t"}


def records_of(path: Path, benchmark: Benchmark, malformed: list[str]) -> Iterator[Found]:
    """Every record of a file or a folder; what is no record is named in `malformed`.

    Raises:
        ValueError: if a file is neither text nor of the benchmark's kinds.
    """
    if path.is_dir():
        endings = (".json", ".jsonl", *_TABLES, *benchmark.prediction_files)
        for file in sorted(p for p in path.iterdir() if p.suffix.lower() in endings and p.is_file()):
            yield from records_of(file, benchmark, malformed)
    elif reader := benchmark.prediction_files.get(path.suffix.lower()):
        yield from reader(path, malformed)
    elif path.suffix.lower() in _TABLES:
        yield from _table_records(path, malformed)
    else:
        yield from _json_records(path, benchmark, malformed)


def _table_records(path: Path, malformed: list[str]) -> Iterator[Found]:
    """The rows of a table whose first line names the columns; an empty cell is no value.

    Raises:
        ValueError: if it is no table, or a column is there twice.
    """
    text = io.StringIO(read_text(path), newline="")  # a cell may hold what else ends lines
    rows = csv.DictReader(text, delimiter=_TABLES[path.suffix.lower()], strict=True)
    try:
        twice = [name for name, times in Counter(rows.fieldnames or ()).items() if name and times > 1]
        if twice:
            raise ValueError(f"{path} has the column {twice[0]} twice; keep one")
        for number, row in enumerate(rows):
            record = {name: value or None for name, value in row.items() if name}
            beyond = [cell for cell in row.get(None) or () if cell]  # csv's key of cells without a column
            if beyond:
                malformed.append(f"{path.name} row {number + 2}: a cell without a column, {beyond[0][:60]!r}")
            else:
                yield from _found(path, f" row {number + 2}", record, number, malformed)
    except csv.Error as error:
        raise ValueError(f"{path} is not a table: {error} after line {rows.line_num}; mend that line") from error


def _json_records(path: Path, benchmark: Benchmark, malformed: list[str]) -> Iterator[Found]:
    """The records of a list, of an object id -> answer, or of JSON lines, whichever the file is."""
    text = read_text(path)
    try:
        whole = from_json(text, _once)
    except ValueError:  # not one JSON value: JSON lines, read below, where a bad line is named
        whole = None
    if isinstance(whole, _Twice):
        raise ValueError(f"{path}: {whole}")
    if isinstance(whole, list):
        for row, record in enumerate(whole):
            yield from _found(path, f" entry {row + 1}", record, row, malformed)
        return
    if isinstance(whole, dict) and not {*REPLIES, "question_id"} & whole.keys():
        key, table = benchmark.table_of(whole)
        for id, value in table.items():
            yield Found(f"{path.name} entry {id!r}", {"question_id": id, key: value})
        return
    row = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = from_json(line, _once)
        except ValueError as error:
            malformed.append(f"{path.name}:{number}: not JSON ({str(error)[:80]}): {line.strip()[:60]!r}")
        else:
            yield from _found(path, f":{number}", record, row, malformed)
        row += 1


class _Twice:
    """Stands for a JSON object with a key that is there twice, of which one would be dropped. No text: no answer."""

    def __init__(self, wrong: str) -> None:
        self.wrong = wrong

    def __str__(self) -> str:
        return self.wrong


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Twice:
    """A JSON object, if each of its keys is there once."""
    wrong = given_twice(pairs)
    return dict(pairs) if wrong is None else _Twice(wrong)


def _found(path: Path, place: str, record: Any, row: int, malformed: list[str]) -> Iterator[Found]:
    """A record with the name of its file and its row from 0: POPE's own answers have no ids and are told by them."""
    if isinstance(record, _Twice):
        malformed.append(f"{path.name}{place}: {record}")
    else:
        told = {**record, "file": path.name, "row": row} if isinstance(record, Mapping) else record
        yield Found(f"{path.name}{place}", told)
