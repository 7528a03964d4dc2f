"""Real photos in LLaVA format go through the commands of the demo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.slow(minutes=3), pytest.mark.timeout(900)]


def test_the_photos_go_through_the_same_commands(shared: Path, tmp_path: Path) -> None:
    photos = shared / "data" / "photos"
    command = [sys.executable, "training/demo.py", "--run", str(tmp_path / "run"), "--images", str(photos / "images")]
    for name, file in {"chat": "chat.json", "instruct": "instruct.json", "questions": "pope_questions.jsonl"}.items():
        command += [f"--{name}", str(photos / file)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["store_images"] == 162 + 68
    for store in ("pretrain-store", "finetune-store"):
        assert (tmp_path / "run" / store / "failures.jsonl").read_text() == ""
    assert summary["questions"] == len((photos / "pope_questions.jsonl").read_text().splitlines())
