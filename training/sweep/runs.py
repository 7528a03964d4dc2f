"""The runs of an ablation, one after another: both stages and the answers of an arm with a seed."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from training.answers.answer import answer_all
from training.answers.processes import AnsweringProcess
from training.benchmarks.questions import Benchmark
from training.release.records import CONFIG, SUMMARY, Summary, read_as, read_config, write_whole
from training.sweep.plan import DONE, STAGES, AblationConfig, Done, Run, asked


def do_runs(runs: Sequence[Run], benchmarks: Sequence[Benchmark], config: AblationConfig) -> list[Run]:
    """Train and ask what is not done yet; returns those that failed, each with its reason on stderr.

    One process goes on with the next run. Of several all end, for some may wait for the one that failed.

    Raises:
        ValueError: if `done.json` of a run is damaged.
        SystemExit: if a scheduler stopped it, as `fit.stage.train`; with several processes also if a run failed.
    """
    questions = asked(config, benchmarks)
    alone = AnsweringProcess.of_environment().world_size == 1
    failed: list[Run] = []
    for number, run in enumerate(runs, 1):
        if not run.has_answered(questions):
            if is_first_rank():
                print(f"run {number} of {len(runs)}: {run.arm.name}, seed {run.seed}", flush=True)
            try:
                _do(run, benchmarks, config)
            except (Exception, SystemExit) as error:
                if not alone or (isinstance(error, SystemExit) and isinstance(error.code, int)):
                    raise
                if not isinstance(error, SystemExit | ValueError | OSError):
                    traceback.print_exc()  # nobody foresaw it: only where it happened helps
                print(f"{run.folder} failed: {error}".replace(": error: ", ": "), file=sys.stderr, flush=True)
                failed.append(run)
            _free_memory()
    return failed


def refuse_others(runs: Sequence[Run]) -> None:
    """A table mixes no runs of different settings.

    Raises:
        ValueError: if the folder of a run holds one with other settings, or files of it are damaged.
    """
    begun = [config for run in runs for config in run.stages.values() if Path(config.run, CONFIG).exists()]
    if begun:
        from training.fit.identity import refuse_another

        for config in begun:
            # The whole folder may have been moved: stage 2 began from the stage 1 that lies beside it.
            before = read_config(Path(config.run)).model.connector_from
            model = config.model.model_copy(update={"connector_from": before})
            refuse_another(config.model_copy(update={"model": model}))


def is_first_rank() -> bool:
    """Whether this process is the one that prints and writes."""
    return AnsweringProcess.of_environment().rank == 0


def _do(run: Run, benchmarks: Sequence[Benchmark], config: AblationConfig) -> None:
    """Both stages and all answers that are missing; `done.json` is written last and keeps the seconds of each."""
    from training.fit.stage import train

    for stage in STAGES:
        if not (run.folder / stage / SUMMARY).exists():
            train(run.stages[stage])
            _free_memory()
    start = time.perf_counter()
    model = str(run.folder / "finetune" / "model")
    for each in benchmarks:
        answer_all(model, each, each.answers_in(run.folder), config.batch_size, config.max_new_tokens)
    if is_first_rank():
        # Of all steps and all answers, however often the run was killed on its way.
        train_s = sum(read_as(Summary, run.folder / stage / SUMMARY).seconds for stage in STAGES)
        before = run.done()
        answer_s = time.perf_counter() - start + (before.answer if before else 0.0)
        done = Done(train=train_s, answer=answer_s, asked=asked(config, benchmarks))
        write_whole(run.folder / DONE, done.model_dump_json())


def _free_memory() -> None:
    """Give back what a model and its optimizer took: they are held in circles of references."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
