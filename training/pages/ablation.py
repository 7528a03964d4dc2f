"""The page of an ablation: scores, table, the paper's rows, curves, what the store saved, and examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median_high
from typing import Any

from training.benchmarks.own import is_right
from training.benchmarks.questions import read_json_lines
from training.pages.charts import Bar, bars, loss_chart, score_plot
from training.pages.page import EXAMPLES, TITLES, filled, shown
from training.release.records import read_log
from training.release.table import EncodingCost, Row, Table


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
        "figures": _figures(table),
        "plots": [score_plot(rows, name) for name in names if rows[0].scores[name].interval is not None],
        "names": names,
        "best": {name: max(row.scores[name].score or 0.0 for row in rows) for name in names},
        "published": list(rows[0].published),
        "charts": [_curves(folder, rows, stage) for stage in TITLES],
        "seconds": _seconds(table.encoding),
        "examples": [] if images is None else _examples(folder, rows, images, examples),
        "scale": scale,
        "unit": unit,
    }
    return filled("ablation.html", parts)


def _figures(table: Table) -> list[dict[str, str]]:
    """The few numbers at the top."""
    rows, name, runs = table.rows, table.scored[0], len(table.rows) * len(table.seeds)
    best = max(rows, key=lambda row: row.scores[name].score or 0.0)
    fewest = min(row.tokens for row in rows)
    figures = [
        {"value": f"{best.scores[name].score:.1f}", "label": f"{name}, the best arm: {best.arm}"},
        {"value": f"{fewest} of {table.patches}", "label": "vision tokens in the smallest arm"},
    ]
    if table.encoding is not None:
        label = "the time, if every run encoded the images again once"
        figures.append({"value": f"{table.encoding.ratio:.2f} x", "label": label})
    minutes = sum(row.seconds_train + row.seconds_answer for row in rows) * len(table.seeds) / 60
    return [*figures, {"value": f"{minutes:.0f} min", "label": f"training and answering, {runs} runs"}]


def _curves(folder: Path, rows: Sequence[Row], stage: str) -> dict[str, Any]:
    """The losses of every arm, with its first seed."""
    logs = {row.arm: read_log(folder / row.runs[0] / stage) for row in rows}
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
    said = {arm: {a["question_id"]: a for a in read_json_lines(path)} for arm, path in files.items()}
    questions = list(next(iter(said.values())).values())
    right = {q["question_id"]: sum(is_right(of[q["question_id"]]) for of in said.values()) for q in questions}
    mixed = [q for q in questions if 0 < right[q["question_id"]] < len(rows)] or questions
    chosen = mixed[:: max(1, len(mixed) // count)][:count]
    return [
        {
            **shown(q, images),
            "answers": [
                {"arm": arm, "text": of[q["question_id"]]["text"], "right": is_right(of[q["question_id"]])}
                for arm, of in said.items()
            ],
        }
        for q in chosen
    ]
