#!/usr/bin/env python
"""Ask a model questions about images, and score what it says.

    python training/evaluate.py MODEL --benchmark gqa --data DIR --out DIR      a benchmark of the paper
    python training/evaluate.py --benchmark gqa --data DIR --predictions FILE   answers that some model gave
    python training/evaluate.py MODEL --questions FILE.jsonl --images DIR --out FILE.jsonl   your own questions
    python training/evaluate.py --average DIR                                   the scores in DIR, and their average

Benchmarks: gqa, scienceqa, textvqa, pope, mmbench, mmbench-cn, vqav2, vizwiz, mme; DIR holds the official files, or
has a folder of the benchmark's name that does. Each line of your own questions is LLaVA's: {"question_id", "image",
"text"}, with "answer" (and "category") where the truth is known. Answers are JSON lines {"question_id", "image",
"prompt", "text", ...}; running the same command again answers only what is missing.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

from training.benchmarks.metrics import Scored
from training.benchmarks.questions import file_within, is_within, read_json_lines

if TYPE_CHECKING:
    from training.benchmarks.predictions import Predictions
    from training.benchmarks.questions import Benchmark


def main() -> None:
    """Command line."""
    parser = _parser()
    arguments = parser.parse_args()
    try:
        _check(arguments)
        if arguments.average:
            print(averages(arguments.average))
        elif arguments.processes > 1 and arguments.model:
            from training.answers.answer import in_processes

            sys.exit(in_processes(arguments.processes, [sys.executable, *sys.argv, "--processes", "1"]))
        elif arguments.benchmark:
            for name in arguments.benchmark:
                evaluate_benchmark(name, arguments)
            if arguments.out is not None and _is_first():
                print(averages(arguments.out), file=sys.stderr)
        else:
            evaluate_questions(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder that training/train.py exported, or a Hub id")
    bench = parser.add_argument_group("a benchmark of the paper")
    bench.add_argument("--benchmark", nargs="+", metavar="NAME", help="one or several, see above")
    bench.add_argument("--data", type=Path, metavar="DIR", help="folder of the official files")
    bench.add_argument("--split", help="where a benchmark has several, e.g. test-dev of vqav2")
    bench.add_argument("--predictions", type=Path, metavar="FILE", help="score this file; no model is run")
    bench.add_argument("--against", type=Path, metavar="FILE", help="compare with these predictions, in pairs")
    own = parser.add_argument_group("your own questions")
    own.add_argument("--questions", type=Path, help="JSON lines")
    own.add_argument("--images", type=Path, help="folder that the questions' images are relative to")
    own.add_argument("--shuffle-images", type=int, metavar="SEED", help="show each question another question's image")
    parser.add_argument("--average", type=Path, metavar="DIR", help="only print the scores in this folder")
    parser.add_argument("--out", type=Path, help="answers go here (a folder for benchmarks), scores beside them")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, help="default: 128, or the benchmark's own")
    parser.add_argument("--limit", type=int, help="only the first N questions")
    parser.add_argument("--processes", type=int, default=1, help="share the questions among so many, e.g. one per GPU")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """What argparse cannot tell.

    Raises:
        ValueError: with every problem of the command line.
    """
    problems = []
    ways = [bool(arguments.benchmark), bool(arguments.questions), bool(arguments.average)]
    if sum(ways) != 1:
        problems.append("give one of --benchmark, --questions and --average")
    if arguments.benchmark and arguments.data is None:
        problems.append("--benchmark needs --data, the folder of its official files")
    if arguments.questions and (arguments.images is None or arguments.out is None):
        problems.append("--questions needs --images and --out")
    if arguments.predictions and not arguments.benchmark:
        problems.append("--predictions goes with --benchmark")
    if arguments.predictions and arguments.benchmark and len(arguments.benchmark) > 1:
        problems.append("--predictions is of one benchmark")
    if not arguments.average and (arguments.model is None) is (arguments.predictions is None):
        problems.append("give a model, or the --predictions of one")
    if arguments.benchmark and arguments.predictions is None and arguments.out is None:
        problems.append("--out is needed: the folder for answers and scores")
    if arguments.shuffle_images is not None and not arguments.questions:
        problems.append("--shuffle-images goes with --questions")
    for name in ("batch_size", "max_new_tokens", "limit", "processes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            problems.append(f"--{name.replace('_', '-')} {value} is not positive")
    if problems:
        raise ValueError("; ".join(problems))


def evaluate_benchmark(name: str, arguments: argparse.Namespace) -> None:
    """Answer (or read the answers to) one benchmark; its report is printed as one line of JSON."""
    from training.benchmarks import open_benchmark
    from training.benchmarks.predictions import read_predictions

    benchmark = open_benchmark(name, arguments.data, arguments.split)
    benchmark.keep(arguments.limit)
    path = arguments.predictions
    if path is None:
        path = _answer_benchmark(benchmark, arguments)
        if path is None:
            return  # the first of several processes reports
    predictions = read_predictions(path, benchmark)
    report = benchmark_report(benchmark, predictions)
    report |= {"model": arguments.model, "predictions": str(path)}
    if arguments.against is not None:
        report["against"] = compare(benchmark, predictions, read_predictions(arguments.against, benchmark))
        report["against"]["predictions"] = str(arguments.against)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        _write_server_file(benchmark, predictions, arguments.out)
        scores = arguments.out / f"{benchmark.name}.scores.json"
        scores.write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    print(describe(report), file=sys.stderr)
    print(json.dumps(report, ensure_ascii=False))


def _answer_benchmark(benchmark: Benchmark, arguments: argparse.Namespace) -> Path | None:
    """The model's answers to a benchmark, in a file; None on every process but the first."""
    from training.answers.answer import answer_all

    absent = benchmark.absent_images()
    if absent:
        raise ValueError(
            f"{len(absent)} image(s) of {benchmark.name} are not in {benchmark.image_folder}: "
            f"{', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}"
        )
    asked = [{"question_id": q.id, "image": q.image, "text": q.text} for q in benchmark.questions]
    out = arguments.out / f"{benchmark.name}.jsonl"
    tokens = arguments.max_new_tokens or benchmark.max_new_tokens
    answered = answer_all(arguments.model, asked, benchmark.image, out, arguments.batch_size, tokens)
    return None if answered is None else out


def _write_server_file(benchmark: Benchmark, predictions: Predictions, folder: Path) -> None:
    made = benchmark.server_file(predictions.answers)
    if made is not None:
        name, data = made
        (folder / "server").mkdir(exist_ok=True)
        (folder / "server" / name).write_bytes(data)


def benchmark_report(benchmark: Benchmark, predictions: Predictions) -> dict[str, Any]:
    """Scores with counts and intervals, and what was wrong with the predictions."""
    scores = {name: scored.report() for name, scored in benchmark.score(predictions.answers).items()}
    headline = next(iter(scores))
    return {
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "questions": len(benchmark.questions),
        "answered": len(predictions.answers),
        "headline": headline,
        **{key: scores[headline][key] for key in ("score", "interval")},
        "scores": scores,
        "problems": predictions.problems(),
    }


def compare(benchmark: Benchmark, mine: Predictions, theirs: Predictions) -> dict[str, Any]:
    """Paired differences of every score, and what was wrong with the other predictions."""
    others = benchmark.score(theirs.answers)
    mine_scored = benchmark.score(mine.answers)
    return {
        "differences": {name: scored.against(others[name]) for name, scored in mine_scored.items() if name in others},
        "problems": theirs.problems(),
    }


def describe(report: dict[str, Any]) -> str:
    """A report for a person."""
    lines = [
        f"{report['benchmark']} {report['split']}: {report['answered']} of {report['questions']} questions answered"
    ]
    for name, score in report["scores"].items():
        if score["score"] is None:
            lines.append(f"  {name:<22} -       truth not in the official files; see the file for the server")
            continue
        low, high = score["interval"]
        lines.append(
            f"  {name:<22} {score['score']:7.2f}  [{low:.2f}, {high:.2f}]  n={score['units']}  {score['what']}"
        )
    for name, pair in report.get("against", {}).get("differences", {}).items():
        if pair["difference"] is not None:
            low, high = pair["interval"]
            differ = f"{pair['units_that_differ']} of {pair['units']} differ"
            lines.append(
                f"  {name:<22} {pair['difference']:+7.2f}  [{low:+.2f}, {high:+.2f}]  against the other, {differ}"
            )
    for kind, problem in report["problems"].items():
        if problem["count"]:
            lines.append(f"  {kind}: {problem['count']}, first {'; '.join(map(str, problem['first']))}")
    return "\n".join(lines)


def averages(folder: Path) -> str:
    """The headline scores in a folder, and their mean over the paper's eight benchmarks, with and without VizWiz.

    Raises:
        ValueError: if it holds no scores.
    """
    from training.benchmarks import AVERAGED, BENCHMARKS

    found = {path.name.removesuffix(".scores.json"): path for path in folder.glob("*.scores.json")}
    reports = {name: json.loads(found[name].read_text(encoding="utf-8")) for name in BENCHMARKS if name in found}
    if not reports:
        raise ValueError(f"{folder} holds no <benchmark>.scores.json")
    rows = []
    for name, report in reports.items():
        value = "-" if report["score"] is None else f"{report['score']:.2f}"
        rows.append(f"{name:<12} {report['headline']:<12} {value:>8}")
    scores = {name: report["score"] for name, report in reports.items() if report["score"] is not None}
    without = [name for name in AVERAGED if name != "vizwiz"]
    for title, names in (("average", AVERAGED), ("... without VizWiz", without)):
        missing = [name for name in names if name not in scores]
        value = ", ".join(missing) + " missing" if missing else f"{sum(scores[n] for n in names) / len(names):8.2f}"
        rows.append(f"{title:<25} {value}")
    return "\n".join(rows)


def _is_first() -> bool:
    from training.answers.answer import Ranks

    return Ranks.of_environment().rank == 0


def evaluate_questions(arguments: argparse.Namespace) -> None:
    """Answer a file of questions; its scores are printed as one line of JSON."""
    from training.answers.answer import answer_all

    questions = read_questions(arguments.questions, arguments.images)[: arguments.limit]
    if arguments.shuffle_images is not None:
        questions = with_other_images(questions, arguments.shuffle_images)
    answers = answer_all(
        arguments.model,
        questions,
        lambda name: file_within(arguments.images, name).read_bytes(),
        arguments.out,
        arguments.batch_size,
        arguments.max_new_tokens or 128,
    )
    if answers is None:
        return
    scores = score(answers)
    arguments.out.with_suffix(".scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    print(json.dumps(scores))


def read_questions(path: Path, images: Path) -> list[dict[str, Any]]:
    """Read and check a questions file.

    Raises:
        ValueError: naming the file, the line and what is missing; every missing image at once.
    """
    if not path.is_file():
        raise ValueError(f"questions file {path} does not exist")
    questions = read_json_lines(path)
    for number, question in enumerate(questions, 1):
        missing = [key for key in ("question_id", "image", "text") if key not in question]
        if missing:
            raise ValueError(f"{path}: question {number} lacks {', '.join(missing)}; it has {', '.join(question)}")
        for key, kinds in (("question_id", str | int), ("image", str), ("text", str)):
            if not isinstance(question[key], kinds):
                raise ValueError(f"{path}: question {number} has {key} {question[key]!r}; text was expected")
    repeated = [key for key, n in Counter((q["question_id"], q["image"]) for q in questions).items() if n > 1]
    if repeated:
        raise ValueError(f"{path}: {len(repeated)} question_id(s) occur again with the same image, first {repeated[0]}")
    root = images.resolve()
    absent = sorted({q["image"] for q in questions if not is_within(root, q["image"])})
    if absent:
        raise ValueError(f"{len(absent)} image(s) are not in {images}: {', '.join(absent[:5])} ...")
    return questions


def with_other_images(questions: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The same questions, each with another question's image: what a model that looks cannot answer any more.

    Raises:
        ValueError: if there is only one image.
    """
    images = sorted({q["image"] for q in questions})
    if len(images) < 2:
        raise ValueError("shuffling images needs at least two different ones")
    order = images.copy()
    random.Random(seed).shuffle(order)
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return [{**q, "image": following[q["image"]]} for q in questions]


def normalise(text: str) -> str:
    """Case, surrounding space and a final full stop do not matter in a one-word answer."""
    return text.strip().rstrip(".").strip().lower()


def scored(answers: list[dict[str, Any]]) -> Scored:
    """The answers whose truth is known, right or wrong."""
    return Scored(
        "accuracy",
        {
            f"{a['question_id']} {a['image']}": ("", float(normalise(a["text"]) == normalise(str(a["answer"]))))
            for a in answers
            if "answer" in a
        },
    )


def score(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy over the answers whose truth is known, in all and by category; counts beside every figure."""
    by_category: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for answer in answers:
        by_category[str(answer.get("category", "all"))].append(answer)
    known = scored(answers)
    return {
        "questions": len(answers),
        "scored": len(known.units),
        **_fraction(known),
        "categories": {
            name: {**_fraction(part), "questions": len(part.units)}
            for name, group in sorted(by_category.items())
            if (part := scored(group)).units
        },
    }


def _fraction(part: Scored) -> dict[str, Any]:
    report = part.report()
    if report["score"] is None:
        return {"accuracy": None, "interval": None}
    return {"accuracy": report["score"] / 100, "interval": [bound / 100 for bound in report["interval"]]}


if __name__ == "__main__":
    main()
