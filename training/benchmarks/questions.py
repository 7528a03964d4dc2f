"""What every benchmark has: questions from official files, answers by question, scores by name."""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, cast

from pipeline.images import find_file
from pipeline.regular import check_regular
from training.benchmarks.metrics import Scored
from training.benchmarks.report import Report
from training.model.markers import IMAGE

# The keys of a reply: what a model said, and then what is post-processed already, as servers take it. `answer` is the
# truth in many files: it counts only where no other key is there.
SAID = ("text", "output", "response", "pred")
REPLIES = (*SAID, "prediction", "answer")
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


class Row(NamedTuple):
    """One reply as it stands in a file: its record, its question's id (None if there is none), the answer."""

    record: Mapping[str, Any]
    question: str | None
    answer: Answer


class Found(NamedTuple):
    """One record of a file of predictions, whoever wrote it, and its place for a message."""

    place: str
    record: Any


Reader = Callable[[Path, list[str]], Iterator[Found]]  # records of a file; what is no record goes to the list


class MissingFilesError(ValueError):
    """Official files are not in the folder."""


class Benchmark(ABC):
    """One benchmark in `folder` (or in the folder of its name below it), on `split`.

    A kind declares the class variables, and writes `read` and `score`; the other methods have a default. Without a
    `split` it is the first whose files are there.

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
    prediction_files: ClassVar[Mapping[str, Reader]] = {}  # by their ending, beside JSON, JSON lines and tables
    numbers: ClassVar[bool] = False  # whether a reply may be a number instead of a text
    hint: ClassVar[str] = ""  # what to do where answers find no question
    files: ClassVar[str] = ""  # what it needs in its folder, for `--help`

    def __init__(self, folder: Path, split: str | None = None) -> None:
        if split is not None and split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r}; choose from {', '.join(self.splits)}")
        below = [folder / name for name in self.folders if (folder / name).is_dir()]
        self.folder = (below[0] if below else folder).absolute()  # so that messages that name it are told by it
        self.questions = self._read_first([split] if split else list(self.splits))
        self._by_id = {question.id: question for question in self.questions}
        self.kept = frozenset(self._by_id)

    def _read_first(self, splits: Sequence[str]) -> list[Question]:
        """The questions of the first split whose files are there; if none's are, the files of the first are named."""
        absent: list[MissingFilesError] = []
        for self.split in splits:
            self._missing: list[str] = []
            self.image_folder = self.folder
            try:
                return _checked(self.read())
            except MissingFilesError as error:
                absent.append(error)
            except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
                if isinstance(error, ValueError) and str(self.folder) in str(error):
                    raise  # it names the file itself
                raise ValueError(
                    f"the files of {self.name} {self.split} in {self.folder} are not in the official layout: "
                    f"{type(error).__name__} {error}; download them again"
                ) from error
        raise absent[0]

    @abstractmethod
    def read(self) -> list[Question]:
        """The questions of the split, from the official files."""

    @abstractmethod
    def score(self, answers: Answers) -> dict[str, Scored]:
        """Scores by name, the headline first; a question without an answer counts as wrong."""

    def score_rows(self, rows: Sequence[Row]) -> dict[str, Scored]:
        """Scores that the order of a file decides, beside those of `score`."""
        return {}

    def table_of(self, whole: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        """The key of a reply, and id -> reply, in a file that is one JSON object."""
        return "answer", whole

    def remarks(self, missing: int, unknown: int) -> list[str]:
        """What a person should know of answers of which some are missing, or find no question."""
        return []

    def arrange(self, records: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027 - most orders tell nothing
        """Look at all predictions of a file before any is identified, where their order tells something."""

    def identify(self, record: Mapping[str, Any], taken: Container[str]) -> str | None:
        """Which question a prediction belongs to, one that is not `taken` if several may be meant; None if none."""
        for key in ("question_id", "questionId", "index", "id"):
            if key in record and (name := identifier(record[key])) in self._by_id:
                return name
        return None

    def categories(self, scores: Mapping[str, Scored]) -> dict[str, Scored]:
        """Of what `score` gives: the headline score of each category, where a table shows them."""
        return {}

    def guesses(self) -> dict[str, Answer]:
        """For each question with a known truth its group's most frequent one: the answers of one who looks at nothing.

        Nothing if truths are no texts.
        """
        told = [question for question in self.questions if question.truth is not None]
        if not all(isinstance(question.truth, str) for question in told):
            return {}
        often: dict[str, Counter[str]] = defaultdict(Counter)
        for question in told:
            often[question.group][question.truth.strip().lower()] += 1
        return {question.id: Answer(often[question.group].most_common(1)[0][0]) for question in told}

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
            ValueError: if images are missing, or a question's text holds `<image>`.
        """
        for number, question in enumerate(self.questions, 1):
            if IMAGE in question.text:
                raise ValueError(
                    f"{self.folder}: question {number} (id {question.id}) holds {IMAGE} in its text; take it out, its "
                    "image is shown before the text anyway"
                )
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
            MissingFilesError: naming them, what to download and where it goes.
        """
        if self._missing:
            missing = "\n  ".join(self._missing)
            raise MissingFilesError(
                f"{self.name} {self.split} needs, in {self.folder} (--data); download it:\n  {missing}"
            )


def _checked(questions: list[Question]) -> list[Question]:
    """The questions, each of which can be asked, written, and told from the others.

    Raises:
        TypeError: naming the first whose text or image is none. ValueError: the first whose id an earlier one has.
    """
    seen: set[str] = set()
    for number, q in enumerate(questions, 1):
        for what, value, kinds in (("id", q.id, str), ("text", q.text, str), ("image", q.image, str | None)):
            if not isinstance(value, kinds):
                raise TypeError(f"question {number} has the {what} {str(value)[:60]!r}")
        if q.id in seen:
            raise ValueError(f"question {number} has the id {q.id!r} of an earlier one")
        seen.add(q.id)
        json.dumps(q.line, ensure_ascii=False).encode()  # half a surrogate pair could not be written
    return questions


def identifier(value: Any) -> str:
    """An id as text: spreadsheets turn 241 into 241.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        ValueError: if it is no regular file or not UTF-8, naming it.
    """
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error


def from_json(text: str, object_of: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """A JSON value, its objects made from their pairs by `object_of`.

    Raises:
        ValueError: if the text is none, or is nested too deep to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=object_of)
    except RecursionError:
        raise ValueError(f"its brackets are nested too deep (it begins {text[:40]!r}); write it anew") from None


def given_twice(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """Of the pairs of a JSON object: which key is there twice, so that one value would be dropped, as a message."""
    if len(dict(pairs)) == len(pairs):
        return None
    return f"key {Counter(key for key, _ in pairs).most_common(1)[0][0][:40]!r} is there twice; keep one"


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: if it is none, naming it.
    """
    text = read_text(path)
    try:
        return from_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; mend or replace it") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """A file of one JSON object a line. Only a line feed ends a line: texts may hold other separators.

    Raises:
        ValueError: naming the line that is not one, or holds a key twice.
    """
    twice: list[str] = []  # of the line that is read

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if wrong := given_twice(pairs):
            twice.append(wrong)
        return dict(pairs)

    records = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = from_json(line, once)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}; mend or delete that line") from error
        if twice:
            raise ValueError(f"{path}:{number}: {twice[0]}")
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}:{number} holds {type(record).__name__}, an object was expected: mend or delete that line"
            )
        records.append(record)
    return records


def to_json(value: Any) -> bytes:
    """As the servers read it."""
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")
