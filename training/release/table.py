"""The table of an ablation, as `table.json` keeps it: one row per arm, and what all rows share."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from training.release.records import read_as, read_config, write_whole

FILE = "table.json"
Interval = tuple[float, float]  # 95%, its lower and upper bound


class _Part(BaseModel):
    """Read-only; keys that another version wrote are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Difference(_Part):
    """An arm's score minus the first arm's on the same questions; None where they have none in common."""

    difference: float | None
    interval: Interval | None


class Score(_Part):
    """A mean over seeds, 0 to 100; None where the truth is not known."""

    score: float | None
    interval: Interval | None = None
    units: int = 0  # questions
    by_seed: tuple[float | None, ...] = ()
    against_first: Difference | None = None

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
    stores: tuple[StoreUsed, ...]  # of stage 1 and stage 2
    text_tokens: int = 64  # of the prompt in `total_flops`
    last_steps: int = 20  # that the losses are means of

    @model_validator(mode="after")
    def _square(self) -> Table:
        """Every row has the scores of the first one."""
        first = self.rows[0]
        for row in self.rows:
            if row.scores.keys() != first.scores.keys():
                raise ValueError(f"{row.arm} has the scores {list(row.scores)}, {first.arm} has {list(first.scores)}")
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
