"""What every benchmark has: questions from official files, answers by question, scores by name."""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, cast

from pipeline.images import find_file
from training.benchmarks.metrics import Scored
from training.benchmarks.report import Report

SHORT = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: its name, unique within the benchmark.
        text: what is asked, without `<image>`.
        image: name of its image for `Benchmark.image`; None if it has none.
        truth: what the scorer compares with; None if the official files do not tell it.
        group: category, split or circular group.
        origin: the line of a questions file that it comes from, with all it holds; None for official files.
    """

    id: str
    text: str
    image: str | None
    truth: Any = None
    group: str = ""
    origin: Mapping[str, Any] | None = None

    @property
    def line(self) -> dict[str, Any]:
        """What its line in a file of answers begins with."""
        origin = self.origin or {"question_id": self.id, "image": self.image, "text": self.text}
        return {**origin, "image": self.image}


class Answer(NamedTuple):
    """What a model said; `final` if it is already post-processed, as in a file for the benchmark's server."""

    text: str
    final: bool = False


Answers = Mapping[str, Answer]  # by the question's id


class Found(NamedTuple):
    """One record of a file of predictions, whoever wrote it, and its place for a message."""

    place: str
    record: Any


Reader = Callable[[Path, list[str]], Iterator[Found]]  # records of a file; what is no record goes to the list


class Benchmark(ABC):
    """One benchmark in `folder` (or in the folder of its name below it), on `split`.

    A kind declares the class variables, and writes `read` and `score`; the other methods have a default.

    Attributes:
        questions: in the official order.
        kept: ids of the questions that are asked.
        image_folder: where their images are; `read` sets it.

    Raises:
        ValueError: if files are missing or malformed, or the split is not one of `splits`.
    """

    name: ClassVar[str]
    folders: ClassVar[tuple[str, ...]]  # what its folder may be called
    splits: ClassVar[tuple[str, ...]]  # the first one is the default
    max_new_tokens: ClassVar[int] = 128
    prediction_files: ClassVar[Mapping[str, Reader]] = {}  # by their ending, beside JSON and JSON lines

    def __init__(self, folder: Path, split: str | None = None) -> None:
        if split is not None and split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r}; choose from {', '.join(self.splits)}")
        self.split = split or self.splits[0]
        below = [folder / name for name in self.folders if (folder / name).is_dir()]
        self.folder = below[0] if below else folder
        self._missing: list[str] = []
        self.image_folder = self.folder
        try:
            self.questions = self.read()
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"the files of {self.name} {self.split} in {self.folder} are not in the official layout: "
                f"{type(error).__name__} {error}; download them again"
            ) from error
        self._by_id = {question.id: question for question in self.questions}
        self.kept = frozenset(self._by_id)

    @abstractmethod
    def read(self) -> list[Question]:
        """The questions of the split, from the official files."""

    @abstractmethod
    def score(self, answers: Answers) -> dict[str, Scored]:
        """Scores by name, the headline first; a question without an answer counts as wrong."""

    def arrange(self, records: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027 - most orders tell nothing
        """Look at all predictions of a file before any is identified, where their order tells something."""

    def identify(self, record: Mapping[str, Any], taken: Container[str]) -> str | None:
        """Which question a prediction belongs to, one that is not `taken` if several may be meant; None if none."""
        for key in ("question_id", "questionId", "index", "id"):
            if key in record and (name := identifier(record[key])) in self._by_id:
                return name
        return None

    @property
    def heading(self) -> str:
        """What a table calls its score."""
        return self.name

    @classmethod
    def answers_in(cls, folder: Path) -> Path:
        """Its file of answers in a folder of several benchmarks."""
        return folder / f"{cls.name}.jsonl"

    def as_json(self, report: Report) -> dict[str, Any]:
        """A report as it is written and printed."""
        return cast(dict[str, Any], report)

    @classmethod
    def headline(cls, scores: Mapping[str, Any]) -> tuple[str, float | None]:
        """Name and value of the headline score in what `as_json` wrote."""
        return scores["headline"], scores["score"]

    def server_file(self, answers: Answers) -> tuple[str, bytes] | None:
        """Name and bytes of the file that the benchmark's server takes, if it has one."""
        return None

    def to_ask(self) -> Sequence[Question]:
        """The questions, for a model that looks at the images.

        Raises:
            ValueError: if images are missing.
        """
        absent = self.absent_images()
        if absent:
            raise ValueError(
                f"{len(absent)} image(s) of {self.name} are not in {self.image_folder}: "
                f"{', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}; put them there"
            )
        return self.questions

    def image(self, name: str) -> bytes:
        """Bytes of an image file.

        Raises:
            ValueError: if it is not there, its name leads out of the benchmark's folder, or it is too large.
        """
        from pipeline.encoders.decode import read_image

        path = find_file(self.image_folder, name)
        if path is None:
            raise ValueError(f"{name} is not a file within {self.image_folder}; put it there, or name one that is")
        return read_image(path)

    def absent_images(self) -> list[str]:
        """Names of images that the questions need and the folder lacks."""
        names = {question.image for question in self.questions if question.image is not None}
        return sorted(name for name in names if find_file(self.image_folder, name) is None)

    def keep(self, limit: int | None) -> Self:
        """Go on with the first `limit` questions only; `kept` has their ids."""
        self.questions = self.questions[:limit]
        self.kept = frozenset(question.id for question in self.questions)
        return self

    def shuffle_images(self, seed: int) -> None:
        """Give each question another question's image: what a model that looks cannot answer any more.

        Raises:
            ValueError: if there is only one image.
        """
        images = sorted({q.image for q in self.questions if q.image is not None})
        if len(images) < 2:
            raise ValueError(
                f"shuffling images needs at least two different ones; {self.name} has {len(images)}: give more"
            )
        order = images.copy()
        random.Random(seed).shuffle(order)
        following = dict(zip(order, order[1:] + order[:1], strict=True))  # so none keeps its image
        self.questions = [q if q.image is None else replace(q, image=following[q.image]) for q in self.questions]

    def find(self, origin: str, *places: str) -> Path:
        """The first of `places` in the folder that exists; a missing one is reported by `check` with its `origin`."""
        for place in places:
            if (self.folder / place).exists():
                return self.folder / place
        self._missing.append(f"{places[0]}  (from {origin})")
        return self.folder / places[0]

    def check(self) -> None:
        """Raise for all files that `find` did not find.

        Raises:
            ValueError: naming them, what to download and where it goes.
        """
        if self._missing:
            missing = "\n  ".join(self._missing)
            raise ValueError(f"{self.name} {self.split} needs, in {self.folder} (--data); download it:\n  {missing}")


def identifier(value: Any) -> str:
    """An id as text: spreadsheets turn 241 into 241.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: if it is none, naming it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; mend or replace it") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """A file of one JSON object a line. Only a line feed ends a line: texts may hold other separators.

    Raises:
        ValueError: naming the line that is not one.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}; mend or delete that line") from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}:{number} holds {type(record).__name__}, an object was expected: mend or delete that line"
            )
        records.append(record)
    return records


def to_json(value: Any) -> bytes:
    """As the servers read it."""
    return json.dumps(value, ensure_ascii=False).encode()
