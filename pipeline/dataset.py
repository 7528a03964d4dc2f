"""LLaVA JSON or JSONL -> one record per image with all its conversations, in a deterministic shuffled order.

CC-595K             chat.json and a folder, or images.zip as it is
LLaVA-Instruct-158K records that share COCO images: each image once
LLaVA-1.5's mixes   several image folders; records without an image are kept as they are
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import ValidationError

from pipeline.schema import Conversation, Failure, Turn
from pipeline.storage import Storage

_AS_LINE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_PACKED = (b"\x1f\x8b", b"PK\3\4", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, zip, bzip2, xz and zstd
LONGEST_REASON = 500  # characters


@dataclass(slots=True)
class Record:
    """One image with all its conversations, or one text-only conversation (`image` is None)."""

    image: str | None
    conversations: list[dict[str, Any]] = field(default_factory=list)  # Conversation, as plain data


@dataclass(frozen=True)
class Dataset:
    """What the source says, checked: records in the store's order, and what had to be left out."""

    records: list[Record]
    failures: list[Failure]
    digest: str
    conversations: int
    merged: int  # conversations that joined an image already seen
    duplicates: int  # records that repeat another word for word, left out


def read_dataset(data: tuple[str, ...], seed: int, limit: int | None) -> Dataset:
    """Read and check the JSON files, group by image, shuffle, and keep the first `limit` records.

    The digest is over all records in the order of the files, so it does not depend on seed or limit.

    Raises:
        ValueError: if a file is not there, or is neither JSON nor JSON lines.
    """
    grouped: dict[str, Record] = {}  # by image, so that each image is stored once
    order: list[Record] = []  # as they first occur in the files
    failures: list[Failure] = []
    digest = hashlib.sha256()
    seen: set[bytes] = set()
    counts = {"conversations": 0, "merged": 0, "duplicates": 0}
    for source, raw in _raw_records(data):
        checked = _checked(raw)
        if isinstance(checked, str):
            failures.append(Failure(key="", source=source, reason=checked, kind="record"))
            continue
        image, conversation, identity = checked
        if identity in seen:
            counts["duplicates"] += 1
            continue
        seen.add(identity)
        digest.update(identity)
        counts["conversations"] += 1
        if image is None:
            order.append(Record(None, [conversation]))
        elif image in grouped:
            grouped[image].conversations.append(conversation)
            counts["merged"] += 1
        else:
            grouped[image] = Record(image, [conversation])
            order.append(grouped[image])
    return Dataset([order[i] for i in _permutation(len(order), seed)][:limit], failures, digest.hexdigest(), **counts)


def _permutation(count: int, seed: int) -> list[int]:
    """A shuffle that stays the same for ever: PCG64's raw bits are guaranteed, numpy's shuffle is not."""
    bits: Any = np.random.PCG64(np.random.SeedSequence([seed, 0xDA7A])).random_raw(count)
    order: list[int] = np.argsort(bits, kind="stable").tolist()
    return order


def _raw_records(files: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(place, record) of every record of every file."""
    for file in files:
        root, _, name = file.rpartition("/")
        try:
            data = Storage(root or ".").read(name)
        except FileNotFoundError as error:
            raise ValueError(f"data: {file} does not exist; give a JSON or JSONL file, local or s3://") from error
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            cure = "unpack it" if data.startswith(_PACKED) else "save it as UTF-8"
            raise ValueError(f"data: {file} is not UTF-8 text: {error}; {cure}") from error
        if text.lstrip().startswith("["):
            try:
                records = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"data: {file} is not JSON: {error}; correct it there, or copy it again") from error
            except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
                records = _one_by_one(file, text)
            yield from ((f"{name}#{index}", record) for index, record in enumerate(records))
            continue
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        parsed = [(number, _parsed(line)) for number, line in lines]
        if not lines:
            raise ValueError(f"data: {file} is empty; copy it again, or leave it out")
        if all(isinstance(record, ValueError) for _, record in parsed):
            raise ValueError(
                f"data: {file} is neither a JSON list nor JSON lines, it begins with {text[:40]!r}; give LLaVA records"
            )
        yield from ((f"{name}:{number}", record) for number, record in parsed)


def _parsed(line: str) -> Any:
    """The record of a line, or the error as a value: a broken line must not cost the others."""
    try:
        return json.loads(line)
    except ValueError as error:
        return error
    except RecursionError:
        return ValueError("nested too deeply")


def _one_by_one(file: str, text: str) -> Iterator[Any]:
    """The records of a JSON list, one of which is too much for the parser: cut at the commas between them.

    Raises:
        ValueError: if the list has no end.
    """
    depth, begin = 0, 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[][{},]', text):
        if token[0] in ("[", "{"):
            depth += 1
            begin = token.end() if depth == 1 else begin
        elif token[0] in ("]", "}"):
            depth -= 1
        if (token[0] == "," and depth == 1) or (token[0] == "]" and depth == 0):
            yield _parsed(text[begin : token.start()])
            begin = token.end()
    if depth:
        raise ValueError(f"data: {file} is not JSON: its list does not end; copy it again")


def _checked(raw: Any) -> tuple[str | None, dict[str, Any], bytes] | str:
    """(image, conversation, identity) of a source record, or the reason why it is none."""
    try:
        found = _read_record(raw)
        if isinstance(found, str):
            return found if len(found) <= LONGEST_REASON else f"{found[:LONGEST_REASON]}..."
        # What a record says, in one canonical line: equal records have equal hashes, and the digest is over these.
        return *found, hashlib.sha256(_AS_LINE(found).encode()).digest()
    except RecursionError:
        return "nested too deeply"
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        return f"{half!r} is half of a character, as of an emoji that was cut in two; correct the text"


def _read_record(raw: Any) -> tuple[str | None, dict[str, Any]] | str:
    """(image, conversation) of a source record, or the reason why it is none."""
    if isinstance(raw, ValueError):
        return f"not JSON: {raw}"
    if not isinstance(raw, dict):
        return f"a record must be a mapping, this is a {type(raw).__name__}"
    image, turns = raw.get("image"), raw.get("conversations")
    if not isinstance(turns, list) or not turns:
        return f"no conversations: found {repr(turns)[:80]}, expected a list of turns"
    try:
        conversation = Conversation(id=str(raw.get("id", "")), turns=turns)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"conversations: {place}: {first['msg']} (found {str(first['input'])[:80]!r})"
    wrong = _wrong_turns(conversation.turns) or (None if image is None else _wrong_name(image))
    if wrong is not None:
        return wrong
    # Not pathlib: this runs for every record of a million.
    return None if image is None else posixpath.normpath(image), conversation.model_dump(by_alias=True)


def _wrong_turns(turns: tuple[Turn, ...]) -> str | None:
    """Why these turns are no conversation, or None if they are one."""
    speakers = [turn.speaker for turn in turns]
    speakers = speakers[1:] if speakers[0] == "gpt" else speakers  # a leading answer is dropped, as LLaVA-1.5
    if not speakers or any(s != ("human", "gpt")[i % 2] for i, s in enumerate(speakers)):
        return f"conversations: speakers do not alternate ({', '.join(speakers[:6])}); expected human, gpt, human, ..."
    return None


def _wrong_name(image: Any) -> str | None:
    """Why this is not the name of an image below an image root, or None if it is one."""
    if not isinstance(image, str) or not image:
        return f"image is {image!r}; expected a path"
    if "\\" in image:
        return f"image {image!r} holds a backslash, as Windows writes paths; write forward slashes"
    if image[0] == "/" or ".." in image.split("/") or "\0" in image or "://" in image:
        return f"image {image!r} leaves the image folder: refused; expected a path within it"
    return None
