#!/usr/bin/env python
"""Train one stage: `composer training/train.py training/finetune.yaml key=value ...`.

Read `main` and `train` top to bottom: they are the table of contents.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Run as a file, or from a YAML file beside it, Python looks in this folder first.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root

from pipeline.config import ConfigError, load_config
from training.config import TrainConfig

if TYPE_CHECKING:
    from composer import Trainer

    from pipeline.schema import StoreSpec
    from training.checkpoints.checkpoint import Checkpoints, StopRequest
    from training.model.model import CompactVisionForConditionalGeneration
    from training.model.tokenizer import Tokenizer
    from training.stream.stream import Stream


def main(config_file: str | None = None) -> None:
    """Command line: CONFIG.yaml key=value ...; a YAML file that starts itself passes its own path."""
    parser = argparse.ArgumentParser(prog="composer training/train.py", description=__doc__)
    if config_file is None:
        parser.add_argument("config", help="YAML file, e.g. training/finetune.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. data.store=s3://bucket/store steps=100")
    parser.add_argument("--check", action="store_true", help="say what would be trained, on what, and stop")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(TrainConfig, config_file or arguments.config, arguments.settings)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    train(config, check_only=arguments.check)


def train(config: TrainConfig, check_only: bool = False) -> None:
    """One stage: store -> stream -> model -> Composer -> exported weights and `summary.json` in `config.run`.

    Raises:
        SystemExit: with a message if store, model and configuration do not fit each other, before anything is trained;
            with 128 + the signal's number if a scheduler stopped it: after the step under way and a checkpoint.
    """
    import torch
    from composer.utils import dist, get_device

    from training.checkpoints.checkpoint import StopRequest

    stop = StopRequest()
    device = get_device(None if config.device == "auto" else config.device)
    dist.initialize_dist(device, timeout=1800)
    _tell_nodes_apart()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        _claim_run_folder(config, write=not check_only)
        tokenizer, store, model, stream = assemble(config, dist.get_global_rank(), dist.get_world_size())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    steps = config.steps or config.epochs * len(stream)
    if dist.get_global_rank() == 0:
        print(describe(config, store, model, stream, steps, dist.get_world_size()), flush=True)
    if check_only:
        if dist.get_global_rank() == 0:
            from training.fit.optimizer import build_optimizer
            from training.fit.preview import preview

            print(preview(config, model, build_optimizer(model, config.optimizer), tokenizer, stream), flush=True)
        return
    try:
        trainer, checkpoints = build_trainer(config, store, model, stream, steps, stop)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    trainer.fit()
    if not checkpoints.stopped:
        finish(config, store, tokenizer, model, trainer, steps)
    dist.barrier()
    trainer.close()
    if checkpoints.stopped:
        print(f"stopped   by signal {checkpoints.stopped} after a checkpoint; the same command goes on", flush=True)
        sys.exit(128 + checkpoints.stopped)


def assemble(
    config: TrainConfig, rank: int, world_size: int
) -> tuple[Tokenizer, StoreSpec, CompactVisionForConditionalGeneration, Stream]:
    """Load what the configuration names and check that the parts fit; nothing is trained yet."""
    from pipeline.manifest import read_store
    from pipeline.storage import Storage
    from training.fit.assemble import build_model, load_tokenizer
    from training.stream.order import Order
    from training.stream.reader import Reading
    from training.stream.stream import Stream
    from training.text.collate import Collator

    config.per_rank(world_size)
    store = read_store(Storage(config.data.store))
    tokenizer = load_tokenizer(config)
    model = build_model(config, store)
    data = config.data
    order = Order.of(data, config.global_batch_size)
    reading = Reading.of(data, rank, world_size, pin_memory=_has_gpu())
    image_tokens, image_id = model.connector.tokens, model.config.image_token_id
    collator = Collator(tokenizer, data.template, data.max_length, image_tokens, image_id)
    stream = Stream(data.store, model.connector.columns, order, reading, collator)
    if len(stream) == 0:
        raise ValueError(
            f"{data.store} holds fewer examples than one global batch of {config.global_batch_size}; "
            "lower global_batch_size or set data.last_batch=pad"
        )
    return tokenizer, store, model, stream


def build_trainer(
    config: TrainConfig,
    store: StoreSpec,
    model: CompactVisionForConditionalGeneration,
    stream: Stream,
    steps: int,
    stop: StopRequest,
) -> tuple[Trainer, Checkpoints]:
    """Composer's Trainer over the stream: loss weighting, schedule, checkpoints, one line per step."""
    import torch
    from composer.core import DataSpec
    from composer.utils import dist
    from torch.utils.data import DataLoader

    from training.checkpoints.checkpoint import Checkpoints, find
    from training.cost.mfu import StepFlops
    from training.engines.engine import engine_of, make_trainer, microbatch_size
    from training.fit.callbacks import StepLog, StopOnBadLoss, boards
    from training.fit.composer_model import TrainableModel, token_counts
    from training.fit.optimizer import build_optimizer, build_schedule
    from training.stream.batch import split

    columns = tuple(next(c for c in store.columns if c.name == name) for name in model.connector.columns)
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    run, frozen = Path(config.run), _frozen_keys(config, model)
    # Composer asks a real DataLoader for its dataset's state; batches come ready-made, so it must not touch them.
    loader = DataLoader(stream, batch_size=None, num_workers=0, collate_fn=_unchanged)
    data = DataSpec(
        loader,
        split_batch=split,
        get_num_samples_in_batch=lambda batch: len(batch["keys"]),
        get_num_tokens_in_batch=token_counts,
    )
    engine = engine_of(config, dist.get_world_size())
    checkpoints = Checkpoints(run / "checkpoints", config.checkpoint, engine, stop, frozen)
    latest = find(run / "checkpoints", config.checkpoint, engine)
    log = StepLog(run / "log.jsonl", stream, steps, config.optimizer.clip_grad_norm, StepFlops(model, config.train))
    optimizer = build_optimizer(model, config.optimizer)
    trainer = make_trainer(
        config,
        frozen,
        model=TrainableModel(model, columns, store.codec, dtype),
        train_dataloader=data,
        optimizers=optimizer,
        schedulers=build_schedule(optimizer, steps, config.optimizer.warmup_ratio),
        step_schedulers_every_batch=True,
        max_duration=f"{steps}ba",
        device_train_microbatch_size=microbatch_size(config, dist.get_world_size()),
        accumulate_train_batch_on_tokens=config.loss == "global",
        callbacks=[StopOnBadLoss(config.stop_on_spike), checkpoints],
        loggers=[*boards(config.boards, run, config.project), log],
        device=None if config.device == "auto" else config.device,
        seed=config.seed,
        run_name="train",
        load_path=None if latest is None else str(latest),
        load_strict_model_weights=not frozen,
        progress_bar=False,
        dist_timeout=1800,
    )
    return trainer, checkpoints


def _tell_nodes_apart() -> None:
    """Composer lets a node wait for a file that it names alike on all nodes: on a shared disk one removes another's."""
    from composer.utils import dist

    name = dist.get_node_signal_file_name
    dist.get_node_signal_file_name = lambda rng=None: f"{name(rng)}_{dist.get_node_rank()}"


def _unchanged(batch: Any) -> Any:
    return batch


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _frozen_keys(config: TrainConfig, model: CompactVisionForConditionalGeneration) -> list[str]:
    """Checkpoints leave out frozen weights, which are read from where they came from again."""
    if config.parallelism.startswith("zero"):
        return []  # the engine's shards leave them out, Composer's file has no weights
    if all(p.requires_grad for p in model.llm.parameters()) and "connector" in config.train:
        return []
    return [f"state/model/model.{name}" for name, p in model.named_parameters() if not p.requires_grad]


def _claim_run_folder(config: TrainConfig, write: bool) -> None:
    """A run folder belongs to one configuration: say what differs instead of mixing two runs.

    Raises:
        ValueError: if the folder holds another run.
    """
    from composer.utils import dist

    path = Path(config.run) / "config.json"
    mine = config.model_dump(mode="json")
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        differing = [f"{k}: {theirs.get(k)!r} there, {mine[k]!r} now" for k in mine if theirs.get(k) != mine[k]]
        if differing:
            raise ValueError(
                f"{config.run} holds a run with other settings; take another run=..., or delete it:\n  "
                + "\n  ".join(differing)
            )
    dist.barrier()
    if write and dist.get_global_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mine, indent=1), encoding="utf-8")


def describe(
    config: TrainConfig,
    store: StoreSpec,
    model: CompactVisionForConditionalGeneration,
    stream: Stream,
    steps: int,
    world_size: int,
) -> str:
    """What is about to be trained, for a person."""
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    patches = store.encoder.grid**2
    return (
        f"run       {config.run}\n"
        f"store     {config.data.store}: {store.samples} images, codec {store.codec}, "
        f"columns {', '.join(model.connector.columns)}\n"
        f"connector {config.model.connector.arm}: {patches} patch tokens -> {model.connector.tokens} vision tokens\n"
        f"learning  {', '.join(config.train)}: {learning:,} parameters; frozen: {frozen:,}\n"
        f"batches   {config.global_batch_size} examples over {world_size} rank(s); "
        f"{len(stream)} per epoch, {steps} steps in all"
    )


def finish(
    config: TrainConfig,
    store: StoreSpec,
    tokenizer: Tokenizer,
    model: CompactVisionForConditionalGeneration,
    trainer: Trainer,
    steps: int,
) -> None:
    """Write what the next stage needs, then `summary.json`: its presence says that the stage is complete.

    A collective, as the ranks may hold parts of the weights; rank 0 writes.
    """
    from composer.utils import dist

    from training.engines.engine import whole_weights
    from training.fit.assemble import is_exported, whole_model
    from training.release.connector import export_connector
    from training.release.folder import export_model

    weights = whole_weights(trainer.state, lambda name: is_exported(config, name))
    if dist.get_global_rank() != 0:
        return
    run = Path(config.run)
    whole = whole_model(config, model, weights)
    export_connector(whole.connector, run / "connector")
    if "llm" in config.train:
        export_model(whole, tokenizer, store, run / "model", run=run)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = {
        "steps": steps,
        "loss_first": lines[0]["loss"],
        "loss_last": lines[-1]["loss"],
        "seconds": round(sum(line["step_s"] for line in lines), 2),
        "data_wait": sum(line["data_wait"] * line["step_s"] for line in lines) / sum(line["step_s"] for line in lines),
        "vision_tokens_in": store.encoder.grid**2,
        "vision_tokens_out": model.connector.tokens,
    }
    (run / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    print(f"done      loss {summary['loss_first']:.4f} -> {summary['loss_last']:.4f}; weights in {run}", flush=True)


if __name__ == "__main__":
    main()
