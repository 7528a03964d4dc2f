"""Your own questions about images: one word or phrase is right, category by category."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.benchmarks.metrics import Scored, ScoreReport
from training.benchmarks.questions import Answers, Benchmark, Question, identifier, read_json_lines
from training.benchmarks.report import Report

ALL = "all"  # the category of a question that names none


class OwnQuestions(Benchmark):
    """LLaVA's JSON lines: {"question_id", "image", "text"}, with "answer" (and "category") where the truth is known.

    Args:
        folder: has `questions.jsonl` and `images/`; with `images` it is the questions file itself.
        images: folder that the images are relative to.
    """

    name = "own"
    files = "questions.jsonl; images/"
    folders = ("own",)
    splits = ("all",)
    numbers = True

    def __init__(self, folder: Path, split: str | None = None, images: Path | None = None) -> None:
        self._images = images
        super().__init__(folder, split)

    @property
    def heading(self) -> str:
        """What they are scored by."""
        return "accuracy"

    @classmethod
    def answers_in(cls, folder: Path) -> Path:
        """`answers.jsonl`."""
        return folder / "answers.jsonl"

    def read(self) -> list[Question]:
        """The lines of the file, in order."""
        path = self.folder
        if self._images is None:
            path = self.find('you: lines of {"question_id", "image", "text", "answer"}', "questions.jsonl")
            self.check()
        self.image_folder = self.folder / "images" if self._images is None else self._images
        questions = [_question(line) for line in _read_lines(path)]
        self._know(questions)
        return questions

    def identify(self, record: Mapping[str, Any], taken: Container[str]) -> str | None:
        """By id and image; by the id where the record names no image and no other question has it."""
        return self._ids.get((identifier(record.get("question_id")), record.get("image")))

    def shuffle_images(self, seed: int) -> None:
        """As every benchmark does; predictions then name the new images."""
        super().shuffle_images(seed)
        self._know(self.questions)

    def _know(self, questions: Sequence[Question]) -> None:
        """Note how predictions may name each question: by id and image, by the id where only one question has it."""
        named = [identifier(q.line["question_id"]) for q in questions]
        often = Counter(named)
        self._ids: dict[tuple[str, str | None], str] = {}
        for name, q in zip(named, questions, strict=True):
            self._ids[name, q.image] = q.id
            if often[name] == 1:
                self._ids[name, None] = q.id

    def score(self, answers: Answers) -> dict[str, Scored]:
        """Accuracy over the questions whose truth is known, in all and by category."""
        units = {
            q.id: (q.group, float(q.id in answers and normalise(answers[q.id].text) == normalise(q.truth)))
            for q in self.questions
            if q.truth is not None
        }
        scores = {"accuracy": Scored("one word or phrase right", {id: ("", hit) for id, (_, hit) in units.items()})}
        for category in sorted({q.group for q in self.questions}):
            part = {id: ("", hit) for id, (group, hit) in units.items() if group == category}
            scores[_CATEGORY + category] = Scored(f"one word or phrase right, {category}", part)
        return scores

    def categories(self, scores: Mapping[str, Scored]) -> dict[str, Scored]:
        """Accuracy by category; nothing if there is one category only."""
        found = {name.removeprefix(_CATEGORY): part for name, part in scores.items() if name.startswith(_CATEGORY)}
        told = {name: part for name, part in found.items() if part.units}
        return told if len(told) > 1 else {}

    def as_json(self, report: Report) -> dict[str, Any]:
        """Accuracy as a fraction, in all and by category, with counts beside every figure."""
        parts = {name.removeprefix(_CATEGORY): part for name, part in report["scores"].items() if name != "accuracy"}
        whole = report["scores"]["accuracy"]
        return {
            "questions": report["questions"],
            "answered": report["answered"],
            "scored": whole["units"],
            **_fraction(whole),
            "categories": {
                name: {**_fraction(part), "questions": part["units"]} for name, part in parts.items() if part["units"]
            },
        }

    @classmethod
    def headline(cls, scores: Mapping[str, Any]) -> tuple[str, float | None]:
        """Accuracy, in percent as for other benchmarks."""
        return "accuracy", None if scores["accuracy"] is None else 100 * scores["accuracy"]


_CATEGORY = "accuracy, "  # what stands before a category in the name of its score


def normalise(text: str) -> str:
    """Case, surrounding space and a final full stop do not matter in a one-word answer."""
    return text.strip().rstrip(".").strip().lower()


def is_right(line: Mapping[str, Any]) -> bool:
    """Whether a line of answers holds the truth (`answer`) that it came with."""
    truth = line.get("answer")
    return truth is not None and normalise(line["text"]) == normalise(identifier(truth))


def _question(line: Mapping[str, Any]) -> Question:
    """A checked line of a questions file."""
    return Question(
        id=f"{identifier(line['question_id'])} {line['image']}",
        text=line["text"],
        image=line["image"],
        truth=None if line.get("answer") is None else identifier(line["answer"]),
        group=ALL if line.get("category") is None else str(line["category"]),
        origin=line,
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """A questions file, checked.

    Raises:
        ValueError: naming the file, the question and what is wrong with it.
    """
    if not path.is_file():
        raise ValueError(f"questions file {path} does not exist, or is no file; name a file of JSON lines")
    lines = read_json_lines(path)
    if not lines:
        raise ValueError(f"{path} holds no question; give it lines, objects with question_id, image and text")
    for number, line in enumerate(lines, 1):
        missing = [key for key in ("question_id", "image", "text") if key not in line]
        if missing:
            raise ValueError(f"{path}: question {number} lacks {', '.join(missing)}, give it; it has {', '.join(line)}")
        given = (("question_id", str | int), ("image", str), ("text", str), ("answer", str | int | float | None))
        for key, kinds in given:
            value = line.get(key)
            endless = isinstance(value, float) and not math.isfinite(value)  # NaN: how tables write that none is known
            if not isinstance(value, kinds) or isinstance(value, bool) or endless:
                or_null = ", or null if it is not known" if key == "answer" else ""
                raise ValueError(f"{path}: question {number} has {key} {value!r}; give it text{or_null}")
        try:
            json.dumps(line, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(
                f"{path}: question {number} has {half!r}, half of a character, as of an emoji that was cut in two; "
                "correct it"
            ) from error
    asked = Counter((identifier(line["question_id"]), line["image"]) for line in lines)
    repeated = [key for key, times in asked.items() if times > 1]
    if repeated:
        raise ValueError(
            f"{path}: {len(repeated)} question_id(s) occur again with the same image, first {repeated[0]}; give each "
            "question an id that no other has"
        )
    return lines


def _fraction(part: ScoreReport) -> dict[str, Any]:
    if part["score"] is None or part["interval"] is None:
        return {"accuracy": None, "interval": None}
    return {"accuracy": part["score"] / 100, "interval": [bound / 100 for bound in part["interval"]]}
