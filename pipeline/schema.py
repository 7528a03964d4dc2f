"""The contract between the two packages: what a feature store holds, under which names.

A store is a directory or an S3 prefix::

    store.json               identity (StoreSpec), written once
    samples/00000.tar        <key>.json: image name, size, every conversation of that image
    block03/00000.tar ...    <key>.block03.<codec>: one tar per column
    commits/00000.json       Commit: a shard exists when, and only when, this exists
    columns/block16.json     a column that was added later (Column); its commits lie in commits/block16/
    claims/00000             the job that works on this shard just now; gone when the build has ended
    manifest.parquet         every commit in one table, written last
    failures.jsonl           every Failure, written with it

Every tar is a plain WebDataset tar. Everything here is data: no torch, no ray, no I/O.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.encoders.columns import block_of, grid_of

FORMAT_VERSION: Literal[1] = 1
SAMPLES = "samples"  # the name of the tar that holds the records, beside the feature columns

Aspect = Literal["pad", "square"]
Codec = Literal["bf16", "fp16", "fp8", "int8"]
Compute = Literal["float32", "bfloat16", "float16"]
FailureKind = Literal["record", "missing image", "image", "features"]  # always a fact of the data


class _Record(BaseModel):
    """Strict and closed: a field that this version does not know is an error, not noise."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Turn(BaseModel):
    """One message, in LLaVA's own words: `from` is `human` or `gpt` (other keys of the source are dropped)."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)

    speaker: Literal["human", "gpt"] = Field(validation_alias="from", serialization_alias="from")
    value: str


class Conversation(_Record):
    """One record of the source JSON: its id and its turns."""

    id: str
    turns: tuple[Turn, ...] = Field(min_length=1)


class Sample(_Record):
    """One image with all its conversations, or one text-only conversation (`image` is None).

    `key` is the WebDataset key: the sample's position in the data set's shuffled order, zero-padded.
    `width` and `height` are those of the upright source image in pixels; None for text.
    """

    key: str
    image: str | None
    width: int | None = None
    height: int | None = None
    conversations: tuple[Conversation, ...] = Field(min_length=1)


class Column(_Record):
    """A feature column, (tokens, width) per image.

    `block03` is hidden state 3 without its CLS token, `cls23` is the CLS token of hidden state 23.
    """

    name: str = Field(pattern=r"^(block|cls)\d{2}$")
    tokens: int = Field(gt=0)
    width: int = Field(gt=0)

    @property
    def block(self) -> int:
        """The encoder's block whose output this is (0 is the input of the first)."""
        return block_of(self.name)


class EncoderSpec(_Record):
    """Which frozen vision encoder made the features. `revision`: Hub commit, or digest of a local folder's weights."""

    id: str
    revision: str
    blocks: int
    width: int
    image_size: int
    patch_size: int

    @property
    def grid(self) -> int:
        """Patches along one side: 24 for ViT-L/14-336."""
        return grid_of(self)


class StoreSpec(_Record):
    """`store.json`: everything that two builds must share for their shards to be interchangeable."""

    format_version: Literal[1] = FORMAT_VERSION
    dataset: str = Field(description="sha256 over the records of the source, in order")
    samples: int
    shards: int
    shard_size: int
    seed: int
    encoder: EncoderSpec
    aspect: Aspect
    compute: Compute
    codec: Codec
    columns: tuple[Column, ...]
    stores_images: bool = False


class ColumnFile(_Record):
    """One tar of a commit: its length, checksum, and where each member's payload starts.

    `offsets[i]` and `sizes[i]` belong to `keys[i]` of the commit; a column tar has no member for a text-only
    sample, which has offset -1 and size 0.
    """

    bytes: int
    sha256: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class Failure(_Record):
    """A sample that could not be stored: where it came from and why. `key` is empty for a record without a sample.

    `kind` is None in stores made before failures had one.
    """

    key: str
    source: str
    reason: str
    kind: FailureKind | None = None


class Commit(_Record):
    """`commits/<shard>.json`: written last, by the worker that wrote the tars.

    A column that was added to the store later has its own, in `commits/<column>/`, with the same keys.
    """

    shard: int
    keys: tuple[str, ...]
    images: tuple[str | None, ...]
    words: tuple[tuple[int, ...], ...] = Field(description="per sample, per conversation: whitespace-separated words")
    files: dict[str, ColumnFile]
    failures: tuple[Failure, ...]


def shard_name(shard: int) -> str:
    """`7` -> `00007`."""
    return f"{shard:05d}"


def tar_path(column: str, shard: int) -> str:
    """Where a column's tar of a shard lies below the store's root."""
    return f"{column}/{shard_name(shard)}.tar"


def claim_path(shard: int) -> str:
    """Where a job says that it works on a shard."""
    return f"claims/{shard_name(shard)}"


def commit_path(shard: int, added: str | None = None) -> str:
    """Where the commit record of a shard, or of a column `added` to it later, lies below the store's root."""
    return f"commits/{shard_name(shard)}.json" if added is None else f"commits/{added}/{shard_name(shard)}.json"
