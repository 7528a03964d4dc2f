"""An exported model answers the same under every version of transformers that `make transformers` installs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = sorted(path.stem for path in (Path(__file__).parent / "transformers_versions").glob("*.txt"))
QUESTIONS = [
    ("What is this?", "red.png"),
    ("Hi.", None),
    ("How many shapes are there, and which of them is the largest?", "blue.png"),
    ("Is it red?", "blue.png"),
    ("Tell me a story.", None),
    ("Is it red?", "red.png"),
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, exported: Path) -> Path:
    """A folder with an exported model, questions and their images."""
    folder = tmp_path_factory.mktemp("asked")
    shutil.copytree(exported, folder / "model")
    for colour in ("red", "blue"):
        Image.new("RGB", (50, 40), colour).save(folder / f"{colour}.png")
    lines = [json.dumps({"text": text, "image": image}) + "\n" for text, image in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(lines))
    return folder


def answers(asked: Path, packages: str) -> dict[str, Any]:
    """What answers.py says with `packages` before the environment's own."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(asked / "modules" / (Path(packages).name or "installed")),
        "PYTHONPATH": packages,
    }
    command = [
        sys.executable,
        Path(__file__).with_name("answers.py"),
        "model",
        "questions.jsonl",
        ".",
        "--batch-size",
        "3",
    ]
    done = subprocess.run(command, check=False, cwd=asked, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def expected(asked: Path) -> dict[str, Any]:
    found = answers(asked, "")
    assert found["transformers"] == transformers.__version__
    for how in ("greedy", "beams"):
        assert len(set(found[how])) == len(QUESTIONS)  # each question and image counts
    assert found["greedy"] != found["beams"]
    assert found["greedy"] == found["own cache"]
    return found


def test_the_oldest_and_the_newest_version_are_tried() -> None:
    assert [version.rpartition(".")[0] for version in VERSIONS] == ["5.16", "5.19", "5.24"]


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_answers_are_those_of_the_installed_version(version: str, request: pytest.FixtureRequest) -> None:
    folder = ROOT / "build" / "transformers" / version
    if not (folder / ".installed").exists():
        missing = f"transformers {version} is not in {folder}: make transformers"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    asked, expected = request.getfixturevalue("asked"), request.getfixturevalue("expected")
    found = answers(asked, str(folder))
    assert found["transformers"] == version
    assert Path(found["from"]).is_relative_to(folder)
    for how in ("greedy", "beams", "own cache"):
        assert found[how] == expected[how], how
