"""The command that says how a store is mixed and how fast it is read."""

from __future__ import annotations

import re
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
    done = stream_bench(str(tmp_path), "--prefetch", "1000000000")
    assert "argument --prefetch: 1000000000 is more than 1,000,000; take less" in done.stderr
    done = stream_bench(str(tmp_path / "absent"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_batches_that_no_memory_holds_are_refused_in_a_line(store: Path) -> None:
    bench = [sys.executable, "training/stream_bench.py", str(store), "--batch-size", "1000000", "--prefetch", "1000"]
    limited = ["bash", "-c", 'ulimit -v 33554432; exec "$@"', "bash", *bench]  # KiB
    done = subprocess.run(limited, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: no memory for 1001 batches of 1000000 examples, [0-9,.]+ GB \(prefetch 1000, columns block.*; take "
        "smaller batches, less prefetch, or fewer columns\n",
        done.stderr,
    ), done.stderr
