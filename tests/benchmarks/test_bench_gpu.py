"""The benchmark for a GPU machine, every row of it on tiny models and without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).with_name("bench_gpu.py")
pytestmark = pytest.mark.slow(minutes=2)
EXPECTED = {
    "device": ["bf16 matrix product", "copy on the device", "host to device, pinned", "decode int8, 8 blocks"],
    "train": ["stage 2, LoRA", "stage 2, full", "stage 1, bare loop", "stage 1", "attention, 16 x 256"],
    "small": ["stage 2, full", "stage 2, full, checkpointing"],
    "encode": ["forward, 8 blocks, batch 2", "decoding", "JPEGs to shards, bf16", "JPEGs to shards, int8"],
    "generate": ["batch 1, 36 vision tokens", "batch 2, 144 vision tokens"],
    "ranks": ["all-reduce of 512 MB", "saved, killed, resumed"],
}


def bench(out: Path, *words: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, rows of gpu.json, and what was printed."""
    command = [sys.executable, str(BENCH), "--cpu", "--out", str(out), *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    said = done.stdout + done.stderr + (out / "gpu.log").read_text()[-3000:]
    return done.returncode, json.loads((out / "gpu.json").read_text())["rows"], said


def test_every_row_works_without_a_gpu(tmp_path: Path, hang_s: int) -> None:
    code, rows, said = bench(tmp_path, "--minutes", str(hang_s / 60))
    assert code == 0, said
    found = {(row["part"], row["row"]) for row in rows}
    assert {(part, name) for part, names in EXPECTED.items() for name in names} <= found
    assert not [row for row in rows if "error" in row or "skipped" in row]
    by_name = {(row["part"], row["row"]): row for row in rows}
    assert by_name["ranks", "saved, killed, resumed"]["bit_equal"]
    for part, row in (("train", "stage 1"), ("small", "stage 2, full"), ("encode", "JPEGs to shards, bf16")):
        assert by_name[part, row]["x"] > 0 and by_name[part, row]["peer"]
    assert by_name["train", "stage 1"]["of_limit"] > 0


def test_what_does_not_fit_the_minutes_is_a_row_that_says_so(tmp_path: Path) -> None:
    code, rows, said = bench(tmp_path, "--minutes", "0.3", "--parts", "device", "train")
    assert code == 0, said
    assert rows[-1]["part"] == "train" and rows[-1]["skipped"].startswith("no time left after")


def test_a_row_that_fails_is_a_row_and_the_others_are_measured(tmp_path: Path) -> None:
    script = (
        "import time; from pathlib import Path; from gpu_part import Job, Rows\n"
        f"rows = Rows(Job('part', time.time(), 100, Path({str(tmp_path)!r}), True, {{}}))\n"
        "rows.row('bad', lambda: 1 / 0)\n"
        "rows.row('good', lambda: {'x': 2.0})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(BENCH.parent)}
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment)
    said = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    assert [row["row"] for row in said] == ["start-up", "bad", "good"]
    assert said[1]["error"] == "ZeroDivisionError: division by zero" and said[2]["x"] == 2.0
