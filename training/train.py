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

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

from pipeline.config import ConfigError, load_config
from training.config import TrainConfig

if TYPE_CHECKING:
    from composer import Trainer
    from composer.core import State

    from pipeline.schema import StoreSpec
    from training.model import CompactVisionForConditionalGeneration
    from training.stream import Stream
    from training.tokenizer import Tokenizer


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
        ValueError: if the store, the model and the configuration do not fit each other, before anything is trained.
    """
    import torch
    from composer.utils import dist, get_device

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
        return
    trainer = build_trainer(config, store, model, stream, steps)
    trainer.fit()
    if dist.get_global_rank() == 0:
        finish(config, store, tokenizer, model, steps)
    dist.barrier()
    trainer.close()


def assemble(
    config: TrainConfig, rank: int, world_size: int
) -> tuple[Tokenizer, StoreSpec, CompactVisionForConditionalGeneration, Stream]:
    """Load what the configuration names and check that the parts fit; nothing is trained yet."""
    from pipeline.manifest import read_store
    from pipeline.storage import Storage
    from training.assemble import build_model, load_tokenizer
    from training.batch import collate, encode
    from training.stream import Example, Stream

    config.per_rank(world_size)
    store = read_store(Storage(config.data.store))
    tokenizer = load_tokenizer(config)
    model = build_model(config, store)
    data = config.data

    def to_batch(examples: list[Example]) -> dict[str, Any]:
        encoded = [
            encode(
                [{"from": turn.speaker, "value": turn.value} for turn in example.conversation.turns],
                tokenizer,
                data.template,
                example.has_image,
                model.connector.tokens,
                data.max_length,
                model.config.image_token_id,
            )
            for example in examples
        ]
        return collate(encoded, tokenizer.pad_id)

    stream = Stream(
        data.store,
        columns=model.connector.columns,
        global_batch_size=config.global_batch_size,
        seed=data.seed,
        rank=rank,
        world_size=world_size,
        collate=to_batch,
        shuffle=data.shuffle,
        window_shards=data.window_shards,
        group_by_length=data.group_by_length,
        together=data.together,
        last_batch=data.last_batch,
        threads=data.threads,
        prefetch=data.prefetch,
        cache_dir=data.cache_dir,
        cache_bytes=int(data.cache_gb * 1e9),
        pin_memory=_has_gpu(),
        limit=data.limit,
    )
    if len(stream) == 0:
        raise ValueError(
            f"{data.store} holds fewer examples than one global batch of {config.global_batch_size}; "
            "lower global_batch_size or set data.last_batch=pad"
        )
    return tokenizer, store, model, stream


def build_trainer(
    config: TrainConfig, store: StoreSpec, model: CompactVisionForConditionalGeneration, stream: Stream, steps: int
) -> Trainer:
    """Composer's Trainer over the stream: loss weighting, schedule, checkpoints, one line per step."""
    import torch
    from composer import Trainer
    from composer.algorithms import GradientClipping
    from composer.core import DataSpec
    from torch.utils.data import DataLoader

    from training.callbacks import StepLog, StopOnNonFiniteLoss
    from training.composer_model import TrainableModel, token_counts
    from training.optimizer import build_optimizer, cosine_with_warmup
    from training.stream import split

    columns = tuple(next(c for c in store.columns if c.name == name) for name in model.connector.columns)
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    run = Path(config.run)
    clip = config.optimizer.clip_grad_norm
    # Composer asks a real DataLoader for its dataset's state; batches come ready-made, so it must not touch them.
    loader = DataLoader(stream, batch_size=None, num_workers=0, collate_fn=_unchanged)
    data = DataSpec(
        loader,
        split_batch=split,
        get_num_samples_in_batch=lambda batch: len(batch["keys"]),
        get_num_tokens_in_batch=token_counts,
    )
    return Trainer(
        model=TrainableModel(model, columns, store.codec, dtype),
        train_dataloader=data,
        optimizers=build_optimizer(model, config.optimizer),
        schedulers=_schedule(steps, config, cosine_with_warmup),
        max_duration=f"{steps}ba",
        precision=config.precision,
        device_train_microbatch_size=_microbatch_size(config),
        accumulate_train_batch_on_tokens=config.loss == "global",
        algorithms=[] if clip is None else [GradientClipping(clipping_type="norm", clipping_threshold=clip)],
        callbacks=[StopOnNonFiniteLoss()],
        loggers=[StepLog(run / "log.jsonl", stream, steps)],
        device=None if config.device == "auto" else config.device,
        seed=config.seed,
        run_name="train",
        save_folder=str(run / "checkpoints"),
        save_interval=config.checkpoint.interval,
        save_num_checkpoints_to_keep=config.checkpoint.keep,
        save_ignore_keys=_frozen_keys(config),
        load_strict_model_weights="llm" in config.train,
        save_overwrite=True,
        autoresume=config.checkpoint.autoresume,
        progress_bar=False,
        dist_timeout=1800,
    )


def _tell_nodes_apart() -> None:
    """Composer lets a node wait for a file that it names alike on all nodes: on a shared disk one removes another's."""
    from composer.utils import dist

    name = dist.get_node_signal_file_name
    dist.get_node_signal_file_name = lambda rng=None: f"{name(rng)}_{dist.get_node_rank()}"


def _schedule(steps: int, config: TrainConfig, curve: Any) -> Any:
    def multiplier(state: State, ssr: float = 1.0) -> float:
        factor: float = curve(state.timestamp.batch.value, steps, config.optimizer.warmup_ratio)
        return factor

    return multiplier


def _unchanged(batch: Any) -> Any:
    return batch


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _microbatch_size(config: TrainConfig) -> int | str:
    """Composer finds the largest microbatch that fits a GPU; a CPU takes the batch of its rank whole."""
    from composer.utils import dist

    per_rank = config.per_rank(dist.get_world_size())
    if config.microbatch_size == "auto":
        return "auto" if _has_gpu() and config.device != "cpu" else per_rank
    return min(config.microbatch_size, per_rank)


def _frozen_keys(config: TrainConfig) -> list[str]:
    """Stage 1 checkpoints leave out the frozen LLM: it is read from where it came from again."""
    return [] if "llm" in config.train else ["state/model/model.llm.*"]


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
    steps: int,
) -> None:
    """Write what the next stage needs, then `summary.json`: its presence says that the stage is complete."""
    from training.export import export_connector, export_model

    run = Path(config.run)
    export_connector(model, run / "connector")
    if "llm" in config.train:
        export_model(model, tokenizer, store, run / "model", run=run)
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
