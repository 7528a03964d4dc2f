#!/usr/bin/env python
"""Ask a model questions about images, and score what it says.

    python training/evaluate.py MODEL --benchmark gqa --data DIR --out DIR      a benchmark
    python training/evaluate.py --benchmark gqa --data DIR --predictions FILE   answers that some model gave
    python training/evaluate.py MODEL --questions FILE.jsonl --images DIR --out FILE.jsonl   your own questions
    python training/evaluate.py --average DIR                                   the scores in DIR, and their average

DIR holds the official files, or has a folder of the benchmark's name that does. Each line of your own questions is
LLaVA's: {"question_id", "image", "text"}, with "answer" (and "category") where the truth is known. Answers are JSON
lines {"question_id", "image", "prompt", "text", ...}; running the same command again answers only what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

from training.benchmarks import BENCHMARKS, Source, benchmark_class
from training.benchmarks.report import describe


def main() -> None:
    """Command line."""
    try:
        arguments = _parser().parse_args()
        _check(arguments)
        if arguments.average:
            from training.benchmarks.scores import averages

            print(averages(arguments.average))
        elif arguments.processes > 1 and arguments.model:
            from training.answers.processes import in_processes

            sys.exit(in_processes(arguments.processes, [sys.executable, *sys.argv, "--processes", "1"]))
        else:
            evaluate(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _parser() -> argparse.ArgumentParser:
    """Every option, in the groups that `--help` shows."""
    needed = "\n".join(f"  {name:<12} {_files(name)}" for name in BENCHMARKS)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"files of each benchmark, as in LLaVA's own folder (images: to ask, not to score):\n{needed}",
    )
    parser.add_argument("model", nargs="?", help="folder that training/train.py exported, or a Hub id")
    bench = parser.add_argument_group("benchmarks")
    bench.add_argument("--benchmark", nargs="+", metavar="NAME", help=f"one or several of {', '.join(BENCHMARKS)}")
    bench.add_argument("--data", type=Path, metavar="DIR", help="folder of the official files")
    bench.add_argument("--split", help="where a benchmark has several, e.g. test-dev of vqav2")
    own = parser.add_argument_group("your own questions")
    own.add_argument("--questions", type=Path, help="JSON lines")
    own.add_argument("--images", type=Path, help="folder that the questions' images are relative to")
    own.add_argument("--shuffle-images", type=int, metavar="SEED", help="show each question another question's image")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="score this file; no model is run")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with these predictions, in pairs")
    parser.add_argument("--average", type=Path, metavar="DIR", help="only print the scores in this folder")
    parser.add_argument("--out", type=Path, help="answers go here (a folder for benchmarks), scores beside them")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, help="default: 128, or the benchmark's own")
    parser.add_argument("--limit", type=int, help="only the first N questions")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="N processes share the questions, e.g. one per GPU"
    )
    return parser


def _files(name: str) -> str:
    """The files of a benchmark; what is wrong with one that cannot be used, for the others can be."""
    try:
        return benchmark_class(name).files
    except ValueError as error:
        return f"cannot be used: {error}"


def _check(arguments: argparse.Namespace) -> None:
    """What argparse cannot tell.

    Raises:
        ValueError: with every problem of the command line.
    """
    problems = []
    ways = [bool(arguments.benchmark), bool(arguments.questions), bool(arguments.average)]
    if sum(ways) != 1:
        problems.append(f"give one of --benchmark, --questions and --average; found {sum(ways)} of them")
    if arguments.benchmark and arguments.data is None:
        problems.append("--benchmark needs --data, the folder of its official files")
    if arguments.questions and (arguments.images is None or (arguments.out is None and not arguments.predictions)):
        problems.append("--questions needs --images and --out")
    if arguments.predictions and arguments.benchmark and len(arguments.benchmark) > 1:
        problems.append(f"--predictions is of one benchmark; found {', '.join(arguments.benchmark)}")
    if not arguments.average and (arguments.model is None) is (arguments.predictions is None):
        problems.append("give a model, or the --predictions of one")
    if arguments.average and (arguments.model or arguments.predictions or arguments.against):
        problems.append("--average only prints scores that are there; leave out the model and the predictions")
    if arguments.benchmark and arguments.predictions is None and arguments.out is None:
        problems.append("--out is needed: the folder for answers and scores")
    out = arguments.out
    if out is not None and out.exists() and not (out.is_dir() if arguments.benchmark else out.is_file()):
        kind = "folder" if arguments.benchmark else "file, in which answers are kept"
        problems.append(f"--out {out} is no {kind}; name one")
    if arguments.shuffle_images is not None and not arguments.questions:
        problems.append("--shuffle-images goes with --questions")
    for name in ("batch_size", "max_new_tokens", "limit", "processes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            problems.append(f"--{name.replace('_', '-')} {value} is not positive; give at least 1")
    if problems:
        raise ValueError("; ".join(problems))


def evaluate(arguments: argparse.Namespace) -> None:
    """Each benchmark in turn: answers, unless they are given; a report, printed as one line of JSON.

    Raises:
        ValueError: if questions, images, a model or predictions cannot be used.
    """
    from training.answers.answer import answer_all
    from training.answers.processes import AnsweringProcess
    from training.benchmarks.scores import averages, score_file

    first = AnsweringProcess.of_environment().is_first
    source = Source(
        names=arguments.benchmark or (),
        data=arguments.data,
        split=arguments.split,
        questions=arguments.questions,
        images=arguments.images,
        limit=arguments.limit,
    )
    for benchmark in source.open():
        if arguments.shuffle_images is not None:
            benchmark.shuffle_images(arguments.shuffle_images)
        out = arguments.out
        if arguments.benchmark and out is not None:
            out = benchmark.answers_in(out)
        if arguments.model is not None:
            answer_all(arguments.model, benchmark, out, arguments.batch_size, arguments.max_new_tokens)
        if first:  # of several processes one reports
            report = score_file(benchmark, arguments.predictions or out, arguments.model, arguments.against, out)
            print(describe(report), file=sys.stderr)
            print(json.dumps(benchmark.as_json(report), ensure_ascii=False))
    if arguments.benchmark and arguments.out is not None and first:
        print(averages(arguments.out), file=sys.stderr)


if __name__ == "__main__":
    main()
