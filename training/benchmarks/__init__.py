"""Benchmarks: what is asked, from which files, and how answers are scored; LLaVA-1.5's rules for those of the paper.

A new one is a file with a `Benchmark` (see questions.py), and its line in `BENCHMARKS`. `predictions` reads files of
answers, `metrics` scores them, `scores` writes the `report`. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

from pipeline.config import meant
from training.benchmarks.own import OwnQuestions
from training.benchmarks.questions import Benchmark

# The file and the class of each: first those of the paper, in the order of its tables.
BENCHMARKS: dict[str, type[Benchmark]] = {
    kind.name: kind
    for kind in map(
        resolve_name,
        (
            "training.benchmarks.open_ended:GQA",
            "training.benchmarks.multiple_choice:ScienceQA",
            "training.benchmarks.open_ended:TextVQA",
            "training.benchmarks.yes_no:POPE",
            "training.benchmarks.multiple_choice:MMBench",
            "training.benchmarks.multiple_choice:MMBenchCN",
            "training.benchmarks.open_ended:VQAv2",
            "training.benchmarks.open_ended:VizWiz",
            "training.benchmarks.yes_no:MME",
            "training.benchmarks.own:OwnQuestions",
        ),
    )
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


def open_benchmark(name: str, folder: Path, split: str | None = None) -> Benchmark:
    """The benchmark called `name` (any case, `-` as `_`), from `folder` or the folder of its name in it.

    Raises:
        ValueError: if there is no such benchmark or split, or naming every missing file and where to download it.
    """
    key = name.lower().replace("_", "-")
    if key not in BENCHMARKS:
        raise ValueError(f"benchmark {name!r} is unknown; {meant(key, BENCHMARKS)}")
    return BENCHMARKS[key](folder, split)


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
