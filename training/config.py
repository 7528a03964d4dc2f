"""TrainConfig: what `training/pretrain.yaml`, `training/finetune.yaml` and `key=value` arguments may say."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config import Settings

# What `parallelism` may say, and the class that does it: an engine is a file in training/engines and a line here. The
# classes are named, not imported: they stand above this file.
ENGINES = {
    "ddp": "training.engines.ddp:Ddp",
    "fsdp": "training.engines.fsdp:Fsdp",
    "zero1": "training.engines.zero:Zero1",
    "zero2": "training.engines.zero:Zero2",
    "zero3": "training.engines.zero:Zero3",
}

Part = Literal["connector", "llm"]
Board = Literal["tensorboard", "wandb", "mlflow"]


class ConnectorSettings(Settings):
    """Columns of CLIP features to vision tokens: MBTF and STF of section 3, or an arm of its ablations."""

    arm: Literal["mbtf+stf", "mbtf", "stf", "mlp", "avgpool", "tokenconcat"] = "mbtf+stf"
    preset: Literal["paper", "released"] = Field(default="paper", description="as the paper defines it, or as released")
    blocks: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="CLIP blocks, in channel order; default: the preset's eight"
    )
    block: int = Field(
        default=23, ge=0, description="the one block of arms without MBTF; 23 is LLaVA's select_layer -2"
    )
    kernel_size: int = Field(default=2, gt=0, description="k: a k x k window of patch tokens is fused (Table 4)")
    fused_tokens: int = Field(default=1, gt=0, description="E: into so many tokens (Table 4)")
    pool: Literal["before", "after"] = Field(default="before", description="avgpool: before or after the MLP")


class LoraSettings(Settings):
    """Low-rank adapters on the LLM's linear layers instead of all its weights, as LLaVA-1.5 has them (lr 2e-4)."""

    rank: int = Field(default=128, gt=0)
    alpha: float = Field(default=256, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)


class ModelSettings(Settings):
    """The language model and what stands before it."""

    llm: str = Field(description="Hub id or folder of a Llama-architecture causal language model")
    revision: str | None = None
    tokenizer: str | None = Field(default=None, description="Hub id or folder with tokenizer.model; default: the llm's")
    connector: ConnectorSettings = ConnectorSettings()
    connector_from: str | None = Field(default=None, description="folder with stage 1's connector.safetensors")
    frozen_dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="dtype of frozen weights")
    activation_checkpointing: bool = Field(default=False, description="compute the LLM's activations twice, keep none")
    loss_chunks: int = Field(
        default=1,
        gt=0,
        description="parts in which logits of the supervised tokens are made, one after another; 1 keeps all",
    )
    compile: tuple[Literal["connector", "llm"], ...] = Field(
        default=(),
        description="what torch.compile takes: the connector (of two images and more in a microbatch), and of the llm "
        "one layer, once for all lengths",
    )
    lora: LoraSettings | None = Field(default=None, description="{} for LLaVA-1.5's; merged into the exported model")


class DataSettings(Settings):
    """The feature store, and the order in which it is read."""

    store: str = Field(description="feature store of pipeline/build_shards.py, local or s3://")
    template: Literal["plain", "v1"] = Field(description="plain for captions (stage 1), v1 for conversations (stage 2)")
    max_length: int = Field(default=2048, gt=8, description="tokens per example, image tokens included")
    seed: int = 0
    shuffle: bool = True
    window_shards: int = Field(default=16, gt=0, description="examples are shuffled within so many shards")
    together: bool = Field(default=False, description="conversations of an image one after another: fewest reads")
    group_by_length: bool = Field(default=False, description="batches of one modality and similar length")
    last_batch: Literal["drop", "pad"] = "drop"
    threads: int = Field(default=4, gt=0, description="reader threads per rank")
    prefetch: int = Field(default=2, gt=0, description="batches read ahead")
    cache_dir: str | None = Field(default=None, description="where shards of a remote store are kept on this node")
    cache_gb: float = Field(default=200, gt=0)
    limit: int | None = Field(default=None, gt=0, description="only the first N examples")


class OptimizerSettings(Settings):
    """Adam and its schedule (section 4.1.3)."""

    lr: float = Field(gt=0)
    connector_lr: float | None = Field(default=None, gt=0, description="of the connector, instead of lr")
    llm_lr: float | None = Field(default=None, gt=0, description="of the LLM, instead of lr")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="share of the steps that climb from 0 to lr")
    clip_grad_norm: float | None = Field(default=None, gt=0, description="none in the paper")


class CheckpointSettings(Settings):
    """When to save, and whether a rerun of the same command goes on where the last one stopped."""

    interval: str = Field(default="500ba", pattern=r"^\d+(ba|ep)$", description="e.g. 500ba (steps) or 1ep (epochs)")
    keep: int = Field(default=2, description="newest checkpoints to keep, here and in the bucket; -1 keeps all")
    autoresume: bool = True
    remote: str | None = Field(
        default=None, pattern=r"^s3://[^/]+/.", description="s3://bucket/prefix that checkpoints are copied to"
    )
    remote_patience_s: float = Field(
        default=3600, gt=0, description="how long to wait at the end of a run for a bucket that fails"
    )


class TrainConfig(Settings):
    """One stage of training."""

    run: str = Field(description="folder of this run: checkpoints, log.jsonl, summary.json, the exported weights")
    train: tuple[Part, ...] = Field(min_length=1, description="which parts learn; CLIP never does")
    model: ModelSettings
    data: DataSettings
    optimizer: OptimizerSettings
    global_batch_size: int = Field(gt=0, description="examples per optimizer step, over all ranks")
    microbatch_size: int | Literal["auto"] = Field(default="auto", description="examples per rank and forward pass")
    epochs: int = Field(default=1, gt=0)
    steps: int | None = Field(default=None, gt=0, description="stop after this many steps (the schedule follows)")
    loss: Literal["global", "microbatch"] = Field(
        default="global", description="mean over supervised tokens of the global batch, or mean of microbatch means"
    )
    precision: Literal["fp32", "amp_bf16"] = "amp_bf16"
    parallelism: str = Field(
        default="ddp", description="the engine: ddp copies the model, fsdp and zero1, zero2, zero3 (DeepSpeed) shard it"
    )
    boards: tuple[Board, ...] = Field(default=("tensorboard",), description="where else each step's metrics go")
    project: str = Field(default="compact-vision-tokens", description="the runs' common name on wandb and mlflow")
    stop_on_spike: float | None = Field(
        default=None,
        gt=1,
        description="stop and name the batch if a loss is this many times the median of the last 100",
    )
    checkpoint: CheckpointSettings = CheckpointSettings()
    seed: int = 0
    device: Literal["auto", "cpu", "gpu"] = "auto"

    @field_validator("parallelism")
    @classmethod
    def _known_engine(cls, value: str) -> str:
        if value not in ENGINES:
            raise ValueError(f"no such engine; choose one of {', '.join(map(repr, ENGINES))}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.data.template == "plain" and "llm" in self.train:
            raise ValueError("data.template: plain is for stage 1, where train is [connector]; use v1 to train the llm")
        for part in ("connector", "llm"):
            if getattr(self.optimizer, f"{part}_lr") is not None and part not in self.train:
                raise ValueError(f"optimizer.{part}_lr has no effect: train is {list(self.train)}; leave it out")
        if self.model.lora is not None and "llm" not in self.train:
            raise ValueError(f"model.lora adapts the llm, but train is {list(self.train)}; add llm, or leave lora out")
        resolve_name(ENGINES[self.parallelism]).check(self)
        return self

    def per_rank(self, world_size: int) -> int:
        """Examples per rank and step.

        Raises:
            ValueError: if the ranks do not divide the global batch.
        """
        if self.global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not divisible by {world_size} ranks; "
                f"use {self.global_batch_size // world_size * world_size or world_size} or another number of ranks"
            )
        return self.global_batch_size // world_size
