"""What every test may use, and the one bound on how long any of them may take.

No clock decides a test: what one waits for is an event (a process ended, a file or a line is there). Only a test that
hangs meets a bound, the `timeout` of pyproject.toml, which stops it wherever it waits.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest

MARK = "COMPACT_VISION_TESTS"  # in the environment of all that tests start, grandchildren included


def _bound(config: pytest.Config) -> int:
    return int(config.getini("timeout"))


def pytest_configure(config: pytest.Config) -> None:
    """Before test files copy the environment: the mark, and bounds of Ray and hypothesis that a slow machine meets."""
    os.environ |= {
        MARK: str(os.getpid()),
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(_bound(config)),
        "RAY_agent_register_timeout_ms": str(1000 * _bound(config)),
        # A node that was killed refuses the connection, which is seen at once.
        "RAY_health_check_timeout_ms": str(1000 * _bound(config)),
    }
    hypothesis.settings.register_profile(
        "no clock", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("no clock")


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Processes that a stopped test has left end with the tests, whoever their parent is by now."""
    yield
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get(MARK) == os.environ[MARK] and process.pid != os.getpid()
            helper = process.ppid() == os.getpid() and "multiprocessing" in " ".join(process.cmdline())
            if ours and not helper:  # Python's own helpers end with this process
                process.kill()


@pytest.fixture(scope="session")
def hang_s(pytestconfig: pytest.Config) -> int:
    """Seconds that only a hang takes, for what insists on a bound."""
    return _bound(pytestconfig)


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
