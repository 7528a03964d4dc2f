#!/usr/bin/env python
"""Train every arm of an ablation from the same stores, on the same data in the same order, and write one table.

    python training/ablate.py training/ablations/table3.yaml key=value ...      on one device
    composer training/ablate.py training/ablations/table3.yaml key=value ...    on all GPUs of this machine
    ray job submit --working-dir . -- training/ablate.py training/ablations/table3.yaml run=/shared/table3 --ray

Arms read only their own columns of the stores. Arms and seeds run one after another, with --ray as many at once as the
cluster has groups of GPUs; running the same command again goes on where it stopped. `--part 3/8` does the fourth eighth
of them, for a cluster without Ray; the last part writes the table.
The run folder gets <arm>/seed<n>/{pretrain,finetune,...}, table.json, table.md and report.html.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

from pydantic import Field, model_validator

from pipeline.config import ConfigError, Settings, load_config
from training.config import TrainConfig

if TYPE_CHECKING:
    from training.benchmarks.questions import Benchmark

Stage = Literal["pretrain", "finetune"]
STAGES: tuple[Stage, ...] = ("pretrain", "finetune")
EXAMPLES = 12  # questions shown in the report


class StageSettings(Settings):
    """One stage of every arm: a YAML file of training/train.py, and what is different from it."""

    config: str
    settings: dict[str, Any] = Field(default={}, description="nested as in the YAML file")


class Arm(Settings):
    """One row of the table."""

    name: str = Field(min_length=1)
    connector: dict[str, Any] = Field(description="what differs from the stages' model.connector")
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
    seeds: tuple[int, ...] = Field(default=(0, 1), min_length=1)
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
        if bool(self.benchmarks) is bool(self.questions):
            raise ValueError("give either benchmarks (and data) or questions (and images)")
        if self.benchmarks and self.data is None:
            raise ValueError("benchmarks need data, the folder of their official files")
        if self.questions and self.images is None:
            raise ValueError("questions need images, the folder that their images are relative to")
        slugs = [slug(arm.name) for arm in self.arms]
        if len(set(slugs)) != len(slugs):
            raise ValueError(f"two arms have one name: {', '.join(sorted(slugs))}")
        return self


class Run(NamedTuple):
    """One arm with one seed."""

    arm: Arm
    seed: int
    folder: Path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, e.g. training/ablations/table3.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. run=runs/mine seeds=[0,1,2]")
    parser.add_argument("--part", metavar="I/N", help="only the I-th of N parts of the runs, counted from 0")
    parser.add_argument("--ray", action="store_true", help="on a Ray cluster, or on one started on this machine")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="of each run, with --ray (default: 1 where there are any)"
    )
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(AblationConfig, arguments.config, arguments.settings)
        plan = list(runs(config))
        stages = {(run.folder, stage): stage_config(config, run, stage) for run in plan for stage in STAGES}
        mine = plan[_part(arguments.part)]
        if arguments.ray:
            from training.sweep.on_ray import on_ray

            failed = on_ray([arguments.config, *arguments.settings], plan, arguments.gpus)
            if failed:
                sys.exit(f"error: {len(failed)} of {len(plan)} runs failed: {', '.join(str(r.folder) for r in failed)}")
            mine = []
    except (ConfigError, ValueError) as error:
        sys.exit(f"error: {error}")
    ablate(config, plan, mine, stages)


def _part(text: str | None) -> slice:
    if text is None:
        return slice(None)
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--part {text!r} is not I/N with I below N, e.g. 0/8")
    return slice(int(found[1]), None, int(found[2]))


def slug(name: str) -> str:
    """A name for a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def runs(config: AblationConfig) -> Iterator[Run]:
    """Every arm with every seed; all arms with one seed before any with the next."""
    for seed in config.seeds:
        for arm in config.arms:
            yield Run(arm, seed, Path(config.run) / slug(arm.name) / f"seed{seed}")


def stage_config(config: AblationConfig, run: Run, stage: Stage) -> TrainConfig:
    """What training/train.py is given: the stage's file, the ablation's settings, the arm's connector, the seed.

    Raises:
        ConfigError: with every problem found.
    """
    base: StageSettings = getattr(config, stage)
    settings = [*_dotted(base.settings), *_dotted(run.arm.connector, "model.connector.")]
    settings += [f"run={run.folder / stage}", f"seed={run.seed}", f"data.seed={run.seed}"]
    if stage == "finetune":
        settings.append(f"model.connector_from={run.folder / 'pretrain' / 'connector'}")
    return load_config(TrainConfig, base.config, settings)


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(value)}"


def ablate(
    config: AblationConfig, plan: list[Run], mine: list[Run], stages: Mapping[tuple[Path, Stage], TrainConfig]
) -> None:
    """Train and evaluate what is not done yet; the table is written when every run is."""
    from composer.utils import dist

    first = stages[plan[0].folder, "pretrain"]
    for number, run in enumerate(mine, 1):
        if not (run.folder / "done.json").exists():
            if dist.get_global_rank() == 0:
                print(f"run {number} of {len(mine)}: {run.arm.name}, seed {run.seed}", flush=True)
            one_run(config, run, stages)
    if dist.get_global_rank() != 0:
        return
    if config.encoding is not None:
        measure_encoding(config, first)
    waiting = [run for run in plan if not (run.folder / "done.json").exists()]
    if waiting:
        print(f"{len(waiting)} of {len(plan)} runs are not done yet: {', '.join(str(r.folder) for r in waiting)}")
        return
    from training.report import ablation_page
    from training.sweep.table import as_text, build_table

    table = build_table(config, plan)
    folder = Path(config.run)
    (folder / "table.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    (folder / "table.md").write_text(as_text(table), encoding="utf-8")
    images = None if config.images is None else Path(config.images)
    (folder / "report.html").write_text(ablation_page(folder, images, EXAMPLES), encoding="utf-8")
    print(as_text(table) + f"\n{folder / 'report.html'}")


def one_run(config: AblationConfig, run: Run, stages: Mapping[tuple[Path, Stage], TrainConfig]) -> None:
    """Both stages and the answers of one arm and seed; `done.json` says that they are complete."""
    import gc

    import torch
    from composer.utils import dist

    from training.fit.stage import train

    start = time.perf_counter()
    for stage in STAGES:
        if not (run.folder / stage / "summary.json").exists():
            train(stages[run.folder, stage])
            gc.collect()
            torch.cuda.empty_cache()
    trained = time.perf_counter()
    answer(config, run)
    if dist.get_global_rank() == 0:
        seconds = {"train": trained - start, "answer": time.perf_counter() - trained}
        (run.folder / "done.json").write_text(json.dumps(seconds), encoding="utf-8")


def answer(config: AblationConfig, run: Run) -> None:
    """The trained model's answers to every question."""
    from training.answers.answer import answer_all

    model = str(run.folder / "finetune" / "model")
    for benchmark in open_all(config):
        out = benchmark.answers_in(run.folder)
        answer_all(model, benchmark, out, config.batch_size, config.max_new_tokens)


def open_all(config: AblationConfig) -> Iterator[Benchmark]:
    """The benchmarks of the ablation."""
    from training.benchmarks import Source

    data, questions, images = (
        None if name is None else Path(name) for name in (config.data, config.questions, config.images)
    )
    yield from Source(config.benchmarks, data, None, questions, images, config.limit).open()


def measure_encoding(config: AblationConfig, stage: TrainConfig) -> None:
    """Seconds of one pass of every image through CLIP: with all columns, as a store, and with those of each arm."""
    from pipeline.encoder import columns_of, describe_encoder
    from training.model.reducers import connector_config

    path = Path(config.run) / "encoding.json"
    if path.exists():
        return
    assert config.encoding is not None
    spec = describe_encoder(config.encoding.encoder, None)
    names = _image_names(config.encoding)
    shape = stage.model.connector.model_dump()
    needed = {
        arm.name: {
            int(column[-2:]) for column in connector_config(**{**shape, **arm.connector}, grid=spec.grid).columns
        }
        for arm in config.arms
    }
    seconds = {}
    for name, blocks in {"": set().union(*needed.values()), **needed}.items():
        seconds[name] = _encode_all(config.encoding, columns_of(spec, sorted(blocks), ()), names, spec.image_size)
        print(f"encoded {len(names)} images for {name or 'the stores'} in {seconds[name]:.1f} s", flush=True)
    once = seconds.pop("")
    path.write_text(json.dumps({"images": len(names), "once": once, "arms": seconds}), encoding="utf-8")


def _image_names(encoding: Encoding) -> list[str]:
    names: dict[str, None] = {}
    for path in encoding.data:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
        names |= {record["image"]: None for record in records if "image" in record}
    return list(names)


def _encode_all(encoding: Encoding, columns: Any, names: list[str], size: int) -> float:
    import torch

    from pipeline.encoder import Encoder, load_image

    device = "cuda" if torch.cuda.is_available() else "cpu"
    encode = Encoder(encoding.encoder, None, columns, "bfloat16" if device == "cuda" else "float32", device)
    start = time.perf_counter()
    for first in range(0, len(names), encoding.batch_size):
        batch = [Path(encoding.images, name).read_bytes() for name in names[first : first + encoding.batch_size]]
        pixels = [torch.from_numpy(encode.pixels(load_image(data), "pad")) for data in batch]
        for features in encode(torch.stack(pixels)).values():
            features.cpu()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
