#!/usr/bin/env python
"""The whole job on the GPU of this machine, in a few minutes, without network, weights or data: one table.

    python tests/benchmarks/bench_gpu.py --minutes 6 --out runs/bench/gpu    7B, 1.3B and CLIP ViT-L/14-336
    python tests/benchmarks/bench_gpu.py --cpu --out /tmp/gpu                every row on tiny models, no GPU needed

Models are made from their configurations, with random weights, on the device.

Rows come from one process per model, the most important ones first. Each is printed, and DIR/gpu.json written anew, as
soon as it is known; what else the processes say is in DIR/gpu.log. A row that fails is a row, with its error. The
minutes are never exceeded: a process that would is killed, and the rows that it still owed are named.

`of limit` is the share of what this very card reached in the first rows: its matrix products in bf16, or its copies.
`peer` is what the row is compared with, measured in the same run; `x` is how many times faster than the peer it is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SPARE_S = 8  # of the minutes, for killing what runs on and for the last table
DEVICE_S = 60  # at most for the limits, which all other rows are held against
ROOM = 20e9  # bytes


# Part -> (share of the minutes, what it measures). Each runs in a process of its own, `python gpu/gpu_PART.py`.
PARTS = {
    "device": (5, "the device: matrix products, copies; codecs decoded on it"),
    "train": (46, "7B: stage 2 with LoRA and in full, stage 1, their peers; padding mask, trace, torch.compile"),
    "small": (8, "1.3B: stage 2 in full, with and without activation checkpointing"),
    "encode": (13, "CLIP ViT-L/14-336, then from JPEGs to shards"),
    "generate": (14, "7B: prefill, first token, decoding, for 576 to 64 vision tokens"),
    "ranks": (14, "NCCL: all-reduce; a run that is saved, killed and resumed"),
}


def main() -> None:
    """Command line: run the parts one after another within the minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6, help="of everything together (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench/gpu", help="where gpu.json and gpu.log go")
    parser.add_argument("--cpu", action="store_true", help="tiny models on the CPU: do all rows work?")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these, and device first")
    arguments = parser.parse_args()
    if arguments.minutes * 60 <= 2 * SPARE_S:
        parser.error(f"--minutes {arguments.minutes:g} is too short: give at least 1")
    end = time.monotonic() + 60 * arguments.minutes - SPARE_S
    table = Table(arguments.out)
    for number in (signal.SIGTERM, signal.SIGINT):  # SIGINT too: a shell lets what it starts behind itself ignore it
        signal.signal(number, lambda stopped, _: sys.exit(128 + stopped))  # nothing is left behind
    scratch = Path(tempfile.mkdtemp(prefix="bench-gpu-", dir=in_memory()))
    parts = ["device", *(part for part in PARTS if part in arguments.parts and part != "device")]
    try:
        for number, part in enumerate(parts):
            shares = [PARTS[name][0] for name in parts[number:]]
            left = end - time.monotonic()
            share = max(left * shares[0] / sum(shares), DEVICE_S if part == "device" else 0)
            run_part(part, min(left, share), table, scratch, arguments.cpu)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    table.close()
    sys.exit(0 if table.rows and not table.failed else 1)


def in_memory() -> str | None:
    """Where stores and shards fit, some 12 GB: in memory, if a container gives it; else where temporary files go."""
    shared = "/dev/shm"
    return shared if Path(shared).is_dir() and shutil.disk_usage(shared).free > ROOM else None


class Table:
    """Rows as they come: printed, and all of them in gpu.json after each."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.log = out / "gpu.json", (out / "gpu.log").open("w", encoding="utf-8")
        self.rows: list[dict[str, Any]] = []
        self.failed = 0
        self.start = time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        """Print and keep a row: `part`, `row`, `seconds`, and figures, or `error`, or `skipped`."""
        self.rows.append(row)
        self.failed += "error" in row
        print(one_line(row), flush=True)
        seconds = round(time.monotonic() - self.start, 1)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"seconds": seconds, "rows": self.rows}, indent=1), encoding="utf-8")
        part.replace(self.path)

    def close(self) -> None:
        """Say how long it took."""
        self.log.close()
        said = f"{len(self.rows)} rows in {time.monotonic() - self.start:.0f} s, {self.failed} failed; {self.path}"
        print(said, flush=True)


def one_line(row: dict[str, Any]) -> str:
    """A row for a person."""
    head = f"{row['seconds']:6.1f} s  {row['part'] + ': ' + row['row']:<54}"
    if "error" in row:
        return f"{head} FAILED {row['error']}"
    if "skipped" in row:
        return f"{head} skipped: {row['skipped']}"
    hidden = ("part", "row", "seconds", "detail")
    return f"{head} " + "  ".join(f"{name} {_number(value)}" for name, value in row.items() if name not in hidden)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_part(part: str, seconds: float, table: Table, scratch: Path, cpu: bool, folder: Path = HERE / "gpu") -> None:
    """One process; its lines `ROW {json}` become rows. After `seconds` it is killed with all that it started."""
    limits = {row["row"]: row for row in table.rows if row["part"] == "device"}
    job = {
        "part": part,
        "began": time.time(),
        "seconds": seconds,
        "scratch": str(scratch),
        "cpu": cpu,
        "limits": limits,
    }
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(scratch)}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if cpu:  # one thread: tiny matrices, and threads that wait for each other burn the cores
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    start, last = time.monotonic(), "nothing"
    process = timer = None
    try:
        with _signals_wait():
            process = subprocess.Popen(
                [sys.executable, str(folder / f"gpu_{part}.py"), json.dumps(job)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=table.log,
                text=True,
                start_new_session=True,
            )
            timer = threading.Timer(seconds, _kill, [process])
            timer.daemon = True
            timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ROW "):
                row = {"part": part, **json.loads(line[4:])}
                table.add(row)
                last = row["row"]
            else:
                table.log.write(line)
        code, expired = process.wait(), not timer.is_alive()
    finally:  # also when this process is told to stop
        if timer is not None:
            timer.cancel()
        if process is not None:
            _kill(process)  # and what it started, if anything is left
            process.wait()
    took = round(time.monotonic() - start, 1)
    if expired and part == "device":
        table.add(
            {"part": part, "row": "the rest", "seconds": took, "error": f"the limits took too long, after {last}"}
        )
    elif expired:
        table.add({"part": part, "row": "the rest", "seconds": took, "skipped": f"no time left after {last}"})
    elif code:
        table.log.flush()
        error = f"ended with {code} after {last}; see {table.log.name}"
        table.add({"part": part, "row": "the rest", "seconds": took, "error": error})


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """SIGTERM and SIGINT are heard at the end of the block: whoever stops then knows the process that was started."""
    seen: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda heard, _: seen.append(heard))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in seen:
            signal.raise_signal(number)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    if importlib.util.find_spec("torch") is None:
        sys.exit("error: torch is not installed for this Python; see `make` and the README")
    main()
