"""The same run by other paths is the same run: what counts is what lies there. Stores: test_run_folder.py."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from training.config import FOLDERS, TrainConfig
from training.fit.identity import SOURCES, refuse_another, sources
from training.release.records import CONFIG

Config = Callable[..., TrainConfig]


@pytest.fixture
def config(settings: Callable[..., dict[str, Any]], parts: Path, tmp_path: Path) -> Config:
    """config({"a.b": value}): of the run whose folder `begun` has made."""
    for name in FOLDERS:
        shutil.copytree(parts / "llm", tmp_path / name)

    def make(changes: dict[str, Any] | None = None) -> TrainConfig:
        paths = {name: str(tmp_path / name) for name in FOLDERS}
        return TrainConfig.model_validate(settings(tmp_path / "run", 1, {**paths, **(changes or {})}))

    return make


@pytest.fixture(autouse=True)
def begun(config: Config) -> Path:
    """The folder of a run that has begun."""
    run = Path(config().run)
    run.mkdir()
    (run / CONFIG).write_text(json.dumps(config().model_dump(mode="json")))
    (run / SOURCES).write_text(json.dumps(sources(config())))
    return run


def nudge(folder: Path) -> None:
    """Change the last number of a folder's weights: all names, shapes and sizes stay."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    last = max(weights, key=lambda name: weights[name].nbytes)
    weights[last].flat[-1] += 1
    save_file(weights, path)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_with_the_same_files_is_the_same(config: Config, begun: Path, tmp_path: Path, name: str) -> None:
    moved = (tmp_path / name).rename(tmp_path / "elsewhere")
    refuse_another(config())  # gone from its place: whoever reads it says so
    refuse_another(config({name: str(moved)}))
    (moved / "README.md").write_text("a card")
    (moved / "pytorch_model.bin").write_text("the same weights, which nobody reads beside the others")
    refuse_another(config({name: str(moved)}))
    shutil.copytree(moved, tmp_path / name)
    (begun / SOURCES).unlink()  # of the time before such fingerprints: what lies at the path of then is compared
    refuse_another(config({name: str(moved)}))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_with_other_files_is_another(config: Config, begun: Path, tmp_path: Path, name: str) -> None:
    other = shutil.copytree(tmp_path / name, tmp_path / "other")
    nudge(other)
    with pytest.raises(ValueError, match=re.escape(f"{name}: {tmp_path / name} -> {other}")):
        refuse_another(config({name: str(other)}))
    with pytest.raises(ValueError, match=re.escape(f"{name}: {tmp_path / name} -> some/model")):
        refuse_another(config({name: "some/model"}))
    nudge(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: .* holds other files than when the run began.*delete .*{SOURCES}"):
        refuse_another(config())
    (begun / SOURCES).unlink()
    refuse_another(config())


def test_of_a_large_file_pieces_from_its_beginning_to_its_end_are_compared(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "model.llm" / "model.safetensors"
    content = bytearray(2**23 + 12345)
    seen = set()
    for changed in (0, 2**20, 2**22 + 7, len(content) - 2**18):  # as training changes weights: all of a tensor
        path.write_bytes(content)
        seen.add(sources(config())["model.llm"])
        content[changed : changed + 2**18] = bytes([1]) * 2**18
    path.write_bytes(content)
    assert len(seen | {sources(config())["model.llm"]}) == 5
