"""Benchmarks: what is asked, from which files, and how answers are scored; LLaVA-1.5's rules for those of the paper.

A new one is a file with a `Benchmark` (see questions.py), and its line in `BENCHMARKS`. `predictions` reads files of
answers, `metrics` scores them, `scores` writes the `report`. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from inspect import isabstract
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

from pipeline.config import meant
from training.benchmarks.own import OwnQuestions
from training.benchmarks.questions import Benchmark

BENCHMARKS = {  # name -> "file:class": first those of the paper, in the order of its tables
    "gqa": "training.benchmarks.open_ended:GQA",
    "scienceqa": "training.benchmarks.multiple_choice:ScienceQA",
    "textvqa": "training.benchmarks.open_ended:TextVQA",
    "pope": "training.benchmarks.yes_no:POPE",
    "mmbench": "training.benchmarks.multiple_choice:MMBench",
    "mmbench-cn": "training.benchmarks.multiple_choice:MMBenchCN",
    "vqav2": "training.benchmarks.open_ended:VQAv2",
    "vizwiz": "training.benchmarks.open_ended:VizWiz",
    "mme": "training.benchmarks.yes_no:MME",
    "own": "training.benchmarks.own:OwnQuestions",
}
AVERAGED = ("gqa", "scienceqa", "textvqa", "pope", "mmbench", "mmbench-cn", "vqav2", "vizwiz")  # the paper's eight


class Average(NamedTuple):
    """The mean of headline scores, None where some are `missing`."""

    score: float | None
    missing: tuple[str, ...]


def paper_average(scores: Mapping[str, float | None], without: str | None = None) -> Average:
    """The paper's average of its eight benchmarks, or of seven, `without` one of them.

    Args:
        scores: headline scores by the benchmark's name; None is no score.
    """
    values = {name: scores.get(name) for name in AVERAGED if name != without}
    known = [value for value in values.values() if value is not None]
    if len(known) < len(values):
        return Average(None, tuple(name for name, value in values.items() if value is None))
    return Average(sum(known) / len(known), ())


def benchmark_class(name: str) -> type[Benchmark]:
    """The class of a benchmark.

    Raises:
        ValueError: if it is not where `BENCHMARKS` says, lacks a method or a class variable, or has another name.
    """
    place = BENCHMARKS[name]
    try:
        found: type[Benchmark] = resolve_name(place)
    except Exception as error:  # whatever a file that is just being written raises
        raise ValueError(
            f"BENCHMARKS in training/benchmarks/__init__.py names {place!r}: {type(error).__name__} {error}; correct "
            "that line, or that file"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Benchmark)):
        raise ValueError(f"{place} is no Benchmark; name a class of that file that derives from it")
    if isabstract(found):
        raise ValueError(f"{place} lacks {', '.join(sorted(found.__abstractmethods__))}; write it there")
    absent = [attribute for attribute in ("name", "folders", "splits") if not hasattr(found, attribute)]
    if absent:
        raise ValueError(f"{place} lacks {', '.join(absent)}; write it there")
    if found.name != name:
        raise ValueError(
            f"BENCHMARKS in training/benchmarks/__init__.py calls {place} {name!r}, it calls itself {found.name!r}; "
            "correct one"
        )
    return found


def open_benchmark(name: str, folder: Path, split: str | None = None) -> Benchmark:
    """The benchmark called `name` (any case, `-` as `_`), from `folder` or the folder of its name in it.

    Raises:
        ValueError: if there is no such benchmark or split, or naming every missing file and where to download it.
    """
    key = name.lower().replace("_", "-")
    if key not in BENCHMARKS:
        raise ValueError(f"benchmark {name!r} is unknown; {meant(key, BENCHMARKS)}")
    return benchmark_class(key)(folder, split)


class Source(NamedTuple):
    """Where questions come from: benchmarks by `names` in the folder `data`, or a file of your own `questions`.

    Attributes:
        data: has the official files of the benchmarks, in a folder for each, or those of one.
        split: of each benchmark; None for its first.
        images: the folder that the images of your own questions are relative to.
        limit: how many questions of each, the first ones; None for all.
    """

    names: Sequence[str] = ()
    data: Path | None = None
    split: str | None = None
    questions: Path | None = None
    images: Path | None = None
    limit: int | None = None

    def open(self) -> Iterator[Benchmark]:
        """Each in turn; one is read when it is asked for, since the files of some are large.

        Raises:
            ValueError: as `open_benchmark` does.
        """
        if self.questions is not None:
            yield OwnQuestions(self.questions, images=self.images).keep(self.limit)
        for name in self.names:
            if self.data is None:
                raise ValueError(f"benchmark {name!r} needs data; give the folder of its official files")
            yield open_benchmark(name, self.data, self.split).keep(self.limit)
