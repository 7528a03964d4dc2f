"""One stage of training, from top to bottom: read `train` as the table of contents."""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from composer import Trainer
from composer.core import State
from composer.utils import dist, get_device

from training.checkpoints.checkpoint import Checkpoints, StopRequest
from training.checkpoints.history import History
from training.checkpoints.mark import MARK, checkpoint_folders, folder_of
from training.config import TrainConfig
from training.engines import engine_of
from training.engines.base import Engine
from training.engines.weights import memory_returned
from training.fit.evaluation import Evaluation, Plan, refuse_unlearnable
from training.fit.finding import ThisRank, run_check
from training.fit.mixture import mixture_lines
from training.fit.needs import end_needs, host_memory, needs, refuse_unready
from training.fit.optimizer import build_optimizer
from training.fit.parts import Parts, learned_too, open_parts
from training.fit.preview import preview
from training.fit.quiz import open_quiz
from training.fit.run_folder import begin_anew, claim, finish, held, what_it_holds
from training.fit.trainer import build_trainer, wait_s
from training.fit.watch import Watch


def train(config: TrainConfig, check_only: bool = False) -> None:
    """One stage: store -> stream -> model -> Composer -> exported weights and `summary.json` in `config.run`.

    Raises:
        SystemExit: with a message if store, model and configuration do not fit each other, before anything is trained,
            or if the end cannot be written, which the same command then does again; with 128 + the signal's number if
            a scheduler stopped it: after the step under way and a checkpoint.
    """
    with ExitStack() as until_the_end:
        # First of all: a signal that comes while the model loads is not lost. One that only looks dies of it.
        stop = None if check_only else until_the_end.enter_context(StopRequest())
        _train(config, stop, until_the_end)


def _train(config: TrainConfig, stop: StopRequest | None, until_the_end: ExitStack) -> None:
    """The stage, or without `stop` only a look at it; `until_the_end` keeps the run's folder."""
    dist.initialize_dist(get_device(None if config.device == "auto" else config.device), timeout=wait_s(config))
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    watch = until_the_end.enter_context(Watch(config.hang_s, wait_s(config)))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    # All that a user can have got wrong is found in here, before the first step.
    try:
        until_the_end.enter_context(held(config, stop))
        if stop is not None and (complete := what_it_holds(config)):
            if rank == 0:
                print(complete, flush=True)
            return
        parts = open_parts(config, rank, ranks)
        if parts.held_out is not None:
            refuse_unlearnable(parts.held_out)
        engine = engine_of(config, ranks)
        open_quiz(config, parts, engine)  # what is wrong with it is said before anything is loaded
        steps = config.steps or config.epochs * len(parts.stream)
        if rank == 0:
            print(describe(config, parts, steps, ranks), flush=True)
        here = ThisRank(rank, ranks, dist.get_local_rank(), dist.get_local_world_size(), planned=ranks)
        ending = run_check("host", lambda: host_memory(config, parts.store, parts.model, here))
        if rank == 0 and (stop is None or not all_done(config, steps)):  # else it exports now, and says it then
            ending += end_needs(config, parts.store, parts.model)
        if stop is None and rank == 0:
            found = needs(config, parts.model, here) + ending
            print(preview(config, parts, build_optimizer(parts.model, config.optimizer), found), flush=True)
        refuse_unready(ending)
        if stop is None:
            return
        with memory_returned():
            trainer, checkpoints, evaluation = build_trainer(config, parts, engine, steps, stop, watch)
        if not trainer.state.timestamp.batch.value:
            begin_anew(config)
        claim(config, parts)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    fit(trainer, checkpoints, evaluation, steps)
    if not checkpoints.stopped:
        end(config, parts, engine, trainer.state, checkpoints.history)
    dist.barrier()
    trainer.close()
    if checkpoints.stopped:
        print(f"stopped   by signal {checkpoints.stopped} after a checkpoint; the same command goes on", flush=True)
        sys.exit(128 + checkpoints.stopped)


def all_done(config: TrainConfig, steps: int) -> bool:
    """Whether a checkpoint on this disk is of the last step: of all, or of those up to an early end."""
    marked = [path for path in checkpoint_folders(Path(config.run) / "checkpoints") if (path / MARK).is_file()]
    if not marked:
        return False
    history, validation = History(), config.data.validation
    with suppress(ValueError):  # a damaged file: that is found, and said, when the checkpoint is looked at
        history.take_up(marked[-1])
    early = validation is not None and history.over(validation.patience)
    return early or marked[-1].name == folder_of(steps)


def fit(trainer: Trainer, checkpoints: Checkpoints, evaluation: Evaluation | None, steps: int) -> None:
    """Do the steps that are left. A collective.

    Raises:
        SystemExit: with a message if the disk or the bucket fails.
    """
    try:
        done, early = trainer.state.timestamp.batch.value, evaluation is not None and evaluation.over
        if done < steps and not early:
            trainer.fit()
            return
        if dist.get_global_rank() == 0:  # it ended after its last step, and before its end was done
            said = f"it ended early, after step {done}" if early else f"all {steps} steps are done"
            print(f"trained   {said}; what is left is to export their weights", flush=True)
        if evaluation is not None:
            evaluation.catch_up(trainer.state, trainer.logger)
        checkpoints.stopped = checkpoints.stop.agreed
        checkpoints.upload_again(trainer.state, trainer.logger)
    except OSError as error:
        wrong = _told(error, checkpoints.folder.parent)
        sys.exit(f"error: {wrong}; mend that and run the same command again: it goes on from its last checkpoint")


def _told(error: Exception, run: Path) -> str:
    """What went wrong; with the run's folder, where the system does not say which file could not be written."""
    nameless = isinstance(error, OSError) and error.errno is not None and error.filename is None
    return f"{run}: {error}" if nameless else str(error)


def end(config: TrainConfig, parts: Parts, engine: Engine, state: State, history: History) -> None:
    """Do what is left after the last step. A collective.

    Raises:
        SystemExit: on every rank, with a message, if rank 0 could not write it; the same command then tries again.
    """
    wrong = ""
    try:
        with memory_returned():
            finish(config, parts, engine, state, history)
    except (ValueError, OSError) as error:
        wrong = _told(error, Path(config.run))
    wrong = dist.all_gather_object(wrong)[0]  # the others wait here for what rank 0 writes
    if wrong:
        sys.exit(f"error: {wrong}\nall steps are done: mend that and run the same command again, it only exports")


def describe(config: TrainConfig, parts: Parts, steps: int, ranks: int) -> str:
    """What is about to be trained, for a person."""
    store, model = parts.store, parts.model
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    patches = store.encoder.grid**2
    return (
        f"run       {config.run}\n"
        f"{mixture_lines(config, parts.stream)}, columns {', '.join(model.connector.columns)}\n"
        f"connector {config.model.connector.arm}: {patches} patch tokens -> {model.connector.tokens} vision tokens\n"
        f"learning  {', '.join(config.train)}: {learning:,} parameters; frozen: {frozen:,}\n"
        f"batches   {config.global_batch_size} examples over {ranks} rank(s); "
        f"{len(parts.stream)} per epoch, {steps} steps in all" + _held_out(config, parts, steps)
    )


def _held_out(config: TrainConfig, parts: Parts, steps: int) -> str:
    """What is measured on, when and what that costs; and the images that are learned from all the same."""
    plan = Plan.of(config, parts, steps)
    if plan is None or parts.held_out is None:
        return ""
    times = plan.left(0)
    batches = times * len(parts.held_out)
    both = learned_too(parts.held_out, parts.stream)
    text = (
        f"\nheld out  {len(parts.held_out.examples)} examples, {len(parts.held_out.images())} images; "
        f"evaluations: {times}, {len(parts.held_out)} batches each, {batches / (steps + batches):.1%} of all batches, "
        "without a backward pass"
    )
    return text + (f"\nheld out  {both}" if both else "")
