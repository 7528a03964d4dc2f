#!/usr/bin/env python
"""One self-contained HTML page of a run: `python training/report.py runs/demo --images DIR`. Reads files only."""

from __future__ import annotations

import argparse
import base64
import importlib.metadata
import io
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

ROOM = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[0] = str(ROOM.parent)  # the repository root, not this folder

WIDTH, HEIGHT, LEFT, BOTTOM = 520.0, 220.0, 44.0, 26.0  # of a chart, in SVG units


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder with summary.json, pretrain/log.jsonl, finetune/log.jsonl")
    parser.add_argument("--images", type=Path, required=True, help="folder that the questions' images are relative to")
    parser.add_argument("--examples", type=int, default=12, help="questions to show")
    arguments = parser.parse_args()
    if not (arguments.run / "summary.json").exists():
        sys.exit(f"error: {arguments.run} holds no summary.json; run the demo, or name another folder")
    page = render(arguments.run, arguments.images, arguments.examples)
    (arguments.run / "report.html").write_text(page, encoding="utf-8")
    print(arguments.run / "report.html")


def render(run: Path, images: Path, examples: int) -> str:
    """The page as one string of HTML that needs nothing beside itself."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    template = Environment(loader=FileSystemLoader(ROOM), autoescape=select_autoescape(["html"])).get_template(
        "report.html"
    )
    return template.render(
        name=run.name,
        summary=summary,
        stages=[_stage(run, "pretrain", "Stage 1", summary), _stage(run, "finetune", "Stage 2", summary)],
        seconds=_bars(summary["seconds"]),
        examples=_examples(run, images, examples),
        environment=_environment(),
    )


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
        "chart": chart(steps, losses),
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def chart(steps: list[int], values: list[float]) -> dict[str, Any]:
    """Where an SVG line chart's points, smoothed line and grid lines go."""
    top = max(values) * 1.05
    span = max(1, max(steps) - min(steps))

    def place(step: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - 8) * (step - min(steps)) / span
        return f"{x:.1f},{(HEIGHT - BOTTOM) * (1 - value / top):.1f}"

    smooth, smoothed = values[0], []
    for value in values:
        smooth = 0.9 * smooth + 0.1 * value
        smoothed.append(smooth)
    ticks = [top * i / 4 for i in range(5)]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "bottom": HEIGHT - BOTTOM,
        "raw": " ".join(place(s, v) for s, v in zip(steps, values, strict=True)),
        "smooth": " ".join(place(s, v) for s, v in zip(steps, smoothed, strict=True)),
        "ticks": [{"y": (HEIGHT - BOTTOM) * (1 - t / top), "label": f"{t:.2f}"} for t in ticks],
        "first_step": min(steps),
        "last_step": max(steps),
    }


def _bars(seconds: dict[str, float]) -> list[dict[str, Any]]:
    longest = max(seconds.values(), default=1.0) or 1.0
    return [{"name": name, "seconds": s, "percent": 100 * s / longest} for name, s in seconds.items()]


def _examples(run: Path, images: Path, count: int) -> list[dict[str, Any]]:
    """A spread of the questions, each with its image, and the answer given when shown another image."""
    from training.evaluate import normalise

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


if __name__ == "__main__":
    main()
