"""What the arms are asked at the end: benchmarks of the paper, or questions of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from training.benchmarks import open_benchmark
from training.benchmarks.metrics import Scored
from training.benchmarks.predictions import read_predictions
from training.benchmarks.questions import Benchmark, file_within, read_json_lines
from training.sweep.plan import AblationConfig

OWN_TOKENS = 128  # of an answer to a question of one's own, at most


class Questions(NamedTuple):
    """One column of the table: questions, and how their answers are scored."""

    name: str  # of the score
    file: str  # of the answers, in the folder of a run
    asked: list[dict[str, Any]]  # question_id, image and text of each
    image: Callable[[str], bytes]  # from an image's name to the bytes of its file
    max_new_tokens: int
    score: Callable[[Path], Scored]  # of a file of answers


def open_questions(config: AblationConfig) -> list[Questions]:
    """All that an ablation asks.

    Raises:
        ValueError: naming what is missing among files and images.
    """
    return [_own(config)] if config.questions is not None else list(_benchmarks(config))


def _own(config: AblationConfig) -> Questions:
    from training.evaluate import read_questions, scored

    assert config.questions is not None
    assert config.images is not None
    images = Path(config.images)
    return Questions(
        "accuracy",
        "answers.jsonl",
        read_questions(Path(config.questions), images)[: config.limit],
        lambda name: file_within(images, name).read_bytes(),
        config.max_new_tokens or OWN_TOKENS,
        lambda file: scored(read_json_lines(file)),
    )


def _benchmarks(config: AblationConfig) -> Iterator[Questions]:
    assert config.data is not None

    def score_with(benchmark: Benchmark) -> Callable[[Path], Scored]:
        # The first score is the headline; the table shows no other.
        return lambda file: next(iter(benchmark.score(read_predictions(file, benchmark).answers).values()))

    for name in config.benchmarks:
        benchmark = open_benchmark(name, Path(config.data))
        benchmark.keep(config.limit)
        yield Questions(
            benchmark.name,
            f"{benchmark.name}.jsonl",
            [{"question_id": q.id, "image": q.image, "text": q.text} for q in benchmark.questions],
            benchmark.image,
            config.max_new_tokens or benchmark.max_new_tokens,
            score_with(benchmark),
        )
