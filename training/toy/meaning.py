"""What the result of a small run means, and when it means nothing, in sentences. Needs no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.benchmarks.metrics import PairReport, Scored
from training.benchmarks.own import OwnQuestions, normalise
from training.benchmarks.predictions import read_predictions
from training.benchmarks.questions import Answers

NEARLY_ALL = 0.95  # of the answers
KNOWN = 0.1  # nats: a stage that begins with less has nothing to teach
ENOUGH_IMAGES = 1000  # of a stage
HALF_WIDTH = 5.0  # points: an accuracy that is known less well is called so


def shuffled_tells(questions: OwnQuestions) -> bool:
    """Whether answers to other images tell anything: there must be others."""
    return len({question.image for question in questions.questions}) > 1


def meaning(
    run: Path, questions: OwnQuestions, stages: Mapping[str, Mapping[str, Any]], images: Mapping[str, int]
) -> list[str]:
    """Sentences about the answers in folder `run`: what they rest on, and why they may mean nothing.

    Args:
        stages: `summary.json` of each stage, by the stage's name.
        images: of each stage's store.

    Raises:
        ValueError: if answers are missing.
    """
    answers = read_predictions(run / "answers.jsonl", questions).answers
    shuffled: Answers = {}
    path = run / "answers_shuffled.jsonl"
    if path.exists():
        others = OwnQuestions(questions.folder, images=questions.image_folder)
        others.shuffle_images(0)
        shuffled = read_predictions(path, others).answers
    told = [*_alike(answers, shuffled), *_scores(questions, answers, shuffled), *_nothing_to_learn(stages)]
    return [*told, *_few_images(images)]


def _alike(answers: Answers, shuffled: Answers) -> list[str]:
    """Whether all questions get one answer, and whether the image changes any."""
    said = {id: normalise(answer.text) for id, answer in answers.items()}
    sentences = []
    (most, times), *_ = Counter(said.values()).most_common(1)
    if times >= NEARLY_ALL * len(said) and len(said) > 1:
        sentences.append(f"Means nothing: {times} of {len(said)} answers are {most!r:.60}, whatever is asked.")
    same = sum(normalise(shuffled[id].text) == text for id, text in said.items() if id in shuffled)
    if shuffled and same >= NEARLY_ALL * len(said):
        sentences.append(f"The images play no part: shown a wrong one, {same} of {len(said)} answers stay the same.")
    return sentences


def _scores(questions: OwnQuestions, answers: Answers, shuffled: Answers) -> list[str]:
    """The accuracy beside what it is without looking, and how well it is known."""
    right = _accuracy(questions, answers)
    report = right.report()
    if report["score"] is None:
        return ["Whether the answers are right is not known: the questions have no `answer`. Give them one."]
    guessed = _accuracy(questions, questions.guesses())
    sentences = [
        _beside(right.against(guessed), "always giving the most frequent answer", guessed.report()["score"] or 0.0)
    ]
    if shuffled:
        blind = _accuracy(questions, shuffled)
        sentences.append(_beside(right.against(blind), "looking at wrong images", blind.report()["score"] or 0.0))
    return [*sentences, *_known_to(report["units"])]


def _accuracy(questions: OwnQuestions, answers: Answers) -> Scored:
    return questions.score(answers)["accuracy"]


def _beside(pair: PairReport, what: str, score: float) -> str:
    """How the answers compare with others to the same questions."""
    if pair["difference"] is None or pair["interval"] is None:
        raise ValueError(f"no question was answered by the model and by {what}; delete the answers and run again")
    low, high = pair["interval"]
    points = f"{pair['difference']:+.1f} points [{low:+.1f}, {high:+.1f}]"
    if low > 0:
        return f"Better than {what} ({score:.1f}% right), by {points}."
    return f"Means nothing: not better than {what} ({score:.1f}% right); the difference is {points}."


def _known_to(questions: int) -> list[str]:
    """How well an accuracy is known, where questions are few."""
    half = 98 / math.sqrt(questions)  # points: 1.96 standard errors at 50%, where they are largest
    if half <= HALF_WIDTH:
        return []
    return [
        f"{questions} questions are few: an accuracy of them is known to {half:.0f} points either way; "
        f"{HALF_WIDTH:.0f} points take {math.ceil((98 / HALF_WIDTH) ** 2)} questions."
    ]


def _nothing_to_learn(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Stages that began with next to no loss."""
    return [
        f"Nothing to learn in {stage}: its loss was {first:.3f} at its first step. The language model knew "
        "these answers before it saw an image; give more data, and answers that differ more from each other."
        for stage, summary in stages.items()
        if (first := summary["loss_first"]) is not None and first < KNOWN
    ]


def _few_images(images: Mapping[str, int]) -> list[str]:
    """Whether the stages saw fewer images than tiny models, which begin with random weights, learn to see from."""
    if min(images.values()) >= ENOUGH_IMAGES:
        return []
    seen = " and ".join(f"{stage} saw {count:,}" for stage, count in images.items())
    return [
        f"Few images ({seen}): models that begin with random weights learn these by heart, and little of others; "
        f"{ENOUGH_IMAGES:,} are the least to judge by."
    ]
