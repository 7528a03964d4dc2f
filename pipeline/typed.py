"""YAML whose scalars keep the text that was typed: under `run`, 007 names a folder; under `seed`, it is a number.

YAML itself decides what a scalar is before anyone knows which setting it belongs to. Here the setting decides.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

MOST_VALUES = 100_000  # of a file, every alias counted as what it stands for
MOST_LEVELS = 50  # of groups and lists within each other
MOST_BRACKETS = 1000  # PyYAML's time grows with their square
_YAML = "tag:yaml.org,2002:"


@dataclass(frozen=True, repr=False)
class Typed:
    """A value as it was typed, and what YAML makes of it."""

    text: str
    value: Any

    def __repr__(self) -> str:
        return repr(self.value)


def read_yaml(text: str) -> Any:
    """Lists, dicts with text as keys, texts, and a `Typed` for each number, bool and null.

    Raises:
        ValueError: if it is not YAML, is nested too deeply, grows by its aliases, names a key twice, or has a tag of a
            program's own.
    """
    if (brackets := text.count("[") + text.count("{")) > MOST_BRACKETS:
        raise ValueError(f"it has {brackets:,} opening brackets, at most {MOST_BRACKETS:,} are read; take some out")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return _plain(loader, node, 0)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError(f"its {brackets:,} brackets or its groups are nested too deeply; take some out") from error


def as_typed(text: str) -> Any:
    """The value of an argument `key=value`. A text in quotes is what stands between them; broken YAML is a text."""
    try:
        value = read_yaml(text)
    except ValueError:
        value = text
    if isinstance(value, str) and text.startswith(("'", '"')):
        return value
    return Typed(text, value.value if isinstance(value, Typed) else value)


def as_annotated(value: Any, annotation: Any) -> Any:
    """`value` with each `Typed` in it as a field of this annotation takes it; `~` in texts is the home folder.

    Groups of settings within are left alone: they have annotations of their own.

    Raises:
        ValueError: if a text cannot be written in UTF-8, or holds a NUL.
    """
    kinds = _kinds(annotation)
    if isinstance(value, Typed) and isinstance(value.value, list | dict) and (kinds - {str, types.NoneType}):
        value = value.value
    if isinstance(value, Typed):
        value = _chosen(value, kinds)
    if isinstance(value, str):
        return _text(value) if str in kinds else value
    if isinstance(value, list):
        return [as_annotated(item, annotation) for item in value]
    if isinstance(value, dict) and not any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds):
        return {name: as_annotated(item, annotation) for name, item in value.items()}
    return value


def _chosen(typed: Typed, kinds: set[Any]) -> Any:
    """What a field of these kinds means by a scalar: the text, or what YAML makes of it."""
    text, value = typed.text, typed.value
    if Any in kinds:  # whoever knows the field comes later: keep the text where the value would lose it
        return text if isinstance(value, int | float) and not isinstance(value, bool) and str(value) != text else value
    if str not in kinds or not text.strip() or type(value) in kinds - {str, types.NoneType}:
        return value
    return None if types.NoneType in kinds and text.strip().lower() == "null" else text


def _text(text: str) -> str:
    if "\0" in text or text != text.encode(errors="replace").decode():
        raise ValueError(f"a text holds characters that no name can have (found {text[:80]!r}); take them out")
    if text != "~" and not text.startswith("~/"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:
        raise ValueError(f"there is no home folder for {text[:80]!r}; set HOME, or write the folder out") from error


def _kinds(annotation: Any) -> set[Any]:
    """The types of the scalars and groups that an annotation takes: str for `tuple[str, ...]` and `Literal["a"]`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(arguments[0])
    if origin is Literal:
        return {type(argument) for argument in arguments}
    if origin is dict:
        return {dict, *_kinds(arguments[1])}
    if origin in (Union, types.UnionType, tuple, list):
        inner = set().union(*(_kinds(argument) for argument in arguments if argument is not ...))
        return inner if origin in (Union, types.UnionType) else {origin, *inner}
    return {annotation}


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Values below a node, itself included; `known` has those of other nodes, None while they are counted."""
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise ValueError(f"line {node.start_mark.line + 1}: an alias stands within what it stands for; take it out")
        return count
    known[id(node)] = None
    below = node.value if isinstance(node, yaml.CollectionNode) else []
    parts = [part for item in below for part in (item if isinstance(item, tuple) else (item,))]
    count = 1 + sum(_count(part, known) for part in parts)
    if count > MOST_VALUES:
        raise ValueError(
            f"line {node.start_mark.line + 1}: more than {MOST_VALUES:,} values, every alias counted; take aliases out"
        )
    known[id(node)] = count
    return count


def _plain(loader: yaml.SafeLoader, node: yaml.Node, level: int) -> Any:
    """The node as lists, dicts, texts and `Typed`; ValueError if it is no setting."""
    place, kind = f"line {node.start_mark.line + 1}", node.tag.removeprefix(_YAML)
    if level > MOST_LEVELS:
        raise ValueError(f"{place}: groups and lists are nested too deeply, at most {MOST_LEVELS}; take some out")
    if isinstance(node, yaml.MappingNode) and kind == "map":
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(names) < len(node.value):
            raise ValueError(f"{place}: a list or a group stands before a colon, a name was expected")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{place}: {', '.join(sorted(twice))} is given twice; keep one")
        loader.flatten_mapping(node)  # what `<<: *anchor` takes over
        return {key.value: _plain(loader, value, level + 1) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_plain(loader, item, level + 1) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and kind in ("str", "timestamp", "value", "merge"):
        return node.value
    if isinstance(node, yaml.ScalarNode) and kind in ("int", "float", "bool", "null"):
        try:
            return Typed(node.value, loader.construct_object(node))
        except (ValueError, KeyError):  # a number of 5,000 digits, `!!bool perhaps`
            return node.value
    raise ValueError(f"{place}: the tag {node.tag!r} means nothing in settings; leave it out")
