"""A tiny CLIP, drawn scenes, one Ray for the session, and the build job as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded CLIP of 4 blocks, 32 pixels, 16 patch tokens of width 32."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("clip")
    CLIPVisionModel(CLIPVisionConfig(**shape, image_size=32, patch_size=8)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 drawn images with captions (chat.json) and conversations that share them (instruct.json)."""
    from pipeline.demo_data import draw

    folder = tmp_path_factory.mktemp("scenes")
    draw(folder, images=60, heldout=4, image_size=48)
    return folder


@pytest.fixture(scope="session")
def settings(clip: Path, scenes: Path) -> Callable[..., list[str]]:
    """settings(store, key=value, ...): arguments of a small build."""

    def of(store: Path | str, **more: object) -> list[str]:
        chosen = {
            "data": scenes / "chat.json",
            "images": scenes / "images",
            "store": store,
            "encoder": clip,
            "blocks": "[2,4]",
            "compute": "float32",
            "shard_size": 16,
            "batch_size": 8,
            "workers": 2,
            **more,
        }
        return [f"{name}={value}" for name, value in chosen.items()]

    return of


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    """run(script, *arguments, fails=False, env={}): its output, after checking its exit code."""

    def call(*command: str, fails: bool = False, env: dict[str, str] | None = None) -> str:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
        done = subprocess.run(
            [sys.executable, *command],
            check=False,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        output = done.stdout + done.stderr
        assert (done.returncode != 0) is fails, output[-4000:]
        return output

    return call


@pytest.fixture(scope="session")
def store(
    tmp_path_factory: pytest.TempPathFactory, settings: Callable[..., list[str]], run: Callable[..., str]
) -> Path:
    """The small build, undisturbed."""
    folder = tmp_path_factory.mktemp("stores") / "undisturbed"
    run("pipeline/build_shards.py", *settings(folder))
    return folder


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a store that must be equal between two builds, by name."""

    def of(folder: Path) -> dict[str, bytes]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    return of


@pytest.fixture
def own_data(tmp_path: Path) -> Callable[[list[dict[str, object]]], Path]:
    """own_data(records): a JSON file of these, in a folder with room for images."""

    def write(records: list[dict[str, object]]) -> Path:
        (tmp_path / "images").mkdir(exist_ok=True)
        path = tmp_path / "data.json"
        path.write_text(json.dumps(records))
        return path

    return write
