"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference vectors and photos beside the checkout; without it the test is skipped."""
    folder = Path(os.environ.get("COMPACT_VISION_SHARED", Path(__file__).resolve().parents[1] / ".." / "shared"))
    if not (folder / "parity").is_dir():
        pytest.skip(f"no reference vectors in {folder} (COMPACT_VISION_SHARED names another folder)")
    return folder.resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first: two processes that share out the files then end together."""

    def minutes(item: pytest.Item) -> float:
        marks = item.iter_markers("slow")
        return max((float(mark.kwargs.get("minutes", 0)) for mark in marks), default=0.0)

    longest: dict[Path, float] = {}
    for item in items:
        longest[item.path] = max(longest.get(item.path, 0), minutes(item))
    items.sort(key=lambda item: -longest[item.path])
