"""Benchmarks with free, short answers: GQA, TextVQA, VQAv2 and VizWiz."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.benchmarks.metrics import Scored, evalai, gqa_answer, vqa_accuracy, vqa_eval
from training.benchmarks.questions import (
    SHORT,
    Answer,
    Answers,
    Benchmark,
    Question,
    identifier,
    read_json,
    read_json_lines,
    to_json,
)

NOTHING = Answer("", final=True)
_TEXTVQA = "https://textvqa.org/dataset"
_OCR = "TextVQA_Rosetta_OCR_v0.2_val.json"


class GQA(Benchmark):
    """GQA, testdev_balanced: accuracy by string equality."""

    name = "gqa"
    files = "testdev_balanced_questions.json (or in data/, questions1.2/); images/ or data/images/"
    folders = ("gqa",)
    splits = ("testdev_balanced",)
    numbers = True  # "2" is an answer, and so is 2

    def read(self) -> list[Question]:
        """`testdev_balanced_questions.json` and `images/`."""
        origin = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
        name = "testdev_balanced_questions.json"
        path = self.find(
            f"{origin}, questions1.2.zip", name, f"data/{name}", f"questions1.2/{name}", f"data/questions1.2/{name}"
        )
        self.image_folder = self.folder / ("data/images" if (self.folder / "data/images").is_dir() else "images")
        self.check()
        return [
            Question(
                id,
                q["question"] + SHORT,
                f"{q['imageId']}.jpg",
                q.get("answer"),
                q.get("types", {}).get("structural", ""),
            )
            for id, q in read_json(path).items()
        ]

    def score(self, answers: Answers) -> dict[str, Scored]:
        """Accuracy."""
        units = {}
        for q in self.questions:
            answer = answers.get(q.id)
            said = None if answer is None else answer.text if answer.final else gqa_answer(answer.text)
            if q.truth is not None:
                units[q.id] = ("", float(said == q.truth))
        return {"accuracy": Scored("accuracy, string equality", units)}

    def server_file(self, answers: Answers) -> tuple[str, bytes]:
        """Input of GQA's `eval.py`."""
        rows = [
            {"questionId": id, "prediction": a.text if a.final else gqa_answer(a.text)} for id, a in answers.items()
        ]
        return "testdev_balanced_predictions.json", to_json(rows)


class TextVQA(Benchmark):
    """TextVQA, val: VQA accuracy, both sides normalised; the prompt names the OCR tokens, as LLaVA-1.5's does."""

    name = "textvqa"
    files = "TextVQA_0.5.1_val.json; to ask: TextVQA_Rosetta_OCR_v0.2_val.json, train_images/"
    folders = ("textvqa", "TextVQA")
    splits = ("val",)
    numbers = True  # "2" is an answer, and so is 2

    def read(self) -> list[Question]:
        """`TextVQA_0.5.1_val.json`, `TextVQA_Rosetta_OCR_v0.2_val.json` and `train_images/`."""
        questions = self.find(_TEXTVQA, "TextVQA_0.5.1_val.json")
        words = self.folder / _OCR  # needed to ask, not to score
        self.image_folder = self.folder / "train_images"
        self.check()
        seen = {row["image_id"]: row["ocr_tokens"] for row in read_json(words)["data"]} if words.exists() else {}
        rows = read_json(questions)["data"]
        self._asked: dict[tuple[str, str], list[str]] = defaultdict(list)
        for row in rows:
            self._asked[str(row["image_id"]), row["question"].lower()].append(str(row["question_id"]))
        return [
            Question(
                str(row["question_id"]),
                f"{row['question']}\nReference OCR token: {', '.join(seen.get(row['image_id'], []))}{SHORT}",
                f"{row['image_id']}.jpg",
                _people(row),
            )
            for row in rows
        ]

    def to_ask(self) -> Sequence[Question]:
        """The questions, whose prompts need the OCR tokens."""
        self.find(_TEXTVQA, _OCR)
        self.check()
        return super().to_ask()

    def identify(self, record: Mapping[str, Any], taken: Container[str]) -> str | None:
        """LLaVA's predictions name the image, and the question within the prompt."""
        known = super().identify(record, taken)
        if known is not None:
            return known
        lines = str(record.get("prompt", "")).replace("\\n", "\n").removeprefix("<image>\n").split("\n")
        first = lines[1] if lines[0].startswith("Reference OCR token:") and len(lines) > 1 else lines[0]
        ids = self._asked.get((str(record.get("question_id")), first.lower()), [])
        return next((id for id in ids if id not in taken), ids[-1] if ids else None)

    def score(self, answers: Answers) -> dict[str, Scored]:
        """VQA accuracy."""
        units = {
            q.id: ("", vqa_accuracy(answers[q.id].text, q.truth) if q.id in answers else 0.0)
            for q in self.questions
            if q.truth is not None
        }
        return {"accuracy": Scored("VQA accuracy, answers normalised (EvalAI)", units)}

    def server_file(self, answers: Answers) -> tuple[str, bytes]:
        """EvalAI's."""
        rows = [{"question_id": _number(id), "answer": processed(a)} for id, a in answers.items()]
        return "textvqa_val.json", to_json(rows)


class VQAv2(Benchmark):
    """VQAv2: val is scored here; test-dev and test make the server's file, over all test2015 questions."""

    name = "vqav2"
    files = (
        "v2_OpenEnded_mscoco_*_questions.json or llava_vqav2_mscoco_*.jsonl; "
        "val: v2_mscoco_val2014_annotations.json; val2014/ or test2015/"
    )
    folders = ("vqav2", "VQAv2")
    splits = ("val", "test-dev", "test")
    numbers = True  # "2" is an answer, and so is 2

    def read(self) -> list[Question]:
        """`v2_OpenEnded_mscoco_*_questions.json` or, for test, LLaVA's `llava_vqav2_mscoco_*.jsonl`;
        `v2_mscoco_val2014_annotations.json`; `val2014/` or `test2015/`.
        """
        origin = "https://visualqa.org/download.html"
        subset = {"val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}[self.split]
        path = self._find_questions(origin, subset)
        truth: dict[Any, Any] = {}
        images = "val2014" if self.split == "val" else "test2015"
        every = self._find_questions(origin, "test2015") if self.split == "test-dev" else path
        annotations = self.find(origin, "v2_mscoco_val2014_annotations.json") if self.split == "val" else None
        self.image_folder = self.folder / images
        self.check()
        if annotations is not None:
            truth = {row["question_id"]: row for row in read_json(annotations)["annotations"]}
        self._every = {str(row["question_id"]): row["question_id"] for row in _vqav2_rows(every)}
        return [
            Question(
                str(row["question_id"]),
                row["question"] + SHORT,
                f"COCO_{images}_{int(row['image_id']):012d}.jpg",
                _people(truth.get(row["question_id"], {})),
                truth.get(row["question_id"], {}).get("answer_type", ""),
            )
            for row in _vqav2_rows(path)
        ]

    def _find_questions(self, origin: str, subset: str) -> Path:
        """The official list of questions of a subset, or LLaVA's."""
        return self.find(origin, f"v2_OpenEnded_mscoco_{subset}_questions.json", f"llava_vqav2_mscoco_{subset}.jsonl")

    def identify(self, record: Mapping[str, Any], taken: Container[str]) -> str | None:
        """By the id; a file for the server has all test2015 questions, of which test-dev asks some."""
        known = super().identify(record, taken)
        id = identifier(record.get("question_id"))
        return known or (id if id in self._every else None)

    def score(self, answers: Answers) -> dict[str, Scored]:
        """VQA accuracy, normalised, and as the official `vqaEval` has it."""
        return vqa_scores(self.questions, answers)

    def server_file(self, answers: Answers) -> tuple[str, bytes]:
        """EvalAI's: every question of the split (of test2015 for test-dev), '' for those without an answer."""
        rows = [
            {"question_id": number, "answer": processed(answers.get(id, NOTHING))} for id, number in self._every.items()
        ]
        return f"vqav2_{self.split}.json", to_json(rows)


class VizWiz(Benchmark):
    """VizWiz-VQA: val is scored here; test makes the server's file."""

    name = "vizwiz"
    files = "val.json or test.json (or in Annotations/); val/ or test/ with the images"
    folders = ("vizwiz", "VizWiz")
    splits = ("val", "test")
    numbers = True  # "2" is an answer, and so is 2

    def read(self) -> list[Question]:
        """`Annotations/val.json` (or `val.json`) and the images in `val/`; the same for test."""
        origin = "https://vizwiz.org/tasks-and-datasets/vqa/"
        path = self.find(origin, f"Annotations/{self.split}.json", f"{self.split}.json")
        self.image_folder = self.folder / self.split
        self.check()
        hint = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        rows = read_json(path)
        self._rows = [row["image"] for row in rows]
        return [
            Question(
                row["image"],
                row["question"] + hint + SHORT,
                row["image"],
                _people(row),
                row.get("answer_type", ""),
            )
            for row in rows
        ]

    def identify(self, record: Mapping[str, Any], taken: Container[str]) -> str | None:
        """By the image, which has one question; or by the row of a test file, as a number, if its prompt agrees."""
        for key in ("image", "question_id"):
            if (name := str(record.get(key))) in self._by_id:
                return name
        number = str(record.get("question_id"))
        if re.fullmatch(r"\d{1,9}", number) and int(number) < len(self._rows) and "image" not in record:
            question = self._by_id[self._rows[int(number)]]
            prompt = str(record.get("prompt", question.text)).replace("\\n", "\n")
            return question.id if question.text.partition("\n")[0].strip() in prompt else None
        return None

    def score(self, answers: Answers) -> dict[str, Scored]:
        """VQA accuracy, normalised, and as the official `vqaEval` has it."""
        return vqa_scores(self.questions, answers)

    def server_file(self, answers: Answers) -> tuple[str, bytes]:
        """EvalAI's: image and answer of every row."""
        rows = [{"image": name, "answer": processed(answers.get(name, NOTHING))} for name in self._rows]
        return f"vizwiz_{self.split}.json", to_json(rows)


def _people(row: Mapping[str, Any]) -> Any:
    """The answers that people gave, records or texts; None where the file does not tell them; TypeError for others."""
    answers = row.get("answers") or None
    for answer in answers or ():
        text = answer["answer"] if isinstance(answer, dict) else answer
        if not isinstance(text, str):
            raise TypeError(f"people answered {str(text)[:60]!r} to question {str(row.get('question'))[:60]!r}")
    return answers


def _vqav2_rows(path: Path) -> list[dict[str, Any]]:
    """Rows with question_id, image_id and question, of an official list or of LLaVA's, whose images are file names."""
    if path.suffix == ".json":
        rows: list[dict[str, Any]] = read_json(path)["questions"]
        return rows
    return [
        {
            "question_id": row["question_id"],
            "image_id": int(Path(row["image"]).stem.rpartition("_")[2]),
            "question": row["text"].removesuffix(SHORT),
        }
        for row in read_json_lines(path)
    ]


def processed(answer: Answer) -> str:
    """As it goes to EvalAI."""
    return answer.text if answer.final else evalai(answer.text)


def vqa_scores(questions: list[Question], answers: Answers) -> dict[str, Scored]:
    """The two VQA accuracies of the questions whose truth is known."""
    normalised, official = {}, {}
    for q in questions:
        if q.truth is None:
            continue
        people = [person["answer"] for person in q.truth]
        answer = answers.get(q.id)
        normalised[q.id] = ("", 0.0 if answer is None else vqa_accuracy(answer.text, people))
        official[q.id] = ("", 0.0 if answer is None else vqa_eval(processed(answer), q.truth))
    return {
        "accuracy": Scored("VQA accuracy, answers normalised (EvalAI)", normalised),
        "accuracy_vqaeval": Scored("VQA accuracy as the official vqaEval computes it", official),
    }


def _number(id: str) -> int | str:
    return int(id) if id.isdecimal() else id
