"""The contract between the two packages: what a feature store holds, under which names.

A store is a directory or an S3 prefix::

    store.json               identity (StoreSpec), written once
    samples/00000.tar        <key>.json: image name, size, every conversation of that image
    block03/00000.tar ...    <key>.block03.<codec>: one tar per column
    commits/00000.json       Commit: a shard exists when, and only when, this exists
    columns/block16.json     a column that was added later (Column); its commits lie in commits/block16/
    retried/00010.json       a shard behind those of store.json (Retried): samples that failed at first
    claims/00000             the job that works on this shard just now; gone when the build has ended
    manifest.parquet         every commit in one table, written last
    failures.jsonl           every Failure, written with it

Every tar is a plain WebDataset tar. Everything here is data: no torch, no ray, no I/O. What a store says of itself is
believed within bounds only: no number in it makes a reader ask for memory that no store needs.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.encoders.columns import block_of, grid_of

FORMAT_VERSION: Literal[1] = 1
SAMPLES = "samples"  # the name of the tar that holds the records, beside the feature columns

MAX_SAMPLES, MAX_SHARDS = 10**9, 10**7  # keys have nine digits
KEY = r"^[0-9]{1,9}$"
MAX_TAR, MAX_MEMBER = 2**40, 2**30  # bytes

Bytes = Annotated[int, Field(ge=0, lt=MAX_TAR)]
Offset = Annotated[int, Field(ge=-1, lt=MAX_TAR)]
Size = Annotated[int, Field(ge=0, lt=MAX_MEMBER)]
Side = Annotated[int, Field(gt=0, le=2**16)]  # of an image, a patch or a tensor
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Key = Annotated[str, Field(pattern=KEY)]
Shard = Annotated[int, Field(ge=0, lt=MAX_SHARDS)]

Aspect = Literal["pad", "square"]
Codec = Literal["bf16", "fp16", "fp8", "int8"]
Compute = Literal["float32", "bfloat16", "float16"]
# Always a fact of the data. "retried": the sample failed at first, and a later shard holds it.
FailureKind = Literal["record", "missing image", "image", "features", "retried"]


class _Record(BaseModel):
    """Strict and closed: a field that this version does not know is an error, not noise."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Stored(_Record):
    """What a store says of itself: a number is a number, never a text that looks like one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong with what was read, in a line: its place, what was expected, what was found."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    said = first["msg"].removeprefix("Value error, ")
    return f"{place}: {said} (found {str(first['input'])[:80]!r})" if place else said


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


class Column(_Stored):
    """A feature column, (tokens, width) per image.

    `block03` is hidden state 3 without its CLS token, `cls23` is the CLS token of hidden state 23.
    """

    name: str = Field(pattern=r"^(block|cls)\d{2}$")
    tokens: Side
    width: Side

    @property
    def block(self) -> int:
        """The encoder's block whose output this is (0 is the input of the first)."""
        return block_of(self.name)

    @model_validator(mode="after")
    def _fits_a_member(self) -> Self:
        if 4 * self.tokens * self.width >= MAX_MEMBER:
            raise ValueError(f"{self.tokens} tokens of width {self.width} are more than a sample may hold")
        return self


class EncoderSpec(_Stored):
    """Which frozen vision encoder made the features. `revision`: Hub commit, or digest of a local folder's weights."""

    id: str
    revision: str
    blocks: Annotated[int, Field(gt=0, lt=1000)]
    width: Side
    image_size: Side
    patch_size: Side

    @property
    def grid(self) -> int:
        """Patches along one side: 24 for ViT-L/14-336."""
        return grid_of(self)


class StoreSpec(_Stored):
    """`store.json`: everything that two builds must share for their shards to be interchangeable."""

    format_version: Literal[1] = FORMAT_VERSION
    dataset: str = Field(description="sha256 over the records of the source, in order")
    samples: Annotated[int, Field(ge=0, lt=MAX_SAMPLES)]
    shards: Annotated[int, Field(ge=0, lt=MAX_SHARDS)]
    shard_size: Annotated[int, Field(gt=0)]
    seed: int
    encoder: EncoderSpec
    aspect: Aspect
    compute: Compute
    codec: Codec
    columns: tuple[Column, ...]
    stores_images: bool = False

    @property
    def digest(self) -> str:
        """sha256 of what every commit record is bound to: all but the columns, which may be added to."""
        return hashlib.sha256(self.model_dump_json(exclude={"columns"}).encode()).hexdigest()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.shards > self.samples:
            raise ValueError(f"{self.shards} shards of {self.samples} samples")
        names = [column.name for column in self.columns]
        if len(set(names)) < len(names):
            raise ValueError(f"a column is there twice: {', '.join(names)}")
        return self


class ColumnFile(_Stored):
    """One tar of a commit: its length, checksum, and where each member's payload starts.

    `offsets[i]` and `sizes[i]` belong to `keys[i]` of the commit; a column tar has no member for a text-only
    sample, which has offset -1 and size 0.
    """

    bytes: Bytes
    sha256: Sha256
    offsets: tuple[Offset, ...]
    sizes: tuple[Size, ...]

    @model_validator(mode="after")
    def _within_the_tar(self) -> Self:
        if len(self.offsets) != len(self.sizes):
            raise ValueError(f"{len(self.offsets)} offsets and {len(self.sizes)} sizes")
        for offset, size in zip(self.offsets, self.sizes, strict=True):
            if offset + size > self.bytes or (offset < 0 and size):
                raise ValueError(f"a member of {size} bytes at {offset} is not within a tar of {self.bytes} bytes")
        return self


class Failure(_Stored):
    """A sample that could not be stored: where it came from and why. `key` is empty for a record without a sample.

    `kind` is None in stores made before failures had one.
    """

    key: str
    source: str
    reason: str
    kind: FailureKind | None = None


class Commit(_Stored):
    """`commits/<shard>.json`: written last, by the worker that wrote the tars.

    A column that was added to the store later has its own, in `commits/<column>/`, with the same keys.
    `store` is the digest of the store that the shard was made for; None in stores made before commits had one.
    """

    shard: Shard
    keys: tuple[Key, ...]
    images: tuple[str | None, ...]
    words: tuple[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], ...] = Field(
        description="per sample, per conversation: whitespace-separated words"
    )
    files: dict[str, ColumnFile]
    failures: tuple[Failure, ...]
    store: Sha256 | None = None

    @model_validator(mode="after")
    def _as_many_of_each(self) -> Self:
        lengths = {"images": len(self.images), "words": len(self.words)}
        lengths |= {name: len(file.sizes) for name, file in self.files.items()}
        for name, length in lengths.items():
            if length != len(self.keys):
                raise ValueError(f"{name}: {length} for {len(self.keys)} keys")
        return self


class Retried(_Stored):
    """`retried/<shard>.json`: the keys of a shard behind those of `store.json`, of samples that failed at first.

    Published once, before the shard is built: whoever builds it builds the same.
    """

    keys: tuple[Key, ...] = Field(min_length=1)


def shard_name(shard: int) -> str:
    """`7` -> `00007`."""
    return f"{shard:05d}"


def tar_path(column: str, shard: int) -> str:
    """Where a column's tar of a shard lies below the store's root."""
    return f"{column}/{shard_name(shard)}.tar"


def claim_path(shard: int) -> str:
    """Where a job says that it works on a shard."""
    return f"claims/{shard_name(shard)}"


def retried_path(shard: int) -> str:
    """Where the keys of a shard of retried samples are listed."""
    return f"retried/{shard_name(shard)}.json"


def commit_path(shard: int, added: str | None = None) -> str:
    """Where the commit record of a shard, or of a column `added` to it later, lies below the store's root."""
    return f"commits/{shard_name(shard)}.json" if added is None else f"commits/{added}/{shard_name(shard)}.json"
