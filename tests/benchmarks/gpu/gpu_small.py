"""bench_gpu.py, 1.3B: full tuning, with and without activation checkpointing."""

from __future__ import annotations

from gpu_part import Job
from gpu_train import beside, prepared


def main() -> None:
    """All rows of 1.3B."""
    job = Job.from_command_line()
    rows, bench = prepared(job, "1.3b")
    bare = rows.row("stage 2, full, bare loop", lambda: bench.bare(2), 8)
    plain = rows.row("stage 2, full", lambda: beside(bench.run(2), bare, "bare loop"), 8)
    saved = {"model__activation_checkpointing": True}
    rows.row("stage 2, full, checkpointing", lambda: beside(bench.run(2, **saved), plain, "without"), 8)


if __name__ == "__main__":
    main()
