"""The benchmark for a GPU machine, every row of it on tiny models and without one."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

BENCH = Path(__file__).with_name("bench_gpu.py")
EXPECTED = {
    "device": ["bf16 matrix product", "copy on the device", "host to device, pinned", "decode int8, 8 blocks"],
    "train": ["stage 2, LoRA", "stage 2, full", "stage 1, bare loop", "stage 1", "stage 1, compiled"],
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


@pytest.mark.slow
@pytest.mark.minutes(2)
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


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench_gpu.py, imported."""
    monkeypatch.syspath_prepend(str(BENCH.parent))
    return importlib.import_module("bench_gpu")


def test_a_part_that_does_not_end_is_stopped_and_said(module: Any, tmp_path: Path) -> None:
    (tmp_path / "gpu_train.py").write_text("while True: pass")
    table = module.Table(tmp_path)
    module.run_part("train", 2, table, tmp_path, True, tmp_path)
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert row["row"] == "the rest" and row["skipped"] == "no time left after nothing"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_benchmark_that_is_told_to_stop_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    script = (
        "import sys; from pathlib import Path; import bench_gpu as b\n"
        f"b.PARTS = {{'device': (1, '')}}; b.HERE = here = Path({str(tmp_path)!r})\n"
        "b.run_part.__defaults__ = (here,)\n"
        f"sys.argv[1:] = ['--out', {str(tmp_path)!r}]; b.main()\n"
    )
    child = tmp_path / "child"
    (tmp_path / "gpu_device.py").write_text(
        "import json, os, sys, time; from pathlib import Path\n"
        f"part = Path({str(child)!r} + '.part'); part.write_text(f\"{{os.getpid()}} {{os.environ['TMPDIR']}}\")\n"
        f"part.rename({str(child)!r})\n"
        "while True: time.sleep(1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(BENCH.parent)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL)
    while not child.exists():
        assert process.poll() is None
        time.sleep(0.02)
    pid, scratch = child.read_text().split()
    process.send_signal(number)
    assert process.wait() != 0
    assert not psutil.pid_exists(int(pid)) and not Path(scratch).exists()


def test_a_row_that_fails_is_a_row_and_the_others_are_measured(tmp_path: Path) -> None:
    script = (
        "import time; from pathlib import Path; from gpu_part import Job, Rows\n"
        f"rows = Rows(Job('part', time.time(), 100, Path({str(tmp_path)!r}), True, {{}}))\n"
        "rows.row('bad', lambda: 1 / 0)\n"
        "rows.row('good', lambda: {'x': 2.0})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (BENCH.parents[1], BENCH.parent / "gpu")))}
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment)
    said = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    assert [row["row"] for row in said] == ["start-up", "bad", "good"]
    assert said[1]["error"] == "ZeroDivisionError: division by zero" and said[2]["x"] == 2.0
