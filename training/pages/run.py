"""The page of one run of the main job: what it learned, what it answers, where the time went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median_high
from typing import Any

from pydantic import BaseModel, Field

from training.answers.answer_file import answer_lines
from training.benchmarks.own import is_right
from training.pages.charts import bars, loss_chart
from training.pages.page import EXAMPLES, TITLES, filled, shown, spread, stage_log
from training.release.records import SUMMARY, final_loss, read_as
from training.release.table import StoreUsed


class _Category(BaseModel):
    accuracy: float
    interval: tuple[float, float]
    questions: int


class _Stages(BaseModel):
    pretrain: float
    finetune: float


class MainJob(BaseModel):
    """`summary.json` of the main job; what is of one stage stands under its folder's name."""

    accuracy: float | None
    accuracy_shuffled_images: float | None
    interval: tuple[float, float] | None = None
    questions: int
    categories: dict[str, _Category]
    vision_tokens_in: int = Field(gt=0)
    vision_tokens_out: int
    data_wait: _Stages
    store_images: int
    store_bytes: int
    seconds: dict[str, float]


def run_page(run: Path, images: Path, examples: int = EXAMPLES) -> str:
    """The page as HTML, from the summary, the logs and the answers in folder `run`.

    Args:
        run: what training/demo.py leaves.
        images: the folder that the questions' images are relative to.
        examples: questions to show.
    """
    summary = read_as(MainJob, run / SUMMARY).model_dump()
    parts = {
        "title": run.name,
        "summary": summary,
        "stages": [_stage(run, stage, summary) for stage in TITLES],
        "seconds": bars({name: [seconds] for name, seconds in summary["seconds"].items()}),
        "examples": _examples(run, images, examples),
        "stores": [StoreUsed.of_stage(run / stage) for stage in TITLES],
    }
    return filled("run.html", parts)


def _stage(run: Path, stage: str, summary: dict[str, Any]) -> dict[str, Any]:
    """A stage's figures and its curve, from its log."""
    lines = stage_log(run / stage)
    losses = [line["loss"] for line in lines]
    measured = [line for line in lines if "heldout_loss" in line]
    held_out = [line["step"] for line in measured], [line["heldout_loss"] for line in measured]
    return {
        "title": TITLES[stage],
        "first": losses[0],
        "last": final_loss(lines),
        "steps": len(lines),
        "samples_per_s": median_high(line["samples_per_s"] for line in lines),
        "data_wait": summary["data_wait"][stage],
        "held_out": measured,
        "right": [line["questions_right"] for line in lines if "questions_right" in line],
        "chart": loss_chart({TITLES[stage]: ([line["step"] for line in lines], losses)}, held_out),
    }


def _examples(run: Path, images: Path, count: int) -> list[dict[str, Any]]:
    """A spread of the questions, each with its image, and the answer given when shown another image."""
    answers = list(answer_lines(run / "answers.jsonl"))
    other = run / "answers_shuffled.jsonl"
    blind = {_asked(a): a["text"] for a in answer_lines(other)} if other.exists() else {}
    return [
        {**shown(a, images), "answer": a["text"], "right": is_right(a), "blind": blind.get(_asked(a))}
        for a in spread(answers, count)
    ]


def _asked(answer: Mapping[str, Any]) -> str:
    """What tells a question whichever image it is shown with: questions about several images may have one id."""
    return repr([answer.get(key) for key in ("question_id", "prompt", "answer")])
