"""From a file of answers to a file of scores, and from files of scores to the paper's average."""

from __future__ import annotations

import json
from pathlib import Path

from training.benchmarks import BENCHMARKS, benchmark_class, paper_average
from training.benchmarks.metrics import Scored
from training.benchmarks.predictions import Predictions, read_predictions
from training.benchmarks.questions import Benchmark, read_json
from training.benchmarks.report import Comparison, Report, share_of


def score_file(
    benchmark: Benchmark, said: Path, model: str | None = None, against: Path | None = None, out: Path | None = None
) -> Report:
    """Score the predictions in `said`; with `out`, write files of scores beside it.

    Args:
        model: who gave them, for the report.
        against: other predictions, compared with these in pairs.
        out: file of answers; beside it come the scores, and in `server/` what the benchmark's server takes.

    Raises:
        ValueError: if nothing in the predictions belongs to the benchmark.
    """
    predictions = read_predictions(said, benchmark)
    report = report_on(benchmark, predictions)
    report |= {"model": model, "predictions": str(said)}
    if against is not None:
        report["against"] = compare(benchmark, predictions, read_predictions(against, benchmark))
        report["against"]["predictions"] = str(against)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = benchmark.server_file(predictions.answers)
        if made is not None:
            name, data = made
            (out.parent / "server").mkdir(exist_ok=True)
            (out.parent / "server" / name).write_bytes(data)
        text = json.dumps(benchmark.as_json(report), indent=1, ensure_ascii=False)
        scores_beside(out).write_text(text, encoding="utf-8")
    return report


def scores_beside(answers: Path) -> Path:
    """Where the scores of a file of answers are: `gqa.scores.json` beside `gqa.jsonl`, each file its own."""
    return answers.with_name(f"{answers.name.removesuffix('.jsonl')}.scores.json")


def report_on(benchmark: Benchmark, predictions: Predictions) -> Report:
    """Scores with counts and intervals, and what was wrong with the predictions."""
    scores = {name: scored.report() for name, scored in _scored(benchmark, predictions).items()}
    headline = next(iter(scores))
    return {
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "questions": len(benchmark.questions),
        "answered": len(predictions.answers),
        "headline": headline,
        "score": scores[headline]["score"],
        "interval": scores[headline]["interval"],
        "scores": scores,
        "problems": predictions.problems(),
        "notes": predictions.notes,
    }


def _scored(benchmark: Benchmark, predictions: Predictions) -> dict[str, Scored]:
    """Every score, the headline first."""
    return benchmark.score(predictions.answers) | benchmark.score_rows(predictions.rows)


def compare(benchmark: Benchmark, mine: Predictions, theirs: Predictions) -> Comparison:
    """Paired differences of every score, and what was wrong with the other predictions."""
    others = _scored(benchmark, theirs)
    mine_scored = _scored(benchmark, mine)
    return {
        "differences": {name: scored.against(others[name]) for name, scored in mine_scored.items() if name in others},
        "problems": theirs.problems(),
    }


def averages(folder: Path) -> str:
    """The headline scores in a folder, and their mean over the paper's eight benchmarks, with and without VizWiz.

    Raises:
        ValueError: if it holds no scores.
    """
    rows: list[str] = []
    broken: list[str] = []  # what is said of a benchmark that cannot be used: it stops no other
    values: dict[str, float | None] = {}
    for name in BENCHMARKS:
        try:
            kind = benchmark_class(name)
        except ValueError as error:
            broken.append(f"{name:<12} is not looked at: {error}")
            continue
        path = scores_beside(kind.answers_in(folder))
        if path.exists():
            scores = read_json(path)
            try:
                headline, score = kind.headline(scores)
                share = share_of(scores.get("answered", 0), scores.get("questions", 0))
                rows.append(f"{name:<12} {headline:<12} {'-' if score is None else f'{score:.2f}':>8}{share}")
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{path} holds no scores of {name}: {error!r}; delete it and score again") from error
            values[name] = score
    if not rows:
        raise ValueError(
            f"{folder} holds no <benchmark>.scores.json; let training/evaluate.py --out {folder} write them, or name "
            "another folder" + "".join(f"\n{line}" for line in broken)
        )
    for title, without in (("average", None), ("... without VizWiz", "vizwiz")):
        mean = paper_average(values, without)
        value = ", ".join(mean.missing) + " missing" if mean.score is None else f"{mean.score:8.2f}"
        rows.append(f"{title:<25} {value}")
    return "\n".join(rows + broken)
