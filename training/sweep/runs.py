"""The runs of an ablation, one after another: both stages and the answers of an arm with a seed."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

from training.answers.answer import answer_all
from training.answers.processes import AnsweringProcess
from training.benchmarks.questions import Benchmark
from training.release.records import SUMMARY, write_whole
from training.sweep.plan import STAGES, AblationConfig, Run, Seconds


def do_runs(runs: Sequence[Run], benchmarks: Sequence[Benchmark], config: AblationConfig) -> None:
    """Train and ask what is not done yet."""
    for number, run in enumerate(runs, 1):
        if not run.done.exists():
            if is_first_rank():
                print(f"run {number} of {len(runs)}: {run.arm.name}, seed {run.seed}", flush=True)
            _do(run, benchmarks, config)


def is_first_rank() -> bool:
    """Whether this process is the one that prints and writes."""
    return AnsweringProcess.of_environment().rank == 0


def _do(run: Run, benchmarks: Sequence[Benchmark], config: AblationConfig) -> None:
    """Both stages and all answers; `done.json` is written last and keeps the seconds of each."""
    import torch

    from training.fit.stage import train

    start = time.perf_counter()
    for stage in STAGES:
        if not (run.folder / stage / SUMMARY).exists():
            train(run.stages[stage])
            gc.collect()  # a model and its optimizer are held in circles of references
            torch.cuda.empty_cache()
    trained = time.perf_counter()
    model = str(run.folder / "finetune" / "model")
    for each in benchmarks:
        answer_all(model, each, each.answers_in(run.folder), config.batch_size, config.max_new_tokens)
    if is_first_rank():
        seconds = Seconds(train=trained - start, answer=time.perf_counter() - trained)
        write_whole(run.done, seconds.model_dump_json())
