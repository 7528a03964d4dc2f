"""An error holds the value that was found. tests/errors.py counts them, in the folders that it names."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
ERRORS: dict[str, Any] = runpy.run_path(str(ROOT / "tests/errors.py"))

SOURCE = """
LOST = "restore it from a copy"
def check(value, name):
    if value < 0:
        raise ValueError(f"{name} is {value}; give 0 or more")
    if value == 1:
        raise ValueError("one is not enough")
    if value == 2:
        said = f"{name} is 2"
        raise OSError(f"{said}; {LOST}")
    if value == 3:
        sys.exit(text(name))
    try:
        parser.error("set --name, for " + ", ".join(ALLOWED))
    except OSError as error:
        sys.exit(f"error: {error}")
    raise NotImplementedError(f"{name} comes later")
def text(name):
    return f"error: {name} was found in use"
"""
EXPECTED = [(5, True, True), (7, False, False), (10, True, True), (12, True, False), (14, False, True)]


def test_values_and_hints_are_seen_as_a_reader_sees_them() -> None:
    found = list(ERRORS["messages"](SOURCE, "check.py"))
    assert [(message.line, message.value, message.hint) for message in found] == EXPECTED


@pytest.mark.parametrize("folder", ERRORS["GATED"])
def test_errors_hold_the_value_that_was_found(folder: str) -> None:
    found = ERRORS["of_folder"](ROOT / folder)
    lacking = [f"{message.path}:{message.line}: {message.text}" for message in found if not message.value]
    assert found
    assert ERRORS["share"](found, "value") >= ERRORS["GOAL"], "\n".join(lacking)
