"""What the README shows is what is there: its file tree, its commands and their settings."""

import re
import shlex
from pathlib import Path

import pytest

from pipeline.config import BuildConfig, load_config
from training.config import TrainConfig
from training.sweep.plan import AblationConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "infra/README.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def commands() -> list[list[str]]:
    lines = [
        line for page in PAGES for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()
    ]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def settings_of(words: list[str]) -> list[str]:
    return [word for word in words if re.match(r"[a-z_.]+=", word)]


def test_the_file_tree_names_every_file_and_no_other() -> None:
    (tree,) = [block for block in blocks("README.md", "text") if block.startswith("pipeline/ ")]
    room, listed = "", set()
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            listed.add(f"{room}{name}")
        else:
            room = name
    present = {
        str(path.relative_to(ROOT))
        for folder in ("pipeline", "training")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.name != "__init__.py" and "__pycache__" not in path.parts
    }
    assert listed == present


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words[:4]))
def test_every_command_names_files_and_settings_that_exist(words: list[str]) -> None:
    ours = [word for word in words if word.startswith(("pipeline/", "training/"))]
    for word in ours:
        assert (ROOT / word).is_file()
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    elif "pipeline/build_shards.py" in words:
        load_config(BuildConfig, None, settings_of(words))
    elif "training/ablate.py" in words:
        load_config(AblationConfig, str(ROOT / ours[-1]), settings_of(words))
    elif ours and ours[-1].endswith(".yaml"):
        load_config(TrainConfig, str(ROOT / ours[-1]), settings_of(words))
