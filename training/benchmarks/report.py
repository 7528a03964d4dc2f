"""What is said of a file of answers: its scores with intervals and counts, and what was wrong with it."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from training.benchmarks.metrics import PairReport, ScoreReport


class Problem(TypedDict):
    """How often something was wrong with predictions, and where it was first."""

    count: int
    first: list[str]


class Comparison(TypedDict):
    """Paired differences to other predictions, by the name of the score, and what was wrong with those."""

    differences: dict[str, PairReport]
    problems: dict[str, Problem]
    predictions: NotRequired[str]


class Report(TypedDict):
    """What is reported of one benchmark.

    Attributes:
        headline: name of the first score; `score` (in percent, or MME's points) and `interval` are its.
        answered: how many questions have an answer; the others count as wrong.
        scores: every score by its name.
        notes: what a person should know of the answers beside their problems.
        model, predictions: whose answers, in which file. against: other answers.
    """

    benchmark: str
    split: str
    questions: int
    answered: int
    headline: str
    score: float | None
    interval: tuple[float, float] | None
    scores: dict[str, ScoreReport]
    problems: dict[str, Problem]
    notes: list[str]
    model: NotRequired[str | None]
    predictions: NotRequired[str]
    against: NotRequired[Comparison]


def describe(report: Report) -> str:
    """A report for a person."""
    answered = f"{report['answered']} of {report['questions']} questions answered"
    share = share_of(report["answered"], report["questions"])
    lines = [f"{report['benchmark']} {report['split']}: {answered}{', the rest counts as wrong' if share else ''}"]
    for name, score in report["scores"].items():
        if score["score"] is None or score["interval"] is None:
            lines.append(f"  {name:<22} -       truth not in the official files; see the file for the server")
            continue
        low, high = score["interval"]
        lines.append(
            f"  {name:<22} {score['score']:7.2f}  [{low:.2f}, {high:.2f}]  n={score['units']}{share}  {score['what']}"
        )
    for name, pair in report["against"]["differences"].items() if "against" in report else ():
        if pair["difference"] is not None and pair["interval"] is not None:
            low, high = pair["interval"]
            differ = f"{pair['units_that_differ']} of {pair['units']} differ"
            lines.append(
                f"  {name:<22} {pair['difference']:+7.2f}  [{low:+.2f}, {high:+.2f}]  against the other, {differ}"
            )
    for kind, problem in report["problems"].items():
        if problem["count"]:
            lines.append(f"  {kind}: {problem['count']}, first {'; '.join(problem['first'])}")
    lines += [f"  note: {note}" for note in report["notes"]]
    return "\n".join(lines)


def share_of(answered: int, questions: int) -> str:
    """Beside the score of an incomplete file: how much of it was answered; nothing for a whole one."""
    return f", {100 * answered / questions:.1f}% answered" if answered < questions else ""
