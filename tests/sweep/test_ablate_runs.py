"""An ablation of two arms, on one machine and as tasks of a Ray cluster: the same table; one run killed on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.minutes(1)


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory, settings: Callable[..., Any]) -> Path:
    """The YAML file of an ablation, with four questions about drawn squares."""
    folder = tmp_path_factory.mktemp("ablation")
    asked = []
    for number, color in enumerate(("red", "green", "blue", "yellow")):
        Image.new("RGB", (32, 32), color).save(folder / f"{number}.png")
        question = {"question_id": number, "image": f"{number}.png", "text": "What color?", "answer": color}
        asked.append({**question, "category": "warm" if color in ("red", "yellow") else "cold"})
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in asked))
    stage = {"steps": 6, "checkpoint.interval": "2ba", "data.max_length": 256}
    stages = {}
    for number, name in enumerate(("pretrain", "finetune"), 1):
        tree = settings(Path("set-by-the-ablation"), number, stage)
        del tree["run"]
        stages[name] = {"config": f"training/{name}.yaml", "settings": tree}
    config = {
        "title": "Two arms",
        "run": str(folder / "run"),
        "seeds": [0],
        **stages,
        "questions": str(folder / "questions.jsonl"),
        "images": str(folder),
        "max_new_tokens": 4,
        "arms": [
            {"name": "STF", "connector": {"arm": "stf", "block": 4}},
            {"name": "AvgPool", "connector": {"arm": "avgpool", "block": 4}},
        ],
    }
    path = folder / "ablation.yaml"
    path.write_text(json.dumps(config, default=str))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def start(ablation: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start(word, ...): the command, in the background; it ends with the test."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    with ExitStack() as stack:

        def begin(*words: str) -> subprocess.Popen[str]:
            command = [sys.executable, "training/ablate.py", str(ablation), *words]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            process = stack.enter_context(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
            stack.callback(process.kill)
            return process

        yield begin


def table(run: Path) -> dict[str, Any]:
    """What does not depend on the clock."""
    found = json.loads((run / "table.json").read_text())
    for row in found["rows"]:
        for name in ("seconds_train", "seconds_answer", "data_wait"):
            row.pop(name)
    return found


@pytest.fixture(scope="module")
def in_a_row(ablation: Path, start: Callable[..., subprocess.Popen[str]]) -> Path:
    """The folder of the same runs, one after another on this machine."""
    said, _ = start(f"run={ablation.parent}/row").communicate()
    assert "| AvgPool |" in said, said
    return ablation.parent / "row"


def test_two_arms_have_a_row_each_with_their_losses_and_answers(in_a_row: Path) -> None:
    rows = table(in_a_row)["rows"]
    assert [(row["arm"], row["tokens"]) for row in rows] == [("STF", 4), ("AvgPool", 4)]
    assert rows[0]["loss_finetune"] != rows[1]["loss_finetune"]
    assert all(row["scores"]["accuracy"]["units"] == 4 for row in rows)
    assert all(
        {name: part["units"] for name, part in row["categories"].items()} == {"cold": 2, "warm": 2} for row in rows
    )
    found = table(in_a_row)
    assert found["guessing_by_category"] == {"cold": 50, "warm": 50}
    assert [(each["arms"], each["category"], each["interval"]) for each in found["comparisons"]] == [
        (["AvgPool", "STF"], category, None) for category in (None, "cold", "warm")
    ]
    assert "too few questions: 4 independent ones" in (in_a_row / "table.md").read_text()
    assert "too few questions: 4 independent ones" in (in_a_row / "report.html").read_text()


def test_the_same_command_goes_on_from_what_is_there_and_mixes_nothing(
    in_a_row: Path, ablation: Path, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(in_a_row, moved)
    answers = moved / "stf" / "seed0" / "answers.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:1]))  # as after `limit=1`
    done = moved / "stf" / "seed0" / "done.json"
    before = json.loads(done.read_text())
    done.write_text(json.dumps({**before, "asked": "one question"}))
    said, _ = start(f"run={moved}").communicate()
    assert "run 1 of 2: STF" in said, said
    assert "AvgPool, seed" not in said
    assert table(moved) == table(in_a_row)
    after = json.loads(done.read_text())
    assert (after["train"], after["asked"]) == (before["train"], before["asked"])
    assert after["answer"] > before["answer"]
    said, _ = start(f"run={moved}", "pretrain.settings.steps=5").communicate()
    assert re.search(r"error: .*/pretrain holds a run with other settings.*\n  steps: 6 -> 5\n", said), said
    (moved / "stf" / "seed0" / "finetune" / "model" / "config.json").unlink()
    answers.unlink()
    done.unlink()
    (moved / "avgpool" / "seed0" / "done.json").unlink()
    failing = start(f"run={moved}")
    said, _ = failing.communicate()
    folder = f"{moved}/stf/seed0"
    assert f"{folder} failed: model '{folder}/finetune/model' cannot be read" in said, said
    assert (moved / "avgpool" / "seed0" / "done.json").exists()
    assert f"error: 1 of 2 runs failed: {folder}; mend what is said above and run the same command again\n" in said
    assert failing.returncode == 1


@pytest.mark.slow
def test_runs_on_ray_make_the_table_of_runs_in_a_row_though_one_is_killed(
    ablation: Path, in_a_row: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    on_ray = start(f"run={ablation.parent}/ray", "--ray")
    log = ablation.parent / "ray" / "stf" / "seed0" / "finetune" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert on_ray.poll() is None, on_ray.communicate()
        time.sleep(0.01)
    (victim,) = [p for p in psutil.process_iter() if {"--part", "0/2", str(ablation)} <= set(_words(p))]
    victim.send_signal(signal.SIGKILL)
    said, _ = on_ray.communicate()
    assert on_ray.returncode == 1
    assert "2 of 2 runs to do, up to 2 at once" in said or os.cpu_count() != 2
    assert "STF, seed 0: ended with -9" in said
    assert f"1 of 2 runs failed: {ablation.parent}/ray/stf/seed0" in said
    again = start(f"run={ablation.parent}/ray", "--ray")
    said, _ = again.communicate()
    assert again.returncode == 0, said
    assert "1 of 2 runs to do" in said
    assert table(ablation.parent / "ray") == table(in_a_row)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_folder_that_every_node_would_have_of_its_own_is_refused(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    refused = start("run=somewhere", "--ray")
    said, _ = refused.communicate()
    assert refused.returncode == 1
    assert "error: run=somewhere is another folder on every node; give an absolute path" in said
