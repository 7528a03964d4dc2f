"""The import rules of pyproject.toml catch what they are for: one violation of each is planted in a copy."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
PLANTED = {  # contract, by its first words -> a file, and the line that breaks the rule there
    "training: an upper wing": ("training/text/labels.py", f"{TYPES}from training.stream.order import Order"),
    "no circles": ("training/text/image.py", f"{TYPES}from training.text.collate import Example"),
    "pipeline knows nothing": ("pipeline/codec.py", "import training.config"),
    "training takes only": ("training/fit/stage.py", "from pipeline.plan import todo"),
    "what travels with an export": ("training/model/tokenizer.py", "from pipeline.schema import Turn"),
    "ray enters": ("training/fit/stage.py", "import ray"),
    "composer enters": ("training/stream/tars.py", "from composer.utils import dist"),
    "deepspeed enters": ("training/engines/zero.py", "import deepspeed"),
    "gradio and lmms_eval": ("training/answers/talk.py", "import gradio"),
    "S3 enters": ("training/checkpoints/checkpoint.py", "import boto3"),
}


def contracts() -> list[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    return [contract["name"] for contract in settings["contracts"]]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What import-linter says of a copy with every violation."""
    folder = tmp_path_factory.mktemp("planted")
    for name in ("pipeline", "training"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for file, line in PLANTED.values():
        path = folder / file
        path.write_text(f"{path.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1
    return re.sub(r"\s+", " ", done.stdout)


@pytest.mark.parametrize("rule", PLANTED)
def test_a_planted_violation_is_caught(said: str, rule: str) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (name,) = [contract["name"] for contract in contracts if contract["name"].startswith(rule)]
    assert re.search(re.escape(name) + r" ?BROKEN", said)


def test_every_rule_has_its_violation() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    assert len(contracts) == len(PLANTED)
