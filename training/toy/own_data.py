"""Your own LLaVA-format data for the demo: read, looked through before anything is made. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.images import find_file
from pipeline.regular import check_regular
from pipeline.schema import Turn
from training.benchmarks.own import OwnQuestions
from training.benchmarks.questions import read_json, read_json_lines, read_text

NAMED = 3  # how many of what is wrong are named
SPEAKERS = ("human", "gpt")


def raw_records(path: Path) -> list[Any]:
    """What a file of LLaVA data lists, JSON or JSON lines, whatever it is.

    Raises:
        ValueError: if it is neither, or lists nothing. OSError: if it cannot be read.
    """
    if not read_text(path).lstrip().startswith("["):
        records: list[Any] = list(read_json_lines(path))
    else:
        records = read_json(path)
    if not records:
        raise ValueError(f"{path} holds no record; give it LLaVA records, objects with image and conversations")
    return records


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records that say something: a conversation in which each question has an answer, about an image or none.

    Returns:
        `conversations` begins with a question; `image` is there if there is one.

    Raises:
        ValueError: if the file is no list of records, or none says anything, with what is wrong with the first.
    """
    raw = raw_records(path)
    found = [record for record in map(_record, raw) if isinstance(record, dict)]
    if not found:
        raise ValueError(f"{path}: none of its {len(raw)} records can be used; the first has {_record(raw[0])}")
    return found


def _record(raw: Any) -> dict[str, Any] | str:
    """A record that can be used, or what is wrong with it."""
    if not isinstance(raw, Mapping):
        return f"no keys, it is {str(raw)[:60]!r}; give an object with image and conversations"
    turns = raw.get("conversations")
    if not isinstance(turns, list):
        return f"no list `conversations`, its keys are {', '.join(map(str, raw))[:100] or 'none'}; give it one"
    said = _turns(turns)
    if isinstance(said, str):
        return said
    image = raw.get("image")
    if image is not None and not isinstance(image, str):
        return f"the image {image!r:.60}; give the name of a file"
    conversations = [{"from": turn.speaker, "value": turn.value} for turn in said]
    return {"conversations": conversations} | ({} if image is None else {"image": image})


def _turns(raw: list[Any]) -> list[Turn] | str:
    """Turns that alternate, the question first, or what is wrong with them."""
    try:
        turns = [Turn.model_validate(turn) for turn in raw]
        "".join(turn.value for turn in turns).encode()
    except UnicodeEncodeError as error:
        return f"{error.object[error.start]!r}, half of a character, as of an emoji that was cut in two; correct it"
    except ValidationError as error:
        return f"a turn {error.errors()[0]['input']!r:.80}; give each turn `from` (human or gpt) and `value`"
    if turns and turns[0].speaker == "gpt":
        turns = turns[1:]  # as the build: a leading answer is dropped
    if len(turns) < 2 or any(turn.speaker != SPEAKERS[n % 2] for n, turn in enumerate(turns)):
        return f"the speakers {', '.join(turn.speaker for turn in turns[:6]) or 'none'}; give it human, gpt, human, ..."
    return turns


def look_through(chat: Path, instruct: Path, images: Path, questions: Path) -> list[str]:
    """Look at everything that a run on own data reads; what a person should know of it, in sentences.

    Raises:
        ValueError: naming all paths that are not what they should be, or what is wrong with data or questions.
        OSError: if something cannot be read.
    """
    files = {"--chat": chat, "--instruct": instruct, "--questions": questions}
    wrong = [_wrong_path(option, path, folder=False) for option, path in files.items()]
    wrong.append(_wrong_path("--images", images, folder=True))
    if found := [each for each in wrong if each is not None]:
        raise ValueError("; ".join(found))
    OwnQuestions(questions, images=images).to_ask()
    remarks = []
    for option, path in (("--chat", chat), ("--instruct", instruct)):
        raw, records = raw_records(path), read_records(path)
        if len(records) < len(raw):
            reason = next(found for found in map(_record, raw) if isinstance(found, str))
            remarks.append(
                f"{option}: {len(raw) - len(records)} of {len(raw)} records cannot be used; the first has {reason}"
            )
        names = list(dict.fromkeys(record["image"] for record in records if "image" in record))
        if not names:
            raise ValueError(f"{option} {path} names no image in its {len(records)} records; give records with `image`")
        absent = [name for name in names if find_file(images, name) is None]
        first = _first(absent)
        if len(absent) == len(names):
            raise ValueError(
                f"{option} {path}: none of its {len(names)} images is in {images} ({first}); give the folder that "
                "these names are relative to"
            )
        if absent:
            remarks.append(f"{option}: {len(absent)} of {len(names)} images are not in {images} and left out: {first}")
    return remarks


def _wrong_path(option: str, path: Path, folder: bool) -> str | None:
    """What is wrong with a path that should be a folder, or a file; None if nothing is.

    Raises:
        ValueError: if it is a device, a pipe or a socket. OSError: if that cannot be told.
    """
    if not path.exists():
        return f"{option} {path}: No such {'folder' if folder else 'file'}; correct the path"
    if folder and not path.is_dir():
        return f"{option} {path} is no folder; name the one that the images are in, unpack an archive"
    if not folder and path.is_dir():
        return f"{option} {path} is a folder; name the file in it"
    check_regular(path)
    if not os.access(path, os.R_OK | os.X_OK if folder else os.R_OK):
        return f"{option} {path} may not be read; change its permissions"
    return None


def _first(names: Sequence[str]) -> str:
    return "first " + ", ".join(f"{name!r:.80}" for name in names[:NAMED]) + (" ..." if len(names) > NAMED else "")
