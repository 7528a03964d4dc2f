"""Configuration: a YAML file plus `key=value` arguments, every error at once, with did-you-mean.

`Settings` is the base that the build job and the trainer share; `BuildConfig` is the build job's own.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.encoders.columns import PAPER_BLOCKS
from pipeline.schema import Aspect, Codec, Compute
from pipeline.typed import MOST_LEVELS, Typed, as_annotated, as_typed, read_yaml


class Settings(BaseModel):
    """A closed, immutable group of settings. A text among them is what was typed, with `~` for the home folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_typed(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = cls.model_fields
        read = dict(given)
        for name in given.keys() & known.keys():
            try:
                read[name] = as_annotated(given[name], known[name].annotation)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return read


S = TypeVar("S", bound=Settings)


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one problem a line."""


class Given(NamedTuple):
    """Settings nested as in a file, and where they come from, for messages."""

    origin: str
    settings: Mapping[str, Any]


def load_config(kind: type[S], path: str | Path | None, overrides: Sequence[str | Given]) -> S:
    """Read `path` (YAML, may be None), apply the overrides in turn, and validate all of it.

    An override is a text `a.b=value` of the command line, or `Given`.
    A top-level key that starts with an underscore is left to other readers of the file.

    Raises:
        ConfigError: with every problem found, each with its place, the value found, where it comes from and what was
            expected.
    """
    file = {} if path is None else _read_yaml(Path(path))
    tree, sources = copy.deepcopy(file), [Given(str(path), file)]  # the later sources win
    problems = []
    for override in overrides:
        if isinstance(override, Given):
            tree = _overlaid(tree, override.settings)
            sources.append(override)
            continue
        if problem := _override(tree, override):
            problems.append(problem)
        argument: dict[str, Any] = {}
        _override(argument, override)
        sources.append(Given("the command line", argument))
    try:
        config = kind.model_validate(tree)
    except ValidationError as error:
        problems += [_explain(kind, dict(item), sources) for item in error.errors()]
    if problems:
        where = "the command line" if path is None else str(path)
        raise ConfigError(
            f"{len(problems)} problem(s) in the configuration from {where}:\n  - " + "\n  - ".join(problems)
        )
    return config


def differences(theirs: Mapping[str, Any], mine: Mapping[str, Any], there: str = "there") -> list[str]:
    """`name: 'x' there, 'y' now` for each name of `mine` under which `theirs` holds something else, or nothing (None).

    Names that only `theirs` has are left out. `there` says where `theirs` was found, e.g. "in the checkpoint".
    """
    return [
        f"{name}: {theirs.get(name)!r} {there}, {value!r} now"
        for name, value in mine.items()
        if theirs.get(name) != value
    ]


def _read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a file; ConfigError if it is none."""
    name = _cut(str(path))
    try:
        if not path.is_file():
            raise ConfigError(
                f"configuration file {name!r} does not exist (current folder: {Path.cwd()}); give a YAML file"
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"configuration file {name!r} cannot be read: {error.strerror}; give another") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text: {error}; save it as UTF-8") from error
    try:
        tree = read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{name} is not valid YAML: {_cut(str(error))}; correct it there") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{name} holds {_cut(repr(tree))}; expected settings, each as `name: value`")
    return {key: value for key, value in tree.items() if not key.startswith("_")}


def _override(tree: dict[str, Any], text: str) -> str | None:
    """Apply one `a.b=value` in place; the value is read as YAML. Returns a problem, or None."""
    dotted, sign, value = text.partition("=")
    if not sign or not dotted:
        return f"argument {_cut(repr(text))} is not of the form key=value; write for example seed=1"
    *parents, last = dotted.split(".", MOST_LEVELS)
    for depth, parent in enumerate(parents, 1):
        child = tree.setdefault(parent, {})
        if isinstance(child, Typed) and isinstance(child.value, dict):
            child = tree[parent] = child.value  # a group of settings that another argument gave
        if not isinstance(child, dict):
            group = _cut(".".join(parents[:depth]))
            return (
                f"argument {_cut(repr(text))}: {group} holds {_cut(repr(child))}, which has no settings below it; set "
                f"{group}=... itself"
            )
        tree = child
    tree[last] = as_typed(value)
    return None


def _overlaid(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `tree` in which `settings` stand; a group of settings replaces only those of the group it names."""
    result = dict(tree)
    for key, value in settings.items():
        below = result.get(key)
        if isinstance(value, Mapping):
            result[key] = _overlaid(below if isinstance(below, Mapping) else {}, value)
        else:
            result[key] = value
    return result


def _explain(kind: type[BaseModel], error: dict[str, Any], sources: Sequence[Given]) -> str:
    """One of pydantic's errors as a line: the setting, what is wrong, the value found or a hint, and its origin."""
    place = _cut(".".join(str(part) for part in error["loc"]) or "(whole file)")
    if error["type"] == "missing":
        of_list = [str(part) for part in error["loc"] if isinstance(part, int)]  # no argument names an entry of a list
        where = f"{error['loc'][-1]} to entry {of_list[-1]} of the list" if of_list else f"{place}=..."
        return f"{place}: required, but not given; add {where}"
    origin = _origin(error["loc"], sources)
    source = "" if origin is None else f", from {origin}"
    if error["type"] == "extra_forbidden":
        known = _fields_at(kind, error["loc"][:-1])
        return f"{place}: unknown setting{source}; {meant(str(error['loc'][-1]), sorted(known))}"
    message = _cut(str(error["msg"]).removeprefix("Value error, "), 1000)
    return f"{place}: {message} (found {_cut(repr(error['input']))}{source})"


def _origin(place: tuple[Any, ...], sources: Sequence[Given]) -> str | None:
    """Where the value at `place` was given last; None for a default, and for a group that several gave a part of."""
    holding = [(source.origin, below) for source in sources if (below := _below(source.settings, place)) is not None]
    if not holding or (len(holding) > 1 and isinstance(holding[-1][1], Mapping)):
        return None
    return holding[-1][0]


def _below(tree: Any, place: tuple[Any, ...]) -> Any:
    """What stands at `place`, or the value that it lies within; None if there is neither."""
    for part in place:
        if not isinstance(tree, Mapping):
            break
        tree = tree.get(part)
    return tree


def _cut(text: str, most: int = 200) -> str:
    """The text, or its beginning and how long it is."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def meant(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: the one that looks most like it, or all that are."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"


def _fields_at(kind: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The setting names that are known below `location`."""
    for part in location:
        if isinstance(part, int):  # of a list, whose groups are all of one kind
            continue
        field = kind.model_fields.get(str(part))
        inner = None if field is None else field.annotation
        # A group itself, or the one in `Group | None` and `tuple[Group, ...]`.
        groups = [k for k in (inner, *get_args(inner)) if isinstance(k, type) and issubclass(k, BaseModel)]
        if len(groups) != 1:
            return []
        kind = groups[0]
    return list(kind.model_fields)


class BuildConfig(Settings):
    """`pipeline/build_shards.py`: which data, which encoder, which columns, and how to run."""

    data: str | tuple[str, ...] = Field(description="LLaVA JSON or JSONL file(s), local or s3://")
    images: str | tuple[str, ...] = Field(description="image folder(s) or .zip file(s), local or s3://")
    store: str = Field(description="where the feature store goes, local or s3://")

    encoder: str = Field(
        default="openai/clip-vit-large-patch14-336",
        description="Hub id or folder of a vision encoder of a type in encoders/",
    )
    revision: str | None = Field(default=None, description="Hub revision of the encoder")
    blocks: tuple[int, ...] = Field(default=PAPER_BLOCKS, description="blocks to store, 1-based")
    cls: tuple[int, ...] = Field(default=(), description="blocks whose CLS token to store too, e.g. [22, 23]")
    aspect: Aspect = Field(default="pad", description="pad to a square, or centre-crop a square, as LLaVA-1.5")
    codec: Codec = Field(default="bf16", description="how features are stored")
    compute: Compute = Field(default="bfloat16", description="dtype of the forward pass")

    shard_size: int = Field(default=256, gt=0, description="samples per shard")
    seed: int = Field(default=0, description="of the shuffled order of samples")
    limit: int | None = Field(default=None, gt=0, description="only the first N samples of the shuffled order")
    store_images: bool = Field(default=False, description="keep the source image beside its record")
    max_failures: float = Field(
        default=0.01, ge=0, le=1, description="rate of failed samples above which the job stops"
    )

    workers: int | None = Field(
        default=None, gt=0, description="encoding actors; default: as many as the cluster holds"
    )
    num_gpus: float = Field(default=0, ge=0, description="GPUs per worker")
    num_cpus: float = Field(default=1, gt=0, description="CPU cores per worker")
    batch_size: int = Field(default=32, gt=0, description="images per forward pass")
    decode_threads: int = Field(default=4, gt=0, description="threads per worker that fetch and decode images")
    hang_s: float = Field(
        default=900,
        gt=0,
        description="seconds without a step (one image, one forward pass of a batch, or one tar published) after "
        "which a worker is ended and its shard tried again",
    )
    ray_address: str | None = Field(default=None, description="Ray cluster; default: RAY_ADDRESS, else a local one")

    @property
    def data_files(self) -> tuple[str, ...]:
        """The files of `data`: one or several."""
        return (self.data,) if isinstance(self.data, str) else self.data

    @property
    def image_roots(self) -> tuple[str, ...]:
        """The roots of `images`: one or several."""
        return (self.images,) if isinstance(self.images, str) else self.images

    @field_validator("data", "images")
    @classmethod
    def _some_paths(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or not all(value):
            raise ValueError("expected a path or several, none of them empty")
        return value

    @field_validator("blocks", "cls")
    @classmethod
    def _unique_blocks(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value) or any(not 0 <= block <= 99 for block in value):
            raise ValueError("expected distinct block numbers, 0 to 99")
        return value

    @field_validator("blocks")
    @classmethod
    def _some_blocks(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            raise ValueError("at least one block is needed")
        return value
