"""Own questions at the end of each epoch: the answers of the exported model, and no trace in training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.answers.answer import load_model, reply, with_pictures
from training.benchmarks.own import OwnQuestions
from training.config import TrainConfig
from training.engines import engine_of
from training.fit.parts import open_parts
from training.fit.quiz import open_quiz

IMAGES = Path(__file__).resolve().parents[1] / "photos" / "images"
HELD = {"data.validation": {"share": 0.2, "interval": "9ba"}, "steps": 16, "optimizer.lr": 1e-3}
DROPOUT = {"model.lora": {"rank": 4, "alpha": 8, "dropout": 0.3}, "train": ["connector", "llm"]}
PLACES = {"step_s", "samples_per_s", "tokens_per_s", "data_wait", "eta_s", "memory_gb", "padding"}


def write_questions(path: Path, answers: list[str | None]) -> Path:
    names = sorted(image.name for image in IMAGES.iterdir())
    lines = [
        {"question_id": number, "image": names[number % len(names)], "text": "w " * (number + 1), "answer": answer}
        for number, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def said_by(model: Path, questions: OwnQuestions) -> list[str]:
    loaded = load_model(str(model), "cpu")
    asked = [with_pictures([question], questions) for question in questions.to_ask()]
    return [reply(*loaded, [q.text], [picture], questions.max_new_tokens)[0] for ((q, picture),) in asked]


@pytest.mark.slow
@pytest.mark.minutes(1)
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_the_share_is_that_of_the_exported_model_and_training_has_the_same_numbers(
    settings: Callable[..., Any],
    run_jobs: Callable[..., Any],
    read_log: Callable[..., Any],
    tmp_path: Path,
    engine: str,
) -> None:
    changes = {**HELD, **DROPOUT, "parallelism": engine}
    codes = run_jobs(tmp_path, [{"config": settings(tmp_path / "without", 2, changes), "ranks": 2}])
    assert codes == [[0, 0]], (tmp_path / "without" / "output").read_text()[-3000:]
    path = write_questions(tmp_path / "questions.jsonl", ["?"] * 7)
    said = said_by(tmp_path / "without" / "model", OwnQuestions(path, images=IMAGES))
    assert len(set(said)) > 1
    write_questions(path, [*said[:4], "no such answer", "nor this", None])
    asked = {**HELD["data.validation"], "questions": str(path), "images": str(IMAGES)}
    job = {"config": settings(tmp_path / "with", 2, {**changes, "data.validation": asked}), "ranks": 2}
    codes = run_jobs(tmp_path, [job])
    assert codes == [[0, 0]], (tmp_path / "with" / "output").read_text()[-3000:]
    without, log = read_log(tmp_path / "without"), read_log(tmp_path / "with")
    kept = without[0].keys() - PLACES
    assert [{name: line[name] for name in kept} for line in log] == [
        {name: line[name] for name in kept} for line in without
    ]
    assert [line["step"] for line in log if "questions_right" in line] == [13, 16]  # an epoch has 13 steps
    assert log[-1]["questions_right"] == 4 / 6


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_an_engine_that_shards_weights_refuses_them(settings: Callable[..., Any], tmp_path: Path, engine: str) -> None:
    path = write_questions(tmp_path / "questions.jsonl", ["yes"])
    asked = {"share": 0.2, "questions": str(path), "images": str(IMAGES)}
    config = TrainConfig.model_validate(
        settings(tmp_path / "run", 1, {"data.validation": asked, "parallelism": engine})
    )
    with pytest.raises(ValueError, match=f"data.validation.questions with parallelism {engine} on 2 rank"):
        open_quiz(config, open_parts(config, 0, 1), engine_of(config, 2))


@pytest.mark.parametrize(
    ("answers", "image", "reason"),
    [([None], None, "no question has an answer"), (["yes"], "gone.jpg", r"1 image\(s\) of own are not in")],
)
def test_questions_that_tell_nothing_are_refused_at_the_start(
    settings: Callable[..., Any], tmp_path: Path, answers: list[str | None], image: str | None, reason: str
) -> None:
    path = write_questions(tmp_path / "questions.jsonl", answers)
    if image is not None:
        path.write_text(path.read_text().replace("astronaut.jpg", image))
    asked = {"share": 0.2, "questions": str(path), "images": str(IMAGES)}
    config = TrainConfig.model_validate(settings(tmp_path / "run", 1, {"data.validation": asked}))
    with pytest.raises(ValueError, match=reason):
        open_quiz(config, open_parts(config, 0, 1), engine_of(config, 2))
