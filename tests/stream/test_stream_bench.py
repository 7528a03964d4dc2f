"""The command that says how a store is mixed and how fast it is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from training.config import DataSettings

ROOT = Path(__file__).resolve().parents[2]


def stream_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "training/stream_bench.py", *arguments]
    return subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)


def test_it_describes_the_order_and_measures_two_passes(store: Path) -> None:
    done = stream_bench(str(store), "--bench", "--batch-size", "8", "--batches", "2")
    assert done.returncode == 0, done.stderr
    window = DataSettings(store=str(store), template="v1").window_shards
    titles = [line.split()[0] for line in done.stdout.splitlines()]
    assert titles == ["store", "examples", "mixing", "padding", "machine", "cold", "warm"]
    assert f"window of {window} shards" in done.stdout


def test_what_it_cannot_do_is_said_in_a_line(tmp_path: Path) -> None:
    done = stream_bench(str(tmp_path), "--threads", "0")
    assert "argument --threads: 0 is less than 1; take 1 or more" in done.stderr
    done = stream_bench(str(tmp_path / "absent"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
