"""Benchmarks with lettered options: ScienceQA, MMBench and MMBench-CN."""

from __future__ import annotations

import base64
import csv
import io
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pipeline.regular import check_regular
from training.benchmarks.metrics import Scored, option_letter, science_qa_choice
from training.benchmarks.questions import Answer, Answers, Benchmark, Found, Question, identifier, read_json

LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHI"
# What pandas, with which LLaVA reads the tables, takes for nothing; options end at the first of them.
_NOTHING = {"", "#N/A", "#NA", "-NaN", "-nan", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "none", "n/a", "nan", "null"}
_CIRCLE = 1_000_000  # rows of one question, its options rotated, have the same index modulo this
_REFERENCE = 64  # an image field no longer than this is the index of the row that has the image


class ScienceQA(Benchmark):
    """ScienceQA: accuracy on the questions with an image (IMG, which the paper reports) and on all."""

    name = "scienceqa"
    files = "problems.json, pid_splits.json; images/test/"
    folders = ("scienceqa", "ScienceQA")
    splits = ("test", "val", "minival", "train")
    max_new_tokens = 1024
    numbers = True  # indices, in ScienceQA's own results

    def read(self) -> list[Question]:
        """`problems.json`, `pid_splits.json` and `images/<split>/<id>/image.png`."""
        origin = "https://github.com/lupantech/ScienceQA, data/scienceqa"
        problems = self.find(origin, "problems.json")
        splits = self.find(origin, "pid_splits.json")
        self.check()
        known = read_json(problems)
        self.image_folder = self.folder / "images" / ("val" if self.split == "minival" else self.split)
        return [_science_question(str(id), known[id]) for id in read_json(splits)[self.split]]

    def score(self, answers: Answers) -> dict[str, Scored]:
        """Accuracy on IMG and on all."""
        right = {}
        for q in self.questions:
            index, count = q.truth
            answer = answers.get(q.id)
            right[q.id] = float(answer is not None and _choice(answer, count) == index)
        seen = {q.id: ("", right[q.id]) for q in self.questions if q.image is not None}
        return {
            "img": Scored("accuracy on the questions with an image", seen),
            "all": Scored("accuracy on all questions", {id: ("", hit) for id, hit in right.items()}),
        }

    def table_of(self, whole: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        """Results hold texts as `outputs`, indices as `results`, or both: then the one from which their `acc` comes."""
        tables = {
            key: whole[name] for key, name in (("text", "outputs"), ("answer", "results")) if _is_table(whole.get(name))
        }
        if not tables:
            return super().table_of(whole)
        stated = whole.get("acc")
        if len(tables) == 1 or not isinstance(stated, int | float):
            return next(iter(tables.items()))
        return min(tables.items(), key=lambda table: abs(self._accuracy(*table) - stated))

    def _accuracy(self, key: str, table: Mapping[str, Any]) -> float:
        """Percent right of a table of results; 0 if it answers no question."""
        hits: list[bool] = []
        for id, value in table.items():
            if id in self._by_id:
                index, count = self._by_id[id].truth
                answer = Answer(identifier(value), final=key == "answer")
                hits.append(_choice(answer, count) == index)
        return 100.0 * sum(map(bool, hits)) / max(1, len(hits))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def _choice(answer: Answer, count: int) -> int | None:
    """The index that an answer names, as a number in a file of results, or by its letter as LLaVA reads it."""
    if answer.final and re.fullmatch("[0-9]{1,2}", answer.text.strip()):
        return int(answer.text)
    return science_qa_choice(answer.text.strip() if answer.final else answer.text, count)


def _science_question(id: str, problem: dict[str, Any]) -> Question:
    """A record of problems.json as LLaVA asks it; its truth is (index of the right option, number of options)."""
    context = f"Context: {problem['hint']}\n" if problem.get("hint") else ""
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False))
    if problem["answer"] not in range(len(problem["choices"])):
        raise ValueError(f"problem {id} has {len(problem['choices'])} choices, and the answer {problem['answer']!r}")
    return Question(
        id,
        f"{context}{problem['question']}{options}{LETTER}",
        f"{id}/{problem['image']}" if problem.get("image") else None,
        (problem["answer"], len(problem["choices"])),
        problem.get("subject", ""),
    )


def _predictions_of_spreadsheet(path: Path, malformed: list[str]) -> Iterator[Found]:
    """What MMBench's server takes: the columns `index` and `prediction`."""
    from openpyxl import load_workbook

    try:
        sheet = load_workbook(path, read_only=True, data_only=True).active
        first, *rows = list(sheet.iter_rows(values_only=True))
        names = [str(name) for name in first]
    except Exception as error:  # openpyxl raises whatever its zip and XML readers meet
        raise ValueError(f"{path} is not a spreadsheet: {error}; give the .xlsx that MMBench's server takes") from error
    if "index" not in names or "prediction" not in names:
        raise ValueError(f"{path} has the columns {', '.join(names)}; give it index and prediction")
    for number, values in enumerate(rows, 2):
        if any(value is not None for value in values):
            record = dict(zip(names, values, strict=False))
            told = {key: record.get(key) for key in ("index", "prediction", "question") if key in names}
            yield Found(f"{path.name} row {number}", told)


class MMBench(Benchmark):
    """MMBench dev: a question counts if the answer is right in every rotation of its options that the table holds."""

    name = "mmbench"
    files = "mmbench_dev_20230712.tsv or MMBench_DEV_EN.tsv (images within); TEST for test"
    folders: ClassVar[tuple[str, ...]] = ("mmbench", "MMBench")
    splits = ("dev", "test")
    max_new_tokens = 1024
    prediction_files: ClassVar = {".xlsx": _predictions_of_spreadsheet}
    suffix = LETTER
    tables: ClassVar[tuple[str, ...]] = (
        "mmbench_dev_20230712.tsv",
        "mmbench_dev_en_20231003.tsv",
        "MMBench_DEV_EN.tsv",
    )
    test_tables: ClassVar[tuple[str, ...]] = (
        "mmbench_test_20230712.tsv",
        "mmbench_test_en_20231003.tsv",
        "MMBench_TEST_EN.tsv",
    )

    def read(self) -> list[Question]:
        """One tab-separated table with the images in it."""
        origin = "https://github.com/open-compass/MMBench"
        path = self.find(origin, *(self.tables if self.split == "dev" else self.test_tables))
        self.check()
        rows = _read_table(path)
        self._images = {row["index"]: row["image"] for row in rows}
        self._rows = {row["index"]: row for row in rows}
        return [self._question(row) for row in rows]

    def _question(self, row: dict[str, str]) -> Question:
        """A row of the table; its group is the question that it rotates."""
        hint = row.get("hint", "")
        text = row["question"] if hint in _NOTHING else f"{hint}\n{row['question']}"
        options = options_of(row)
        text += "".join(f"\n{letter}. {option}" for letter, option in options.items())
        answer = row.get("answer", "").strip()
        group = str(int(row["index"]) % _CIRCLE)
        return Question(row["index"], text + self.suffix, row["index"], None if answer in _NOTHING else answer, group)

    def image(self, name: str) -> bytes:
        """The image of a row, which may refer to another row's."""
        data = self._images[name]
        if len(data) <= _REFERENCE and data.strip() in self._images:
            data = self._images[data.strip()]
        try:
            return base64.b64decode(data, validate=False)
        except ValueError as error:
            raise ValueError(
                f"{self.name}: the image of row {name} in {self.folder} is not base64: {error}; download its table"
            ) from error

    def guesses(self) -> dict[str, Answer]:
        """None: letters rotate within a question, so none of them is right in all of its rows."""
        return {}

    def absent_images(self) -> list[str]:
        """Rows without an image."""
        return sorted(index for index, data in self._images.items() if not data and index in self.kept)

    def score(self, answers: Answers) -> dict[str, Scored]:
        """Circular accuracy by the server's rules, by exact letters, and of the rows one by one."""

        def by_rules(said: str, row: dict[str, str]) -> str | None:
            return option_letter(said, options_of(row))

        def exactly(said: str, row: dict[str, str]) -> str | None:
            return said.strip()

        return {
            "circular": self._circular(
                "every rotation of a question right, letters read by the server's rules", answers, by_rules
            ),
            "circular_exact": self._circular(
                "every rotation of a question right, the answer being the letter alone", answers, exactly
            ),
            "rows": Scored("rows right, each by itself", self._right(answers, by_rules)),
        }

    def _right(
        self, answers: Answers, letter: Callable[[str, dict[str, str]], str | None]
    ) -> dict[str, tuple[str, float]]:
        """1 or 0 for each row whose truth is known, letters read by `letter`."""
        return {
            q.id: ("", float(q.id in answers and letter(answers[q.id].text, self._rows[q.id]) == q.truth))
            for q in self.questions
            if q.truth is not None
        }

    def _circular(self, what: str, answers: Answers, letter: Callable[[str, dict[str, str]], str | None]) -> Scored:
        """A question is right if its worst rotation is."""
        groups: dict[str, list[float]] = defaultdict(list)  # rotations of one question
        for id, (_, hit) in self._right(answers, letter).items():
            groups[self._by_id[id].group].append(hit)
        return Scored(what, {group: ("", min(hits)) for group, hits in groups.items()})

    def server_file(self, answers: Answers) -> tuple[str, bytes]:
        """The spreadsheet that its server takes: the table without images, with a column `prediction`."""
        dropped = {"hint", "category", "source", "image", "comment", "l2-category"}
        columns = [name for name in next(iter(self._rows.values())) if name not in dropped]
        columns.insert(6, "prediction")
        rows = [
            [answers[id].text if name == "prediction" and id in answers else row.get(name, "") for name in columns]
            for id, row in self._rows.items()
        ]
        return f"{self.name}_{self.split}.xlsx", _spreadsheet(columns, rows)


class MMBenchCN(MMBench):
    """MMBench in Chinese."""

    name = "mmbench-cn"
    files = "mmbench_dev_cn_20231003.tsv or MMBench_DEV_CN.tsv (images within); TEST for test"
    folders = ("mmbench-cn", "mmbench_cn", "mmbench", "MMBench")
    suffix = "\n请直接回答选项字母。"
    tables = ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv")
    test_tables = ("mmbench_test_cn_20231003.tsv", "MMBench_TEST_CN.tsv")


def options_of(row: dict[str, str]) -> dict[str, str]:
    """Letter -> option, up to the first that is missing."""
    options = {}
    for letter in "ABCD":
        if row.get(letter, "") in _NOTHING:
            break
        options[letter] = row[letter]
    return options


def _read_table(path: Path) -> list[dict[str, str]]:
    """MMBench's rows, as texts without None; ValueError if columns are missing or an index is no number."""
    check_regular(path)
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # images are long fields
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not MMBench's table: {error}; download it again") from error
    needed = {"index", "question", "image", "A", "B"}
    if not rows or not needed <= rows[0].keys():
        found = f"its columns are {', '.join(rows[0])}" if rows else "it has no rows"
        raise ValueError(f"{path} is not MMBench's table: {found}; give one with {', '.join(sorted(needed))}")
    wrong = [row["index"] for row in rows if not (row["index"] or "").strip().isdecimal()]
    if wrong:
        raise ValueError(f"{path}: index {wrong[0]!r} is not a number; download the table again")
    return [
        {**{name: value or "" for name, value in row.items() if name}, "index": row["index"].strip()} for row in rows
    ]


def _spreadsheet(columns: list[str], rows: list[list[str]]) -> bytes:
    """An .xlsx file of one sheet: numbers under `index`, text everywhere else."""
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook()
    sheet = book.active
    sheet.append([ILLEGAL_CHARACTERS_RE.sub("", name) for name in columns])
    for number, row in enumerate(rows, 2):
        for column, value in enumerate(row, 1):
            if columns[column - 1] == "index":
                sheet.cell(number, column, int(value))
                continue
            cell = sheet.cell(number, column, ILLEGAL_CHARACTERS_RE.sub("", value))
            cell.data_type = "s"  # "=..." is an answer, no formula
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()
