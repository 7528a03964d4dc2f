"""The page of an ablation: scores, table, the paper's rows, curves, what the store saved, and examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median_high
from typing import Any

from training.answers.answer_file import AnswerFile
from training.benchmarks.own import is_right
from training.pages.charts import Bar, bars, loss_chart, score_plot
from training.pages.page import EXAMPLES, TITLES, filled, shown, spread, stage_log
from training.release.table import GUESSING, LUCK, EncodingCost, Row, Table


def ablation_page(folder: Path, images: Path | None, examples: int = EXAMPLES) -> str:
    """The page as HTML, from table.json in `folder` and from logs and answers of the runs that it names.

    Args:
        folder: of the ablation.
        images: the folder that the images of your own questions are relative to; None shows no examples.
        examples: questions to show.
    """
    table = Table.read(folder)
    rows, names = table.rows, table.scored
    scale, unit = table.flops_unit
    parts = {
        "title": table.title,
        "table": table,
        "guessing": GUESSING,
        "luck": LUCK,
        "figures": _figures(table),
        "plots": [score_plot(rows, name) for name in names if all(row.scores[name].interval for row in rows)],
        "names": names,
        "best": {name: max(row.scores[name].score or 0.0 for row in rows) for name in names},
        "published": list(dict.fromkeys(name for row in rows for name in row.published)),
        "charts": [_curves(folder, rows, stage) for stage in TITLES],
        "seconds": _seconds(table.encoding),
        "examples": [] if images is None else _examples(folder, rows, images, examples),
        "scale": scale,
        "unit": unit,
    }
    return filled("ablation.html", parts)


def _figures(table: Table) -> list[dict[str, str]]:
    """The few numbers at the top."""
    rows, runs = table.rows, len(table.rows) * len(table.seeds)
    fewest = min(row.tokens for row in rows)
    figures = [{"value": f"{fewest} of {table.patches}", "label": "vision tokens in the smallest arm"}]
    for name in table.scored[:1]:  # none where the official files tell no truth
        best = max(rows, key=lambda row: row.scores[name].score or 0.0)
        figures.insert(0, {"value": f"{best.scores[name].score:.1f}", "label": f"{name}, the best arm: {best.arm}"})
    if table.encoding is not None:
        label = "the time, if every run encoded the images again once"
        figures.append({"value": f"{table.encoding.ratio:.2f} x", "label": label})
    minutes = sum(row.seconds_train + row.seconds_answer for row in rows) * len(table.seeds) / 60
    return [*figures, {"value": f"{minutes:.0f} min", "label": f"training and answering, {runs} runs"}]


def _curves(folder: Path, rows: Sequence[Row], stage: str) -> dict[str, Any]:
    """The losses of every arm, with its first seed."""
    logs = {row.arm: stage_log(folder / row.runs[0] / stage) for row in rows}
    series = {arm: ([line["step"] for line in log], [line["loss"] for line in log]) for arm, log in logs.items()}
    speed = median_high(line["samples_per_s"] for log in logs.values() for line in log)
    return {"title": TITLES[stage], "samples_per_s": speed, "chart": loss_chart(series)}


def _seconds(cost: EncodingCost | None) -> list[Bar]:
    """Training and encoding, with a store and without."""
    if cost is None:
        return []
    return bars(
        {
            "encoded once, kept": [cost.train, cost.once],
            "encoded again for every run": [cost.train, cost.again],
        }
    )


def _examples(folder: Path, rows: Sequence[Row], images: Path, count: int) -> list[dict[str, Any]]:
    """A spread of the questions with every arm's answer (first seed), those first on which the arms differ."""
    files = {row.arm: folder / row.runs[0] / "answers.jsonl" for row in rows}
    if not all(path.exists() for path in files.values()):
        return []  # official benchmarks were asked
    said = {arm: AnswerFile(path).answers() for arm, path in files.items()}
    first, *others = said.values()
    shared = [key for key in first if all(key in of for of in others)]
    mixed = [key for key in shared if 0 < sum(is_right(of[key]) for of in said.values()) < len(rows)] or shared
    return [
        {
            **shown(first[key], images),
            "answers": [{"arm": arm, "text": of[key]["text"], "right": is_right(of[key])} for arm, of in said.items()],
        }
        for key in spread(mixed, count)
    ]
