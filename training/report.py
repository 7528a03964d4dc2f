#!/usr/bin/env python
"""One self-contained HTML page of a run or an ablation: `python training/report.py runs/demo --images DIR`.

Reads files only: of a run its summary.json, logs and answers, of an ablation its table.json and what that names.
"""

from __future__ import annotations

import argparse
import base64
import importlib.metadata
import io
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

TEMPLATES = Path(__file__).resolve().parent / "pages"
WIDTH, HEIGHT, LEFT, BOTTOM = 520.0, 220.0, 44.0, 26.0  # of a chart, in SVG units


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run (summary.json) or of an ablation (table.json)")
    parser.add_argument("--images", type=Path, help="folder that the questions' images are relative to")
    parser.add_argument("--examples", type=int, default=12, help="questions to show")
    arguments = parser.parse_args()
    if (arguments.run / "table.json").exists():
        page = ablation_page(arguments.run, arguments.images, arguments.examples)
    elif not (arguments.run / "summary.json").exists():
        sys.exit(f"error: {arguments.run} holds no summary.json or table.json; run the demo, or name another folder")
    elif arguments.images is None:
        sys.exit("error: --images is needed: the folder that the questions' images are relative to")
    else:
        page = render(arguments.run, arguments.images, arguments.examples)
    (arguments.run / "report.html").write_text(page, encoding="utf-8")
    print(arguments.run / "report.html")


def _template(name: str) -> Any:
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    return Environment(loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape(["html"])).get_template(name)


def render(run: Path, images: Path, examples: int) -> str:
    """The page of a run, as one string of HTML that needs nothing beside itself."""
    from training.sweep.table import store_of

    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    page: str = _template("report.html").render(
        name=run.name,
        summary=summary,
        stages=[_stage(run, "pretrain", "Stage 1", summary), _stage(run, "finetune", "Stage 2", summary)],
        seconds=_bars(summary["seconds"]),
        examples=_examples(run, images, examples),
        environment=_environment(),
        stores=[store_of(run / stage) for stage in ("pretrain", "finetune")],
    )
    return page


def _stage(run: Path, stage: str, title: str, summary: dict[str, Any]) -> dict[str, Any]:
    lines = _lines(run / stage / "log.jsonl")
    steps = [line["step"] for line in lines]
    losses = [line["loss"] for line in lines]
    return {
        "title": title,
        "first": summary["loss_first"][stage],
        "last": summary["loss_last"][stage],
        "steps": len(lines),
        "samples_per_s": sorted(line["samples_per_s"] for line in lines)[len(lines) // 2],
        "data_wait": summary["data_wait"][stage],
        "chart": chart({title: (steps, losses)}),
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def chart(series: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> dict[str, Any]:
    """Where the points, smoothed lines and grid lines of an SVG chart go; a series is steps and values."""
    steps = [step for each, _ in series.values() for step in each]
    first, last = min(steps), max(steps)
    smoothed = {name: _smooth(values) for name, (_, values) in series.items()}
    shown = series.items() if len(series) == 1 else [(name, (series[name][0], smoothed[name])) for name in series]
    top = max(max(values) for _, (_, values) in shown) * 1.05

    def points(each: Sequence[int], values: Sequence[float]) -> str:
        across = (WIDTH - LEFT - 8) / max(1, last - first)
        height = HEIGHT - BOTTOM
        return " ".join(
            f"{LEFT + across * (step - first):.1f},{height * (1 - value / top):.1f}"
            for step, value in zip(each, values, strict=True)
        )

    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "bottom": HEIGHT - BOTTOM,
        "lines": [
            {"name": name, "raw": points(each, values), "smooth": points(each, smoothed[name])}
            for name, (each, values) in series.items()
        ],
        "ticks": [{"y": (HEIGHT - BOTTOM) * (1 - i / 4), "label": f"{top * i / 4:.2f}"} for i in range(5)],
        "first_step": first,
        "last_step": last,
    }


def _smooth(values: Sequence[float]) -> list[float]:
    smooth, result = values[0], []
    for value in values:
        smooth = 0.9 * smooth + 0.1 * value
        result.append(smooth)
    return result


def _bars(seconds: dict[str, float]) -> list[dict[str, Any]]:
    longest = max(seconds.values(), default=1.0) or 1.0
    return [{"name": name, "seconds": s, "percent": 100 * s / longest} for name, s in seconds.items()]


def _examples(run: Path, images: Path, count: int) -> list[dict[str, Any]]:
    """A spread of the questions, each with its image, and the answer given when shown another image."""
    from training.benchmarks.own import normalise

    answers = _lines(run / "answers.jsonl")
    other = run / "answers_shuffled.jsonl"
    blind = {a["question_id"]: a["text"] for a in _lines(other)} if other.exists() else {}
    chosen = answers[:: max(1, len(answers) // count)][:count]
    return [
        {
            "image": _data_url(images / a["image"]),
            "question": a["prompt"].partition("\n")[0],
            "answer": a["text"],
            "truth": a.get("answer"),
            "right": "answer" in a and normalise(a["text"]) == normalise(str(a["answer"])),
            "blind": blind.get(a["question_id"]),
        }
        for a in chosen
    ]


def _data_url(path: Path, side: int = 320) -> str:
    from PIL import Image

    image = Image.open(path).convert("RGB")
    if max(image.size) > side:
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _environment() -> dict[str, str]:
    packages = ("torch", "mosaicml", "ray", "transformers", "webdataset", "pyarrow")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "machine": platform.machine(),
        **versions,
    }


def ablation_page(folder: Path, images: Path | None, examples: int) -> str:
    """The page of an ablation, from its table.json; `images` brings examples of its own questions."""
    from training.sweep.table import LAST, TEXT_TOKENS, flops_unit

    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    rows = table["rows"]
    names = [name for name in rows[0]["scores"] if rows[0]["scores"][name]["score"] is not None]
    scale, unit = flops_unit(rows)
    published = [key for key in rows[0]["published"] if any(key in row["published"] for row in rows)]
    page: str = _template("ablation.html").render(
        table=table,
        figures=_figures(table, names),
        plots=[_plot(rows, name) for name in names if rows[0]["scores"][name]["interval"]],
        patches=table["patches"],
        names=names,
        best={name: max(row["scores"][name]["score"] for row in rows) for name in names},
        published=published,
        charts=[_curves(folder, rows, *stage) for stage in (("pretrain", "Stage 1"), ("finetune", "Stage 2"))],
        encoding=_encoding_bars(table["encoding"]),
        examples=_ablation_examples(folder, rows, images, examples) if images is not None else [],
        environment=_environment(),
        stores=table["stores"],
        scale=scale,
        unit=unit,
        last=LAST,
        text_tokens=TEXT_TOKENS,
    )
    return page


def _figures(table: dict[str, Any], names: Sequence[str]) -> list[dict[str, str]]:
    """The few numbers at the top."""
    rows, name = table["rows"], names[0]
    best = max(rows, key=lambda row: row["scores"][name]["score"])
    fewest = min(row["tokens"] for row in rows)
    figures = [
        {"value": f"{best['scores'][name]['score']:.1f}", "label": f"{name}, the best arm: {best['arm']}"},
        {"value": f"{fewest} of {table['patches']}", "label": "vision tokens in the smallest arm"},
    ]
    if table["encoding"] is not None:
        ratio = table["encoding"]["uncached_total"] / table["encoding"]["cached_total"]
        figures.append({"value": f"{ratio:.2f} x", "label": "the time, if every run encoded the images again once"})
    minutes = sum(row["seconds_train"] + row["seconds_answer"] for row in rows) * len(table["seeds"]) / 60
    figures.append(
        {"value": f"{minutes:.0f} min", "label": f"training and answering, {len(rows) * len(table['seeds'])} runs"}
    )
    return figures


def _plot(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Where the dots, intervals and grid lines of one score go."""
    scores = [row["scores"][name] for row in rows]
    low = min(min(s["interval"][0], *s["by_seed"]) for s in scores)
    high = max(max(s["interval"][1], *s["by_seed"]) for s in scores)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if (high - low) / step <= 6)
    first, last = int(low // step) * step, -int(-high // step) * step
    left, right = 112.0, WIDTH - 60

    def x(value: float) -> float:
        return round(left + (right - left) * (value - first) / max(step, last - first), 1)

    marks = [
        {
            "arm": row["arm"],
            "colour": number % 8,
            "y": 22 + 30 * number,
            "x": x(score["score"]),
            "low": x(score["interval"][0]),
            "high": x(score["interval"][1]),
            "seeds": [x(value) for value in score["by_seed"]],
            "label": f"{score['score']:.1f}",
        }
        for number, (row, score) in enumerate(zip(rows, scores, strict=True))
    ]
    ticks = [{"x": x(value), "label": value} for value in range(first, last + 1, step)]
    units = scores[0]["units"]
    return {"name": name, "width": WIDTH, "height": 40 + 30 * len(rows), "marks": marks, "ticks": ticks, "units": units}


def _curves(folder: Path, rows: Sequence[dict[str, Any]], stage: str, title: str) -> dict[str, Any]:
    logs = {row["arm"]: _lines(folder / row["runs"][0] / stage / "log.jsonl") for row in rows}
    speeds = sorted(line["samples_per_s"] for log in logs.values() for line in log)
    series = {arm: ([line["step"] for line in log], [line["loss"] for line in log]) for arm, log in logs.items()}
    return {**chart(series), "title": title, "samples_per_s": speeds[len(speeds) // 2]}


def _encoding_bars(encoding: dict[str, Any] | None) -> list[dict[str, Any]]:
    if encoding is None:
        return []
    longest = max(encoding["cached_total"], encoding["uncached_total"])
    bars = (("encoded once, kept", "once", "cached_total"), ("encoded again for every run", "again", "uncached_total"))
    return [
        {
            "name": name,
            "seconds": encoding[total],
            "parts": [
                {"percent": 100 * encoding["train"] / longest, "colour": "--c0"},
                {"percent": 100 * encoding[part] / longest, "colour": "--c1"},
            ],
        }
        for name, part, total in bars
    ]


def _ablation_examples(folder: Path, rows: Sequence[dict[str, Any]], images: Path, count: int) -> list[dict[str, Any]]:
    """A spread of the questions with every arm's answer (first seed), those first on which the arms differ."""
    from training.benchmarks.own import normalise

    files = {row["arm"]: folder / row["runs"][0] / "answers.jsonl" for row in rows}
    if not all(path.exists() for path in files.values()):
        return []
    said = {arm: {a["question_id"]: a for a in _lines(path)} for arm, path in files.items()}
    questions = list(next(iter(said.values())).values())

    def is_right(answer: dict[str, Any]) -> bool:
        return "answer" in answer and normalise(answer["text"]) == normalise(str(answer["answer"]))

    right = {q["question_id"]: sum(is_right(of[q["question_id"]]) for of in said.values()) for q in questions}
    mixed = [q for q in questions if 0 < right[q["question_id"]] < len(rows)] or questions
    chosen = mixed[:: max(1, len(mixed) // count)][:count]
    return [
        {
            "image": _data_url(images / q["image"]),
            "question": q["prompt"].partition("\n")[0],
            "truth": q.get("answer"),
            "answers": [
                {"arm": arm, "text": of[q["question_id"]]["text"], "right": is_right(of[q["question_id"]])}
                for arm, of in said.items()
            ],
        }
        for q in chosen
    ]


if __name__ == "__main__":
    main()
