"""The tiny parts and settings of tests/training, for tests of engines."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PATH = Path(__file__).resolve().parents[1] / "training" / "conftest.py"
_spec = importlib.util.spec_from_file_location("training_conftest", _PATH)
assert _spec is not None
assert _spec.loader is not None
_parts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_parts)

parts, store, settings = _parts.parts, _parts.store, _parts.settings
