"""The table of an ablation, as `table.json` keeps it: one row per arm, and what all rows share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from training.release.records import read_as, read_config, write_whole

FILE = "table.json"
LUCK = "Luck of seeds: the share of a difference's variance that more seeds lessen, and more questions do not."
GUESSING = "always the most frequent answer of the category"  # what `guessing` is of
Interval = tuple[float, float]  # 95%, its lower and upper bound


class _Part(BaseModel):
    """Read-only; keys that another version wrote are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Comparison(_Part):
    """The first arm's score minus the second one's, a mean over seeds, on the same questions.

    The intervals of all comparisons with a category hold together at 95%, and so do those of all without one.
    """

    score: str  # its name
    category: str | None = None  # of its questions; None for all
    arms: tuple[str, str]
    difference: float
    by_seed: tuple[float, ...]
    interval: Interval | None = None  # None where there are too few questions
    missed: float | None = None  # a difference as large as this would have been found with 80% power
    from_seeds: float | None = None  # share of the difference's variance that more seeds, not more questions, lessen
    units: int  # questions
    clusters: int  # of questions about the same image: the independent ones

    @property
    def told_apart(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    @property
    def verdict(self) -> str:
        """What can be said, in words."""
        if self.interval is None or self.missed is None:
            return f"too few questions: {self.clusters} independent ones"
        low, high = self.interval
        if self.told_apart:
            better, sign = (self.arms[0], 1) if low > 0 else (self.arms[1], -1)
            near, far = sorted((sign * low, sign * high))
            return f"{better} is better by {sign * self.difference:.1f} [{near:.1f}, {far:.1f}]"
        return (
            f"not told apart: differences beyond [{low:+.1f}, {high:+.1f}] are excluded; one of {self.missed:.1f} "
            "would have been found with 80% power"
        )


class Score(_Part):
    """A mean over seeds, 0 to 100; None where the truth is not known."""

    score: float | None
    interval: Interval | None = None
    units: int = 0  # questions
    by_seed: tuple[float | None, ...] = ()

    def __str__(self) -> str:
        if self.score is None:
            return "-"
        bounds = "" if self.interval is None else f" [{self.interval[0]:.1f}, {self.interval[1]:.1f}]"
        return f"{self.score:.1f}{bounds}"


class Row(_Part):
    """One arm: sizes, and means over its seeds."""

    arm: str
    runs: tuple[str, ...] = Field(min_length=1)  # folders of its seeds, relative to the table's
    tokens: int  # vision tokens per image that the language model sees
    columns: int  # columns of the store that it reads
    parameters: int  # of its connector
    prefill_flops: int  # of the vision tokens in the language model, without head
    total_flops: int  # encoder, connector, prefill with the text, one position of the head
    loss_pretrain: float  # final losses, see `records.final_loss`
    loss_finetune: float
    seconds_train: float  # of the steps of both stages
    seconds_answer: float
    data_wait: float  # share of it that they waited for data
    scores: dict[str, Score]
    categories: dict[str, Score] = {}  # of your own questions
    published: dict[str, float]  # the paper's row: tflops, avg, and benchmarks by name


class EncodingCost(_Part):
    """Seconds of encoding, measured, and of training: what keeping the features has saved."""

    images: int
    once: float  # one pass with every arm's columns
    again: float  # one pass per arm and seed
    train: float  # every arm and seed
    cached_total: float = Field(gt=0)
    uncached_total: float

    @property
    def ratio(self) -> float:
        """How many times as long it takes without a store."""
        return self.uncached_total / self.cached_total


class StoreUsed(_Part):
    """A store that a stage was trained on: its name, and its fingerprints in words."""

    name: str
    text: str

    @classmethod
    def of_stage(cls, stage: Path) -> StoreUsed:
        """What the run in folder `stage` was trained on, from its settings and the store itself; of several all.

        Raises:
            ValueError: if a store is not there any more, or the settings are damaged.
        """
        from pipeline.manifest import read_store
        from pipeline.storage import Storage

        names = [entry.store for entry in read_config(stage).data.mixture]
        stores = [read_store(Storage(name)) for name in names]
        text = "; ".join(f"{store.samples} images, data {store.dataset[:16]}" for store in stores)
        store = stores[0]  # the others have the same encoder, pixels and codec
        text += f", codec {store.codec}, computed in {store.compute}, "
        text += f"encoder {Path(store.encoder.id).name} at {store.encoder.revision[:16]}"
        return cls(name=" and ".join(names), text=text)


class Table(_Part):
    """Every arm of an ablation, the one that others are compared to first."""

    title: str
    seeds: tuple[int, ...] = Field(min_length=1)
    patches: int = Field(gt=0)  # patch tokens per image, before any reduction
    rows: tuple[Row, ...] = Field(min_length=1)
    encoding: EncodingCost | None = None
    comparisons: tuple[Comparison, ...] | None = None  # None in files of an older version
    guessing: dict[str, float] = {}  # what giving each category's most frequent answer scores, by the score's name
    guessing_by_category: dict[str, float] = {}
    stores: tuple[StoreUsed, ...]  # of stage 1 and stage 2
    text_tokens: int = 64  # of the prompt in `total_flops`
    last_steps: int = 20  # that the losses are means of

    @model_validator(mode="after")
    def _square(self) -> Table:
        """Every row has the scores of the first one, and what is compared is there."""
        first = self.rows[0]
        for row in self.rows:
            for mine, others in ((row.scores, first.scores), (row.categories, first.categories)):
                if mine.keys() != others.keys():
                    raise ValueError(f"{row.arm} has the scores {list(mine)}, {first.arm} has {list(others)}")
        arms, categories = [row.arm for row in self.rows], (None, *first.categories)
        for each in self.comparisons or ():
            if not {*each.arms} <= {*arms} or each.category not in categories:
                raise ValueError(f"{' and '.join(each.arms)} are compared on {each.category}, which no row has")
        return self

    @classmethod
    def read(cls, folder: Path) -> Table:
        """From the folder of an ablation.

        Raises:
            ValueError: if the file is damaged. OSError: if it cannot be read.
        """
        return read_as(cls, folder / FILE)

    def write(self, folder: Path) -> None:
        """Into the folder of an ablation."""
        write_whole(folder / FILE, json.dumps(self.model_dump(), indent=1))

    @property
    def flops_unit(self) -> tuple[float, str]:
        """What FLOPs are shown in: TFLOPs as in the paper, MFLOPs for tiny models."""
        return (1e12, "TFLOPs") if max(row.total_flops for row in self.rows) > 1e11 else (1e6, "MFLOPs")

    @property
    def scored(self) -> list[str]:
        """Names of the scores that are known of every row, in the order of the first one."""
        return [name for name in self.rows[0].scores if all(row.scores[name].score is not None for row in self.rows)]

    @property
    def categories(self) -> list[str]:
        """Names of the categories of the questions, in the order of the first row."""
        return list(self.rows[0].categories)

    @property
    def overall(self) -> list[Comparison]:
        """The comparisons on all questions of a benchmark: one family, whose intervals hold together."""
        return [each for each in self.comparisons or () if each.category is None]

    @property
    def by_category(self) -> dict[tuple[str, str], list[Comparison]]:
        """The comparisons on each category, another family: by the two arms, in the order of the categories."""
        found: dict[tuple[str, str], list[Comparison]] = {}
        for each in self.comparisons or ():
            if each.category is not None:
                found.setdefault(each.arms, []).append(each)
        return {
            arms: sorted(of, key=lambda each: self.categories.index(str(each.category))) for arms, of in found.items()
        }

    def meaning(self, family: Sequence[Comparison]) -> str:
        """What the intervals of a family of comparisons say."""
        text, count = "Differences are paired by question.", sum(each.interval is not None for each in family)
        if not count:
            return f"{text} There are too few questions for intervals."
        over = "over questions and seeds" if len(self.seeds) > 1 else "over questions"
        text += f" The 95% intervals, {over}, hold for all {count} together: in 19 of 20 ablations none is wrong."
        if len(self.seeds) == 1:
            text += " There is one seed: with another one the arms may lie otherwise, and no interval says how much."
        return text

    def claimed(self, comparison: Comparison) -> str:
        """The paper's difference between two arms, on the same score if it has it, else in its average, or nothing."""
        one, other = (next(row.published for row in self.rows if row.arm == arm) for arm in comparison.arms)
        name = next((name for name in (comparison.score, "avg") if name in one and name in other), None)
        return "" if name is None else f"{one[name] - other[name]:+.1f} ({name})"
