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
