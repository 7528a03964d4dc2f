"""What an ablation's file says, and the runs that follow from it: one for each arm and seed. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field, model_validator

from pipeline.config import ConfigError, Given, Settings, load_config, meant
from pipeline.manifest import read_store
from pipeline.schema import StoreSpec
from pipeline.storage import Storage
from training.benchmarks import Source
from training.benchmarks.questions import Benchmark
from training.config import Seed, TrainConfig
from training.model.reducers import connector_config
from training.release.records import read_as

Stage = Literal["pretrain", "finetune"]
STAGES: tuple[Stage, ...] = ("pretrain", "finetune")


class StageSettings(Settings):
    """One stage of every arm: a YAML file of training/train.py, and what is different from it."""

    config: str
    settings: dict[str, Any] = Field(default={}, description="nested as in the YAML file")


class Arm(Settings):
    """One row of the table."""

    name: str = Field(min_length=1)
    connector: dict[str, Any] = Field(description="what differs from the stages' model.connector")
    against: tuple[str, ...] = Field(default=(), description="arms it is compared with, beside the first one")
    published: dict[str, float] = Field(default={}, description="the paper's row: tflops, avg, and benchmarks by name")


class Encoding(Settings):
    """What encoding the images again for every arm would cost; measured where this is given."""

    encoder: str
    data: tuple[str, ...] = Field(description="LLaVA JSON files; each image in them is encoded once per arm")
    images: str
    batch_size: int = Field(default=32, gt=0)


class AblationConfig(Settings):
    """An ablation: arms x seeds."""

    title: str
    run: str
    seeds: tuple[Seed, ...] = Field(default=(0, 1), min_length=1)
    pretrain: StageSettings
    finetune: StageSettings
    arms: tuple[Arm, ...] = Field(min_length=1)
    benchmarks: tuple[str, ...] = Field(default=(), description="names as for training/evaluate.py")
    data: str | None = Field(default=None, description="folder of the benchmarks' official files")
    limit: int | None = Field(default=None, gt=0, description="only the first N questions of each benchmark")
    questions: str | None = Field(default=None, description="JSON lines of your own, instead of benchmarks")
    images: str | None = Field(default=None, description="the folder that their images are relative to")
    batch_size: int = Field(default=16, gt=0, description="questions answered at once")
    max_new_tokens: int | None = Field(default=None, gt=0)
    encoding: Encoding | None = None

    @model_validator(mode="after")
    def _consistent(self) -> AblationConfig:
        """One kind of questions with its folder, and a folder for each arm."""
        if bool(self.benchmarks) is bool(self.questions):
            raise ValueError("give either benchmarks (and data) or questions (and images)")
        if self.benchmarks and self.data is None:
            raise ValueError(f"benchmarks {', '.join(self.benchmarks)}: add data, the folder of their official files")
        if self.questions and self.images is None:
            raise ValueError(f"questions {self.questions}: add images, the folder that their images are relative to")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)}: one is there twice; take each once")
        slugs = [slug(arm.name) for arm in self.arms]
        twice = sorted({name for name in slugs if slugs.count(name) > 1})
        if twice:
            raise ValueError(f"several arms would have the folder {', '.join(twice)}; give them other names")
        for arm in self.arms:
            others = [other.name for other in self.arms if other is not arm]
            if wrong := [name for name in arm.against if name not in others]:
                raise ValueError(f"arm {arm.name!r}, against {wrong[0]!r}: no other arm; {meant(wrong[0], others)}")
        return self

    def pairs(self) -> list[tuple[int, int]]:
        """Numbers of the arms that are compared: each with the first one, and those of `against`; each pair once."""
        number = {arm.name: n for n, arm in enumerate(self.arms)}
        wanted = [(n, number[name]) for n, arm in enumerate(self.arms) for name in arm.against]
        wanted += [(n, 0) for n in range(1, len(self.arms))]
        once: dict[frozenset[int], tuple[int, int]] = {}
        for pair in wanted:
            once.setdefault(frozenset(pair), pair)
        return list(once.values())


DONE = "done.json"  # in the folder of a run


class Done(BaseModel):
    """What `done.json` holds: how long a run has taken, in seconds, and what it was asked."""

    train: float = Field(gt=0)  # the steps of both stages
    answer: float
    asked: str | None = None  # see `asked`; None in files of an older version


class Run(NamedTuple):
    """One arm with one seed: the settings of both its stages, and the folder that they go to."""

    arm: Arm
    seed: int
    folder: Path
    stages: dict[Stage, TrainConfig]

    def done(self) -> Done | None:
        """What the file says that is there when the run is trained and has answered; None if it is not.

        Raises:
            ValueError: if it is damaged.
        """
        return read_as(Done, self.folder / DONE) if (self.folder / DONE).is_file() else None

    def has_answered(self, asked: str) -> bool:
        """Whether it is trained and has answered what is asked now."""
        done = self.done()
        return done is not None and done.asked == asked


def plan_runs(config: AblationConfig) -> list[Run]:
    """Every arm with every seed; all arms with one seed before any with the next.

    Raises:
        ConfigError: with every problem found in the settings of a stage.
    """
    plan = []
    for seed in config.seeds:
        for arm in config.arms:
            folder = Path(config.run) / slug(arm.name) / f"seed{seed}"
            plan.append(Run(arm, seed, folder, {stage: _stage(config, arm, folder, seed, stage) for stage in STAGES}))
    return plan


def open_benchmarks(config: AblationConfig) -> list[Benchmark]:
    """All that the arms are asked at the end.

    Raises:
        ValueError: naming what is missing among files and images.
    """
    data, questions, images = (
        None if path is None else Path(path) for path in (config.data, config.questions, config.images)
    )
    source = Source(config.benchmarks, data=data, questions=questions, images=images, limit=config.limit)
    return list(source.open())


def asked(config: AblationConfig, benchmarks: Sequence[Benchmark]) -> str:
    """A digest of everything that the arms are asked."""
    digest = hashlib.sha256(str(config.max_new_tokens).encode())
    for benchmark in benchmarks:
        for question in benchmark.questions:
            digest.update(json.dumps([benchmark.name, question.id, question.text, question.image]).encode())
    return digest.hexdigest()


def check_stores(plan: Sequence[Run]) -> None:
    """Look for the columns that every arm reads, before the first one is trained.

    Raises:
        ValueError: if a store is not there, or lacks a column.
    """
    stores: dict[str, StoreSpec] = {}
    for run in plan:
        for stage, config in run.stages.items():
            for name in (entry.store for entry in config.data.mixture):
                store = stores[name] = stores.get(name) or read_store(Storage(name))
                wanted = connector_config(config.model.connector.model_dump(), grid=store.encoder.grid).columns
                missing = sorted(set(wanted) - {column.name for column in store.columns})
                if missing:
                    raise ValueError(
                        f"arm {run.arm.name!r}, {stage}: store {name} lacks {', '.join(missing)}; choose other blocks "
                        "for the arm, or build the store with them"
                    )


def slug(name: str) -> str:
    """A name for a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _stage(config: AblationConfig, arm: Arm, folder: Path, seed: int, stage: Stage) -> TrainConfig:
    """What training/train.py is given: the stage's file, the ablation's settings, the arm's connector, the seed."""
    base: StageSettings = getattr(config, stage)
    model: dict[str, Any] = {"connector": arm.connector}
    if stage == "finetune":
        model["connector_from"] = str(folder / "pretrain" / "connector")
    own = {"run": str(folder / stage), "seed": seed, "data": {"seed": seed}, "model": model}
    parts = [Given(f"the ablation's {stage}.settings", base.settings), Given(f"arm {arm.name!r}", own)]
    try:
        return load_config(TrainConfig, base.config, parts)
    except ConfigError as error:
        raise ConfigError(f"arm {arm.name!r}, {stage}: {error}") from error


def part_of(plan: Sequence[Run], text: str | None) -> list[Run]:
    """Every N-th run from the I-th on for `text` "I/N", all of them for None.

    Raises:
        ValueError: if it is not of that form.
    """
    if text is None:
        return list(plan)
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--part {text!r} is not I/N with I below N; say for example 0/8")
    return list(plan[int(found[1]) :: int(found[2])])
