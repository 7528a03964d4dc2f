"""TrainConfig: what `training/pretrain.yaml`, `training/finetune.yaml` and `key=value` arguments may say."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from inspect import isabstract
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import BeforeValidator, Field, SerializeAsAny, create_model, field_validator, model_validator

from pipeline.config import Settings, meant
from pipeline.typed import Typed
from training.model.reducers import DEFAULT, FAMILIES, SHAPE, config_class
from training.text.settings import ExampleSettings
from training.text.templates import TEMPLATES

log = logging.getLogger(__name__)

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
Seed = Annotated[int, Field(ge=0, lt=2**32 - 1)]  # as Composer takes them


class ConnectorSettings(Settings):
    """Columns of features to vision tokens: `arm`, and the settings that its family declares (model/reducers)."""

    arm: str = DEFAULT


@cache
def _settings_of(declared: type) -> type[ConnectorSettings]:
    """The fields of a connector's configuration that a user may set, as settings."""
    hints = get_type_hints(declared)
    settings: dict[str, Any] = {
        field.name: (hints[field.name], Field(default=field.default, **field.metadata))
        for field in fields(declared)
        if field.name not in SHAPE
    }
    return create_model(declared.__name__, __base__=ConnectorSettings, **settings)


def _of_its_family(given: Any) -> Any:
    """The settings of the arm that is named, checked one by one; whether they fit each other is known with a store.

    Stages' files set those of the default arm: where another family is chosen instead, these have no effect, and are
    left out with a warning.
    """
    if not isinstance(given, dict):
        return given
    arm = given.get("arm", DEFAULT)
    arm = arm.text if isinstance(arm, Typed) else arm
    if not isinstance(arm, str) or arm not in FAMILIES:
        raise ValueError(f"arm: no such connector; {meant(str(arm), FAMILIES)}")
    # Drop a setting only if the default family has it and the chosen one does not: anything else unknown is a mistake.
    family, usual = (_settings_of(config_class(name)) for name in (arm, DEFAULT))
    without_effect = [name for name in given if name not in family.model_fields and name in usual.model_fields]
    if without_effect:
        log.warning("model.connector: %s has no setting %s; left out", arm, ", ".join(without_effect))
    given = {name: value for name, value in given.items() if name not in without_effect}
    for name in given:
        if name not in family.model_fields:
            raise ValueError(f"{name}: unknown setting of {arm}; {meant(name, family.model_fields)}")
    return family.model_validate(given)


Connector = Annotated[SerializeAsAny[ConnectorSettings], BeforeValidator(_of_its_family)]


class LoraSettings(Settings):
    """Low-rank adapters on the LLM's linear layers instead of all its weights, as LLaVA-1.5 has them (lr 2e-4)."""

    rank: int = Field(default=128, gt=0)
    alpha: float = Field(default=256, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)


class ModelSettings(Settings):
    """The language model and what stands before it."""

    llm: str = Field(description="Hub id or folder of a causal language model of a type in model/decoders")
    revision: str | None = None
    tokenizer: str | None = Field(default=None, description="Hub id or folder with tokenizer.model; default: the llm's")
    connector: Connector = Field(default={}, validate_default=True, description="arm and its settings")
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


class OrderSettings(Settings):
    """In which order examples come: with the stores and the global batch size, all that decides it."""

    seed: int = Field(default=0, ge=0)
    shuffle: bool = Field(default=True, description="false gives the store's own order")
    window_shards: int = Field(default=16, gt=0, description="examples are shuffled within this many shards")
    together: bool = Field(default=False, description="conversations of an image one after another: fewest reads")
    group_by_length: bool = Field(default=False, description="batches of one modality and similar length")
    last_batch: Literal["drop", "pad"] = Field(
        default="drop", description="an epoch's last, partial batch is left out, or filled up with examples before it"
    )
    limit: int | None = Field(default=None, gt=0, description="only the first N examples of each store's own order")
    groups: int = Field(
        default=1, gt=0, description="each store's shards are dealt to N groups; a batch has as many examples of each"
    )

    @model_validator(mode="after")
    def _together_or_grouped(self) -> Self:
        """Two wishes for the order that exclude each other."""
        if self.together and self.group_by_length:
            raise ValueError(
                "together keeps an image's conversations adjacent, group_by_length sorts them apart: choose one"
            )
        return self


class ReadSettings(Settings):
    """How a rank reads its examples; this changes neither their order nor their contents."""

    threads: int = Field(default=4, gt=0, description="reader threads per rank")
    prefetch: int = Field(default=2, gt=0, description="batches read ahead; memory is one batch more")
    cache_dir: str | None = Field(default=None, description="where shards of a remote store are kept on this node")
    cache_gb: float = Field(default=200, gt=0, description="most that the whole folder may hold, in 10^9 bytes")
    max_skipped: float = Field(
        default=0.05, ge=0, le=1, description="share of examples that may teach nothing before the run stops"
    )

    @property
    def cache_bytes(self) -> int:
        """`cache_gb` in bytes."""
        return round(self.cache_gb * 1e9)


class ValidationSettings(Settings):
    """Which examples are never learned from, and when the model's loss on them is measured."""

    share: float | None = Field(default=None, gt=0, lt=1, description="of the images (and of the text-only records)")
    names: str | None = Field(default=None, description="a file, local or s3://: a name of an image (or an id) a line")
    store: str | None = Field(default=None, description="a feature store of its own; nothing is held out of the others")
    seed: int = Field(default=0, description="with the names it decides which share is held out, and the limit")
    limit: int | None = Field(default=None, gt=0, description="measure on at most N of these examples, always the same")
    interval: str = Field(default="500ba", pattern=r"^0*[1-9]\d*(ba|ep)$", description="e.g. 500ba (steps) or 1ep")
    patience: int | None = Field(default=None, gt=0, description="stop after N evaluations without a lower loss")
    questions: str | None = Field(default=None, description="own questions, answered after each epoch, and their")
    images: str | None = Field(default=None, description="images: a folder")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("share", "names", "store") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of share, names and store; {' and '.join(given) or 'none of them'} is there")
        if (self.questions is None) != (self.images is None):
            there, lacks = ("images", "questions") if self.questions is None else ("questions", "images")
            raise ValueError(f"{there} is given and {lacks} is not; give both, or neither")
        return self


class DataSettings(ReadSettings, OrderSettings, ExampleSettings):
    """The feature stores, and how they are read; a run's file says all of it under `data`."""

    validation: ValidationSettings | None = Field(default=None, description="examples to measure on, never learned")


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
    keep_best: bool = Field(default=False, description="beside them, the one with the lowest loss on held-out examples")
    autoresume: bool = True
    verify: bool = Field(
        default=True,
        description="hash each file after saving and before loading, about 1 GB/s a file; false compares sizes only",
    )
    remote: str | None = Field(
        default=None, pattern=r"^s3://[^/]+/.", description="s3://bucket/prefix that checkpoints are copied to"
    )
    remote_patience_s: float = Field(
        default=3600, gt=0, description="how long to wait at the end of a run for a bucket that fails"
    )


# What a run may change on its way: nothing here decides what is learned, from which examples, in which order. All
# other settings are the run's identity; of a store or a model that is its fingerprint, not its path (fit/identity).
MAY_CHANGE = frozenset(
    {"run", "boards", "project", "microbatch_size", "stop_on_spike", "hang_s", "device"}
    | {"model.activation_checkpointing", "model.loss_chunks", "model.compile"}
    | {f"data.{name}" for name in ReadSettings.model_fields}
    | {f"checkpoint.{name}" for name in CheckpointSettings.model_fields}
)


# Folders (or Hub ids) of models, which may lie elsewhere when a run goes on, as its store may: contents are compared.
FOLDERS = ("model.llm", "model.tokenizer", "model.connector_from")


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names: `data.store`."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _engine(name: str) -> Any:
    """The class of an engine; ValueError if it is not where `ENGINES` says, or lacks a method."""
    try:
        found = resolve_name(ENGINES[name])
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"ENGINES in training/config.py names {ENGINES[name]!r}: {error}; correct that line"
        ) from error
    if isabstract(found):
        raise ValueError(f"{ENGINES[name]} lacks {', '.join(sorted(found.__abstractmethods__))}; write it there")
    return found


class TrainConfig(Settings):
    """One stage of training."""

    run: str = Field(description="folder of this run: checkpoints, log.jsonl, summary.json, the exported weights")
    train: tuple[Part, ...] = Field(min_length=1, description="which parts learn; the vision encoder never does")
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
    hang_s: float = Field(
        default=600, ge=1, description="a rank without a sign of life, or steps that stand still, end it after this"
    )
    checkpoint: CheckpointSettings = CheckpointSettings()
    seed: Seed = 0
    device: Literal["auto", "cpu", "gpu"] = "auto"

    @field_validator("run")
    @classmethod
    def _local_folder(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("a run lies in a local folder; checkpoint.remote copies its checkpoints to a bucket")
        return value

    @field_validator("parallelism")
    @classmethod
    def _known_engine(cls, value: str) -> str:
        if value not in ENGINES:
            raise ValueError(f"no such engine; {meant(value, ENGINES)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        """What a single setting cannot tell: whether the parts that learn, their rates and the engine go together."""
        for number, entry in enumerate(self.data.mixture):
            if TEMPLATES[entry.template or ""].captions_only and "llm" in self.train:
                where = f"stores.{number}." if self.data.stores and self.data.stores[number].template else ""
                raise ValueError(
                    f"data.{where}template: {entry.template} is for stage 1, where train is [connector]; use v1 to "
                    "train the llm"
                )
        if self.global_batch_size % self.data.groups:
            raise ValueError(
                f"data.groups: {self.data.groups} groups have no equal part of {self.global_batch_size} examples; "
                "choose a number that divides global_batch_size"
            )
        for part in ("connector", "llm"):
            if getattr(self.optimizer, f"{part}_lr") is not None and part not in self.train:
                raise ValueError(f"optimizer.{part}_lr has no effect: train is {list(self.train)}; leave it out")
        if self.checkpoint.keep_best and self.data.validation is None:
            raise ValueError(
                "checkpoint.keep_best keeps the checkpoint with the lowest loss on held-out examples, and there are "
                "none: set data.validation.share, or leave it out"
            )
        if self.model.lora is not None and "llm" not in self.train:
            raise ValueError(f"model.lora adapts the llm, but train is {list(self.train)}; add llm, or leave lora out")
        _engine(self.parallelism).check(self)
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that a run keeps to its end, by dotted name."""
        # Where the loss is a mean of microbatch means, their size is part of what is computed.
        kept = {"microbatch_size"} if self.loss == "microbatch" else set()
        may_change = MAY_CHANGE - kept
        settings = flat(self.model_dump(mode="json", exclude={"data": {"validation", "stores"}}))
        if self.data.stores:
            del settings["data.store"]
        for number, entry in enumerate(self.data.stores):
            settings |= {f"data.stores.{number}.{name}": value for name, value in entry.model_dump().items()}
        # Of the validation, what takes examples away from those that are learned. What a list of names holds is part of
        # the position in a checkpoint (stream.split): the list itself may lie elsewhere.
        held_out = self.data.validation
        if held_out is not None and held_out.share is not None:
            settings |= {"data.validation.share": held_out.share, "data.validation.seed": held_out.seed}
        return {name: value for name, value in settings.items() if name not in may_change}

    def plain_identity(self) -> dict[str, Any]:
        """Those of `identity` that say all by themselves, without paths."""
        paths = {*FOLDERS, *self.store_paths()}
        return {name: value for name, value in self.identity().items() if name not in paths}

    def store_paths(self) -> list[str]:
        """The names in `identity` of the places of the stores, which may lie elsewhere when a run goes on."""
        return [f"data.stores.{number}.store" for number in range(len(self.data.stores))] or ["data.store"]

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
