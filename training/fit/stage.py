"""One stage of training, from top to bottom: read `train` as the table of contents."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import torch
from composer.utils import dist, get_device

from training.checkpoints.checkpoint import StopRequest
from training.config import TrainConfig
from training.engines import engine_of
from training.fit.finding import ThisRank
from training.fit.needs import refuse_unready
from training.fit.optimizer import build_optimizer
from training.fit.parts import Parts, open_parts
from training.fit.preview import preview
from training.fit.run_folder import claim, finish, held
from training.fit.trainer import WAIT_S, build_trainer


def train(config: TrainConfig, check_only: bool = False) -> None:
    """One stage: store -> stream -> model -> Composer -> exported weights and `summary.json` in `config.run`.

    Raises:
        SystemExit: with a message if store, model and configuration do not fit each other, before anything is trained;
            with 128 + the signal's number if a scheduler stopped it: after the step under way and a checkpoint.
    """
    with ExitStack() as until_the_end:
        # First of all: a signal that comes while the model loads is not lost. One that only looks dies of it.
        stop = None if check_only else until_the_end.enter_context(StopRequest())
        _train(config, stop, until_the_end)


def _train(config: TrainConfig, stop: StopRequest | None, until_the_end: ExitStack) -> None:
    """The stage, or without `stop` only a look at it; `until_the_end` keeps the run's folder."""
    dist.initialize_dist(get_device(None if config.device == "auto" else config.device), timeout=WAIT_S)
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    # All that a user can have got wrong is found in here, before the first step.
    try:
        until_the_end.enter_context(held(config, stop))
        parts = open_parts(config, rank, ranks)
        steps = config.steps or config.epochs * len(parts.stream)
        if rank == 0:
            print(describe(config, parts, steps, ranks), flush=True)
        if stop is None and rank == 0:
            here = ThisRank(rank, ranks, dist.get_local_rank(), dist.get_local_world_size(), planned=ranks)
            print(preview(config, parts, build_optimizer(parts.model, config.optimizer), here), flush=True)
        refuse_unready(config, parts.store, parts.model)
        if stop is None:
            return
        engine = engine_of(config, ranks)
        trainer, checkpoints = build_trainer(config, parts, engine, steps, stop)
        claim(config, parts)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    trainer.fit()
    if not checkpoints.stopped:
        finish(config, parts, engine, trainer.state, steps)
    dist.barrier()
    trainer.close()
    if checkpoints.stopped:
        print(f"stopped   by signal {checkpoints.stopped} after a checkpoint; the same command goes on", flush=True)
        sys.exit(128 + checkpoints.stopped)


def describe(config: TrainConfig, parts: Parts, steps: int, ranks: int) -> str:
    """What is about to be trained, for a person."""
    store, model = parts.store, parts.model
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    patches = store.encoder.grid**2
    return (
        f"run       {config.run}\n"
        f"store     {config.data.store}: {store.samples} images, codec {store.codec}, "
        f"columns {', '.join(model.connector.columns)}\n"
        f"connector {config.model.connector.arm}: {patches} patch tokens -> {model.connector.tokens} vision tokens\n"
        f"learning  {', '.join(config.train)}: {learning:,} parameters; frozen: {frozen:,}\n"
        f"batches   {config.global_batch_size} examples over {ranks} rank(s); "
        f"{len(parts.stream)} per epoch, {steps} steps in all"
    )
