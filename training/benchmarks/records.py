"""Records of files of predictions: JSON lines, JSON, tables of text, or what the benchmark declares."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.benchmarks.questions import REPLIES, Benchmark, Found, from_json, read_text

_TABLES = {".csv": ",", ".tsv": "\t"}


def records_of(path: Path, benchmark: Benchmark, malformed: list[str]) -> Iterator[Found]:
    """Every record of a file or a folder; what is no record is named in `malformed`.

    Raises:
        ValueError: if a file is neither text nor of the benchmark's kinds.
    """
    if path.is_dir():
        endings = (".json", ".jsonl", *_TABLES, *benchmark.prediction_files)
        for file in sorted(p for p in path.iterdir() if p.suffix in endings and p.is_file()):
            yield from records_of(file, benchmark, malformed)
    elif path.suffix in _TABLES and path.suffix not in benchmark.prediction_files:
        yield from _table_records(path)
    elif reader := benchmark.prediction_files.get(path.suffix):
        yield from reader(path, malformed)
    else:
        yield from _json_records(path, benchmark, malformed)


def _table_records(path: Path) -> Iterator[Found]:
    """The rows of a table whose first line names the columns; an empty cell is no value."""
    rows = csv.DictReader(read_text(path).splitlines(keepends=True), delimiter=_TABLES[path.suffix], strict=True)
    try:
        for number, row in enumerate(rows):
            record = {name: value or None for name, value in row.items() if name}
            yield _found(path, f"row {number + 2}", record, number)
    except csv.Error as error:
        raise ValueError(f"{path} is not a table: {error} after line {rows.line_num}; mend that line") from error


def _json_records(path: Path, benchmark: Benchmark, malformed: list[str]) -> Iterator[Found]:
    """The records of a list, of an object id -> answer, or of JSON lines, whichever the file is."""
    text = read_text(path)
    try:
        whole = from_json(text)
    except ValueError:  # not one JSON value: JSON lines, read below, where a bad line is named
        whole = None
    if isinstance(whole, list):
        for row, record in enumerate(whole):
            yield _found(path, f"entry {row + 1}", record, row)
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
            record = from_json(line)
        except ValueError as error:
            malformed.append(f"{path.name}:{number}: not JSON ({str(error)[:80]}): {line.strip()[:60]!r}")
        else:
            yield _found(path, f"line {number}", record, row)
        row += 1


def _found(path: Path, place: str, record: Any, row: int) -> Found:
    """A record with the name of its file and its row from 0: POPE's own answers have no ids and are told by them."""
    told = {**record, "file": path.name, "row": row} if isinstance(record, Mapping) else record
    return Found(f"{path.name} {place}" if not place.startswith("line ") else f"{path.name}:{place[5:]}", told)
