"""Composer's Trainer over the stream: loss weighting, schedule, checkpoints, one line per step."""

from __future__ import annotations

from pathlib import Path

import torch
from composer import Trainer
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader

from training.checkpoints.checkpoint import Checkpoints, StopRequest
from training.checkpoints.history import History
from training.checkpoints.resume import RandomStates, find
from training.checkpoints.safe import evaluated_names, only_data
from training.config import TrainConfig
from training.cost.mfu import StepFlops
from training.engines.base import Engine
from training.fit.callbacks import StepLog, StopOnBadLoss, boards
from training.fit.composer_model import TrainableModel, microbatches, token_counts
from training.fit.evaluation import Evaluation, Plan
from training.fit.mixture import LossByStore
from training.fit.optimizer import build_optimizer, build_schedule
from training.fit.pace import SlowRanks
from training.fit.parts import Parts
from training.fit.quiz import open_quiz
from training.fit.skipped import SkippedExamples
from training.fit.watch import Watch
from training.stream.batch import Batch

WAIT_S = 1800  # for the other ranks, in a collective


def wait_s(config: TrainConfig) -> float:
    """Seconds that a rank waits for the others in a collective: also while the first waits for a bucket."""
    return max(WAIT_S, config.checkpoint.remote_patience_s + 600)


def build_trainer(
    config: TrainConfig, parts: Parts, engine: Engine, steps: int, stop: StopRequest, watch: Watch
) -> tuple[Trainer, Checkpoints, Evaluation | None]:
    """The trainer, gone back to the newest checkpoint of the run if there is one; what saves the next ones; and what
    measures on held-out examples, if there are any.

    Raises:
        ValueError: if the engine refuses the settings or the checkpoint. OSError: if a checkpoint cannot be read.
    """
    run, model = Path(config.run), parts.model
    left_out = engine.left_out(model)
    latest = find(run / "checkpoints", config.checkpoint, engine)
    by_store = LossByStore(len(parts.stream.stores))
    log = StepLog(run, parts.stream, steps, engine, StepFlops(model, config.train), by_store)
    plan = Plan.of(config, parts, steps)
    evaluation = None if plan is None else Evaluation(parts, plan, engine, stop, watch, log)
    if evaluation is not None:
        evaluation.quiz = open_quiz(config, parts, engine)
    history = History() if evaluation is None else evaluation.history
    if latest is not None and not history.take_up(latest.parent) and dist.get_global_rank() == 0:
        print("held out  other examples than before: which checkpoint is the best begins anew", flush=True)
    checkpoints = Checkpoints(run / "checkpoints", config.checkpoint, engine, stop, left_out, history)
    engine.place(model)
    optimizer = build_optimizer(model, config.optimizer)
    settings = {
        "model": _trainable(config, parts),
        "train_dataloader": _data(parts),
        "optimizers": optimizer,
        "schedulers": build_schedule(optimizer, steps, config.optimizer.warmup_ratio),  # moved on after each step
        "step_schedulers_every_batch": True,
        "max_duration": f"{steps}ba",
        "device_train_microbatch_size": engine.microbatch_size(),
        "accumulate_train_batch_on_tokens": config.loss == "global",
        "callbacks": [
            SkippedExamples(run, parts.stream, steps, config.data.max_skipped, stop),  # before `checkpoints`: it agrees
            by_store,  # before `StopOnBadLoss`, which reads it
            StopOnBadLoss(config.stop_on_spike, engine, by_store),
            *([] if evaluation is None else [evaluation]),  # before `checkpoints`: what is best is saved
            SlowRanks(parts.stream),
            watch,
            checkpoints,
        ],
        "loggers": [*boards(config.boards, run, config.project), log],
        "device": None if config.device == "auto" else config.device,
        "seed": config.seed,
        "run_name": "train",
        "load_path": None if latest is None else str(latest),
        "load_exclude_algorithms": None if latest is None else evaluated_names(),
        "load_strict_model_weights": not left_out,  # frozen weights are not in checkpoints
        "progress_bar": False,
        "dist_timeout": wait_s(config),
    }
    with only_data(engine.name):
        trainer = engine.trainer(left_out, settings)
    trainer.state.callbacks.append(RandomStates(trainer))
    return trainer, checkpoints, evaluation


def _trainable(config: TrainConfig, parts: Parts) -> TrainableModel:
    """The model as Composer takes it, fed with the store's columns."""
    columns = tuple(next(c for c in parts.store.columns if c.name == name) for name in parts.model.connector.columns)
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    return TrainableModel(parts.model, columns, parts.store.codec, dtype)


def _data(parts: Parts) -> DataSpec:
    """The stream as Composer takes it.

    Composer saves and restores the position of a DataLoader's dataset, of nothing else. The batches are ready: the
    DataLoader hands them on as they are. On their way to the device they lose their class, for whose sake Composer does
    not copy all features of a microbatch once more.
    """
    given = (parts.model.config.image_token_id, torch.cuda.is_available(), len(parts.stream.stores))
    return DataSpec(
        DataLoader(parts.stream, batch_size=None, num_workers=0, collate_fn=lambda batch: batch),
        split_batch=lambda batch, size: microbatches(batch, size, *given),
        microbatch_transforms=Batch,
        get_num_samples_in_batch=lambda batch: len(batch["keys"]),
        get_num_tokens_in_batch=token_counts,
    )
