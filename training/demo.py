#!/usr/bin/env python
"""The whole job at the size of a laptop: data -> feature store -> stage 1 -> stage 2 -> answers -> report.

Without arguments it draws its own scenes. With --chat, --instruct, --images and --questions the same steps run on
LLaVA-format data of yours, with the same tiny models. Every step is the command a user would type; what is done is
not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

from pydantic import RootModel

from pipeline.images import find_file
from training.benchmarks.own import OwnQuestions
from training.release.records import SUMMARY, Summary, read_as, write_whole
from training.toy.cache import digest_of
from training.toy.meaning import meaning, shuffled_tells
from training.toy.own_data import look_through, raw_records, read_records
from training.toy.settings import BATCHES, BLOCKS, FINETUNE, GENERATE, HELD_OUT, PRETRAIN, SIZES, epochs_for

ROOT = Path(__file__).resolve().parent.parent
PER_STAGE = ("loss_first", "loss_last", "steps", "data_wait")  # of the summary: one figure for each of the two stages


class Demo:
    """Runs the steps in `run`, keeping the seconds each took."""

    def __init__(self, run: Path, data: dict[str, str], drawn: bool, size: str = "small", seed: int = 0) -> None:
        self.run = run
        self.data = data
        self.drawn = drawn
        self.size = size
        self.seed = seed
        self.seconds: dict[str, float] = {}
        self.python = [sys.executable]
        # A rank a core: small matrices hardly profit from two threads.
        self.composer = [sys.executable, str(Path(sys.executable).parent / "composer"), "-n", "2"]

    def step(self, name: str, command: list[str], done: Path | None = None) -> None:
        """Run one command, its output into `logs/<name>.log`; skip it if `done` exists.

        Raises:
            SystemExit: if the command fails, with the end of its log.
        """
        if done is not None and done.exists():
            print(f"  {name:<22} done before", flush=True)
            self.seconds[name] = self._known_seconds().get(name, 0.0)
            return
        log = self.run / "logs" / f"{name.replace(' ', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with log.open("w", encoding="utf-8") as out:
            code = subprocess.call(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=_environment())
        self.seconds[name] = round(time.perf_counter() - start, 1)
        print(f"  {name:<22} {self.seconds[name]:6.1f} s", flush=True)
        if code:
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
            text = f"step {name!r} ended with {code}; its whole output is in {log}"
            sys.exit(f"{tail}\nerror: {text}; correct what it names, and run the same command again")
        known = {**self._known_seconds(), **self.seconds}
        write_whole(self.run / "seconds.json", json.dumps(known, indent=1))

    def side_by_side(self, *steps: tuple[str, list[str], Path]) -> None:
        """Steps that do not need each other, at the same time.

        Raises:
            SystemExit: if one of them fails, once all have ended.
        """
        with ThreadPoolExecutor(len(steps)) as threads:
            for started in [threads.submit(self.step, *step) for step in steps]:
                started.result()

    def _known_seconds(self) -> dict[str, float]:
        path = self.run / "seconds.json"
        return _read(path) if path.exists() else {}

    def claim(self) -> None:
        """Look at your own questions and data, and note in the folder which they are: what is done is of no other.

        Raises:
            ValueError: if they cannot be used, or the folder holds a run on other data. OSError: if a file cannot be
                read.
        """
        mine: dict[str, Any] = {} if self.size == "small" else {"size": self.size}
        mine |= {"seed": self.seed} if self.seed else {}
        if self.drawn:
            mine["scenes"] = digest_of((ROOT / "pipeline").glob("demo_*.py"), "")  # of another version: other scenes
        else:
            for remark in look_through(**{name: Path(path) for name, path in self.data.items()}):
                print(remark)
            for name in ("chat", "instruct", "questions"):
                with Path(self.data[name]).open("rb") as file:
                    mine[name] = hashlib.file_digest(file, "sha256").hexdigest()
            mine["images"] = self._images_digest()
        note = self.run / "data.json"
        if (self.run / "seconds.json").exists():
            before = _read(note) if note.exists() else {}  # before there were notes, mostly drawn
            if "chat" in before:  # a note of the time before images were noted
                before.setdefault("images", mine.get("images"))
            differing = [name for name in {**before, **mine} if before.get(name) != mine.get(name)]
            if differing:
                raise ValueError(
                    f"{self.run} holds a run on other data ({', '.join(differing)}); give another --run, or delete it"
                )
        self.run.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps(mine, indent=1))

    def _images_digest(self) -> str:
        """Of the names and bytes of all images that the data and the questions show, wherever their folder lies.

        Raises:
            ValueError: if a file of data is no JSON. OSError: if a file cannot be read.
        """
        folder = Path(self.data["images"])
        questions = self._questions().questions
        records = [record for name in ("chat", "instruct") for record in raw_records(Path(self.data[name]))]
        shown = [question.image for question in questions]
        shown += [record["image"] for record in records if isinstance(record, dict) and "image" in record]
        found = hashlib.sha256()
        for name in sorted({name for name in shown if isinstance(name, str)}):
            path = find_file(folder, name)  # None: the build says so of those of the data
            found.update(f"{name}\n".encode(errors="replace"))
            if path is not None:
                with path.open("rb") as file:
                    found.update(hashlib.file_digest(file, "sha256").digest())
        return found.hexdigest()

    def all_steps(self) -> None:
        """The main job, in the order of the flow."""
        run, models, size = self.run, self.run / "models", SIZES[self.size]
        if self.drawn:
            draw = [*self.python, "pipeline/demo_data.py", str(run / "data")]
            draw += ["--images", str(size["images"]), "--heldout", str(size["heldout"]), "--seed", str(self.seed)]
            self.step("draw scenes", draw, done=run / "data" / "heldout.jsonl")
        make = [*self.python, "-m", "training.toy.models", str(models), "--size", self.size, "--seed", str(self.seed)]
        make += ["--captions", self.data["chat"], "--talk", self.data["instruct"], "--images", self.data["images"]]
        self.step("make tiny models", make, done=models / "done")
        self.side_by_side(self._build("pretrain", "chat"), self._build("finetune", "instruct"))
        self._train("pretrain", "stage 1", [*PRETRAIN, self._epochs("pretrain", "chat")])
        connector = f"model.connector_from={run}/pretrain/connector"
        self._train("finetune", "stage 2", [*FINETUNE, self._epochs("finetune", "instruct"), connector])
        evaluations = [self._evaluate("answers", "answer questions", [])]
        if shuffled_tells(self._questions()):
            evaluations.append(self._evaluate("answers_shuffled", "with shuffled images", ["--shuffle-images", "0"]))
        self.side_by_side(*evaluations)

    def _epochs(self, stage: str, source: str) -> str:
        """How often a stage sees its data: few of your own are seen more often."""
        size = SIZES[self.size]
        least = size["pretrain_epochs"] if stage == "pretrain" else size["finetune_epochs"]
        examples = len(read_records(Path(self.data[source])))
        return f"epochs={least if self.drawn else epochs_for(least, examples, BATCHES[stage])}"

    def _build(self, stage: str, source: str) -> tuple[str, list[str], Path]:
        run = self.run
        build = [*self.python, "pipeline/build_shards.py"]
        build += [f"data={self.data[source]}", f"images={self.data['images']}", f"store={run}/{stage}-store"]
        build += [
            f"encoder={run}/models/clip",
            f"blocks={list(BLOCKS)}",
            "shard_size=64",
            "compute=float32",
            "workers=1",
        ]
        return f"build {source} store", build, run / f"{stage}-store" / "manifest.parquet"

    def _train(self, stage: str, name: str, settings: list[str]) -> None:
        command = [*self.composer, f"training/{stage}.yaml", f"run={self.run}/{stage}", *settings]
        command += [f"data.store={self.run}/{stage}-store", f"model.llm={self.run}/models/llm"]
        command += [f"model.connector.blocks={list(BLOCKS)}", *(HELD_OUT if self.drawn else [])]
        command += [f"seed={self.seed}", f"data.seed={self.seed}"]
        self.step(name, command, done=self.run / stage / "summary.json")

    def _evaluate(self, out: str, name: str, extra: list[str]) -> tuple[str, list[str], Path]:
        command = [*self.python, "training/evaluate.py", f"{self.run}/finetune/model", *GENERATE, *extra]
        command += ["--questions", self.data["questions"], "--images", self.data["images"]]
        command += ["--out", f"{self.run}/{out}.jsonl"]
        return name, command, self.run / f"{out}.scores.json"

    def _questions(self) -> OwnQuestions:
        return OwnQuestions(Path(self.data["questions"]), images=Path(self.data["images"]))

    def summary(self) -> dict[str, Any]:
        """What the steps left behind, in one table; everything is read from files."""
        run = self.run
        stages = {stage: read_as(Summary, run / stage / SUMMARY).model_dump() for stage in ("pretrain", "finetune")}
        scores = _read(run / "answers.scores.json")
        shuffled = run / "answers_shuffled.scores.json"
        stores = [run / f"{stage}-store" for stage in stages]
        images = {stage: _read(store / "store.json")["samples"] for stage, store in zip(stages, stores, strict=True)}
        return {
            "accuracy": scores["accuracy"],
            "interval": scores["interval"],
            "accuracy_shuffled_images": _read(shuffled)["accuracy"] if shuffled.exists() else None,
            "questions": scores["questions"],
            "categories": scores["categories"],
            "vision_tokens_in": stages["finetune"]["vision_tokens_in"],
            "vision_tokens_out": stages["finetune"]["vision_tokens_out"],
            **{key: {stage: s[key] for stage, s in stages.items()} for key in PER_STAGE},
            "store_images": sum(images.values()),
            "store_bytes": sum(p.stat().st_size for store in stores for p in store.rglob("*") if p.is_file()),
            "meaning": meaning(run, self._questions(), _named(stages), _named(images)),
            "seconds": self.seconds,
        }


def _named(of_stages: dict[str, Any]) -> dict[str, Any]:
    """By the names of the stages instead of their folders."""
    return dict(zip(("stage 1", "stage 2"), of_stages.values(), strict=True))


def _read(path: Path) -> dict[str, Any]:
    return read_as(RootModel[dict[str, Any]], path).root


def _environment() -> dict[str, str]:
    """No step of the demo goes to the network; what runs side by side has one thread each."""
    mine = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **mine}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the run (default: runs/demo)")
    parser.add_argument(
        "--size", choices=SIZES, default="small", help="minutes (small, the default), or more and tighter intervals"
    )
    parser.add_argument("--seed", type=int, default=0, help="of scenes, models and training (default %(default)s)")
    own = parser.add_argument_group("your own data instead of the drawn scenes (all four)")
    own.add_argument("--chat", type=Path, help="LLaVA JSON of captions, for stage 1")
    own.add_argument("--instruct", type=Path, help="LLaVA JSON of conversations, for stage 2")
    own.add_argument("--images", type=Path, help="the folder their images are relative to")
    own.add_argument("--questions", type=Path, help="JSON lines to answer at the end")
    arguments = parser.parse_args()
    if not 0 <= arguments.seed < 2**32:
        parser.error(f"--seed {arguments.seed}: a seed is a number from 0 to 2**32 - 1")
    given = [arguments.chat, arguments.instruct, arguments.images, arguments.questions]
    if any(given) and not all(given):
        parser.error(
            "--chat, --instruct, --images and --questions go together; give all four, or none to draw scenes; found "
            + ", ".join(str(path) for path in given if path)
        )
    run = Path(os.path.realpath(arguments.run))  # unlike resolve(), it leaves a link that leads nowhere to the checks
    folder = run / "data"
    data = {  # from the root: the steps run in another folder
        "chat": os.path.realpath(arguments.chat or folder / "chat.json"),
        "instruct": os.path.realpath(arguments.instruct or folder / "instruct.json"),
        "images": os.path.realpath(arguments.images or folder / "images"),
        "questions": os.path.realpath(arguments.questions or folder / "heldout.jsonl"),
    }
    demo = Demo(run, data, drawn=not any(given), size=arguments.size, seed=arguments.seed)
    try:
        demo.claim()
        print(f"the main job, in {arguments.run}:")
        demo.all_steps()
        summary = demo.summary()
        write_whole(run / SUMMARY, json.dumps(summary, indent=1))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    demo.step("report", [*demo.python, "training/report.py", str(run), "--images", data["images"]])
    print(_table(summary, arguments.run))


def _table(summary: dict[str, Any], run: Path) -> str:
    """The summary for the screen."""
    first, last = summary["loss_first"], summary["loss_last"]
    lines = [
        "",
        f"  vision tokens per image   {summary['vision_tokens_in']} -> {summary['vision_tokens_out']}",
        f"  stage 1 loss              {first['pretrain']:.3f} -> {last['pretrain']:.3f}",
        f"  stage 2 loss              {first['finetune']:.3f} -> {last['finetune']:.3f}",
    ]
    if summary["accuracy"] is not None:
        low, high = summary["interval"]
        sure = f"{summary['questions']} questions, 95% interval {low:.1%} to {high:.1%}"
        lines.append(f"  accuracy, held out        {summary['accuracy']:.1%}  ({sure})")
    else:
        lines.append(f"  questions answered        {summary['questions']}  (their truth is not in the file)")
    if summary["accuracy_shuffled_images"] is not None:
        lines.append(f"  ... images shuffled       {summary['accuracy_shuffled_images']:.1%}")
    lines += [
        f"  feature stores            {summary['store_images']} images, {summary['store_bytes'] / 1e6:.0f} MB",
        f"  seconds of all steps      {sum(summary['seconds'].values()):.0f}, some side by side",
        f"  report                    {run / 'report.html'}",
        f"  talk to it                python training/chat.py {run / 'finetune/model'} IMAGE",
        "",
        "  What this result means",
        *[textwrap.fill(each, 118, initial_indent="  - ", subsequent_indent="    ") for each in summary["meaning"]],
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
