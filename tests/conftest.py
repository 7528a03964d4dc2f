"""What every test may use, and the one bound on how long any of them may take.

No clock decides a test: what one waits for is an event (a process ended, a file or a line is there). Only a test that
hangs meets a bound, the `timeout` of pyproject.toml, which stops it wherever it waits.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest

pytest_plugins = [f"fixtures.{name}" for name in ("models", "official_files", "processes", "runs", "s3", "stores")]
TESTS = Path(__file__).parent
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
    config.addinivalue_line(
        "markers", "vectors(pattern): runs for each file of vectors of that name, or for each case in its list"
    )
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


def _folders(own: str, variable: str) -> list[Path]:
    """The tests' own folder, then the one of the same layout that an environment variable names."""
    folders = [TESTS / own]
    if further := os.environ.get(variable):
        folders.append(Path(further).resolve())
    for folder in folders:
        if not folder.is_dir():
            raise pytest.UsageError(f"{folder} is not a folder; set {variable} to one, or unset it")
    return folders


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Vectors and photos are found when the tests are collected: a further folder's run like the tests' own.

    A test marked `vectors("prompts*.json")` runs once for each file of that name; `vectors` is its path. If it asks for
    `case`, it runs once for each entry of the list in that file.
    """
    for mark in metafunc.definition.iter_markers("vectors"):
        asked = [name for name in ("vectors", "case") if name in metafunc.fixturenames]
        rows, ids = [], []
        for folder in _folders("parity", "COMPACT_VISION_VECTORS"):
            for file in sorted(folder.glob(mark.args[0])):
                name = "-".join((folder.name, *file.relative_to(folder).with_suffix("").parts))
                cases = json.loads(file.read_text(encoding="utf-8")) if "case" in asked else [None]
                ids += [f"{name}-{number}" for number in range(len(cases))] if "case" in asked else [name]
                rows += [[{"vectors": file, "case": case}[key] for key in asked] for case in cases]
        metafunc.parametrize(asked, rows, ids=ids)
    if "photos" in metafunc.fixturenames:
        metafunc.parametrize("photos", _folders("photos", "COMPACT_VISION_PHOTOS"), ids=lambda folder: folder.name)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Path:
    """The folder of a SentencePiece model of Llama's kind, with 736 pieces."""
    return TESTS / "parity" / "tiny_tokenizer"


@pytest.fixture
def tokenizer_model(vectors: Path, tiny_tokenizer: Path) -> Path:
    """The SentencePiece model that these vectors' ids come from: the one beside them, if there is one."""
    beside = vectors.parent / "tiny_tokenizer" / "tokenizer.model"
    return beside if beside.is_file() else tiny_tokenizer / "tokenizer.model"


def _group(nodeid: str) -> str:
    """What one process runs whole: a file, or pipeline/, whose files share what takes long: one Ray and one store."""
    file = nodeid.partition("::")[0]
    folder = file.rpartition("/")[0]
    return folder if folder.endswith("tests/pipeline") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile` shares out these groups. (`loadgroup` of xdist 3.8 has no effect under pytest 9.2.)"""
    from xdist.scheduler import LoadFileScheduling

    class Groups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return Groups(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest groups come first: two processes that share them out then end together."""
    longest: dict[str, float] = {}
    for item in items:
        group = _group(item.nodeid)
        minutes = max((mark.args[0] for mark in item.iter_markers("minutes")), default=0.0)
        longest[group] = max(longest.get(group, 0), minutes)
    items.sort(key=lambda item: -longest[_group(item.nodeid)])
