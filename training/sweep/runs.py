"""The runs of an ablation, one after another: both stages and the answers of an arm with a seed."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence

from training.answers.answer import Ranks, answer_all
from training.sweep.plan import STAGES, Run
from training.sweep.questions import Questions


def do_runs(runs: Sequence[Run], questions: Sequence[Questions], batch_size: int) -> None:
    """Train and ask what is not done yet; `batch_size` questions are answered at once."""
    for number, run in enumerate(runs, 1):
        if not run.done.exists():
            if is_first_rank():
                print(f"run {number} of {len(runs)}: {run.arm.name}, seed {run.seed}", flush=True)
            _do(run, questions, batch_size)


def is_first_rank() -> bool:
    """Whether this process is the one that prints and writes."""
    return Ranks.of_environment().rank == 0


def _do(run: Run, questions: Sequence[Questions], batch_size: int) -> None:
    """Both stages and all answers; `done.json` is written last and keeps the seconds of each."""
    import torch

    from training.train import train

    start = time.perf_counter()
    for stage in STAGES:
        if not (run.folder / stage / "summary.json").exists():
            train(run.stages[stage])
            gc.collect()  # a model and its optimizer are held in circles of references
            torch.cuda.empty_cache()
    trained = time.perf_counter()
    model = str(run.folder / "finetune" / "model")
    for each in questions:
        answer_all(model, each.asked, each.image, run.folder / each.file, batch_size, each.max_new_tokens)
    if is_first_rank():
        seconds = {"train": trained - start, "answer": time.perf_counter() - trained}
        run.done.write_text(json.dumps(seconds), encoding="utf-8")
