"""Where the points, bars and grid lines of the pages' charts go, in SVG units or percent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from training.release.table import Row

WIDTH, HEIGHT = 520.0, 220.0  # of a chart of losses
LEFT, BELOW = 44.0, 26.0  # room for the labels of its axes
ARM, PLOT_LEFT, PLOT_RIGHT = 30, 112.0, WIDTH - 60  # of scores: an arm's height, where its name ends, and its axis

Series = tuple[Sequence[float], Sequence[float]]  # steps and losses


class Tick(NamedTuple):
    """A grid line and its label."""

    at: float
    label: str | int


class Line(NamedTuple):
    """A curve, as SVG's `x,y x,y ...`: as it was measured, and smoothed."""

    name: str
    raw: str
    smooth: str


class LossChart(NamedTuple):
    """Losses over steps."""

    lines: list[Line]
    held_out: str  # a curve as it was measured, "" if there is none
    ticks: list[Tick]
    first_step: int
    last_step: int
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT


def loss_chart(series: Mapping[str, Series], held_out: Series = ((), ())) -> LossChart:
    """A curve for each of `series`; the scale fits what is shown: several curves are shown smoothed only.

    `held_out` is shown as it was measured: each of its points is a mean over many examples.
    """
    steps = [step for each, _ in series.values() for step in each]
    first, last = min(steps), max(steps)
    # A run that diverged has losses that are no numbers: they have no place on a page.
    series, held_out = {name: _finite(*each) for name, each in series.items()}, _finite(*held_out)
    smoothed = {name: _smoothed(losses) for name, (_, losses) in series.items()}
    heights = [*(smoothed.values() if len(series) > 1 else [losses for _, losses in series.values()]), held_out[1]]
    top = max((max(losses, default=0.0) for losses in heights), default=0.0) * 1.05 or 1.0
    # SVG's y grows downwards: loss 0 lies at `floor`, `top` at 0.
    across, floor = (WIDTH - LEFT - 8) / max(1, last - first), HEIGHT - BELOW

    def points(each: Sequence[float], losses: Sequence[float]) -> str:
        return " ".join(
            f"{LEFT + across * (step - first):.1f},{floor * (1 - loss / top):.1f}"
            for step, loss in zip(each, losses, strict=True)
        )

    return LossChart(
        [Line(name, points(each, losses), points(each, smoothed[name])) for name, (each, losses) in series.items()],
        points(*held_out),
        [Tick(floor * (1 - i / 4), f"{top * i / 4:.2f}") for i in range(5)],
        int(first),
        int(last),
    )


def _finite(steps: Sequence[float], losses: Sequence[float]) -> Series:
    """The steps whose loss is a number, and those losses."""
    kept = [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    return [step for step, _ in kept], [loss for _, loss in kept]


def _smoothed(values: Sequence[float]) -> list[float]:
    """An exponential moving average; each value counts a tenth."""
    average, result = values[0] if values else 0.0, []
    for value in values:
        average = 0.9 * average + 0.1 * value
        result.append(average)
    return result


class Mark(NamedTuple):
    """One arm's score: a dot, its interval, and a stroke for each seed."""

    arm: str
    y: int
    x: float
    low: float
    high: float
    seeds: list[float]
    label: str
    colour: int


class ScorePlot(NamedTuple):
    """The scores of all arms on one benchmark, one below the other."""

    name: str
    units: int
    height: int
    marks: list[Mark]
    ticks: list[Tick]
    width: float = WIDTH


def score_plot(rows: Sequence[Row], name: str) -> ScorePlot:
    """One score of every arm; the axis goes from one round number to another, around all that is shown."""
    scores = [row.scores[name] for row in rows]
    values = [value for score in scores for value in (*(score.interval or ()), *score.by_seed) if value is not None]
    low, high = min(values), max(values)
    # The finest round step of which at most six fit.
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if (high - low) / step <= 6)
    first, last = int(low // step) * step, -int(-high // step) * step  # rounded down, and up

    def x(value: float) -> float:
        return round(PLOT_LEFT + (PLOT_RIGHT - PLOT_LEFT) * (value - first) / max(step, last - first), 1)

    marks = [
        Mark(
            arm=row.arm,
            y=22 + ARM * number,
            x=x(score.score),
            low=x(score.interval[0]),
            high=x(score.interval[1]),
            seeds=[x(value) for value in score.by_seed if value is not None],
            label=f"{score.score:.1f}",
            colour=number,
        )
        for number, (row, score) in enumerate(zip(rows, scores, strict=True))
        if score.score is not None and score.interval is not None
    ]
    ticks = [Tick(x(value), value) for value in range(first, last + 1, step)]
    return ScorePlot(name, scores[0].units, 40 + ARM * len(rows), marks, ticks)


class Bar(NamedTuple):
    """A bar of one or several parts, as percent of the longest bar."""

    name: str
    seconds: float
    percent: list[float]


def bars(seconds: Mapping[str, Sequence[float]]) -> list[Bar]:
    """A bar for each name, made of parts in seconds."""
    longest = max((sum(parts) for parts in seconds.values()), default=0.0) or 1.0
    return [Bar(name, sum(parts), [100 * part / longest for part in parts]) for name, parts in seconds.items()]
