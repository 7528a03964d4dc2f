"""The locks: their form, what pyproject.toml asks for, and the environment that this test runs in."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-newest.lock")
VERSIONS = sorted((ROOT / "tests" / "release" / "transformers_versions").glob("*.txt"))
NEWEST = dict(re.findall(r"^(\w+)==(\S+)$", (ROOT / "infra" / "newest.txt").read_text(encoding="utf-8"), re.MULTILINE))
# A name, its version, perhaps where it is needed, and the hashes of its files: no index, no address, no comment.
ENTRY = re.compile(
    r"^(?P<what>(?P<name>[a-z0-9-]+)==(?P<version>[a-z0-9.]+)(?: ; [a-zA-Z0-9_'.=!<>() -]+)?)"
    r"(?P<hashes>(?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n",
    re.MULTILINE,
)


def entries(lock: str) -> dict[str, re.Match[str]]:
    return {entry["name"]: entry for entry in ENTRY.finditer((ROOT / lock).read_text(encoding="utf-8"))}


def asked_for(*extras: str) -> Iterator[Requirement]:
    """Of pyproject.toml; an extra may name others."""
    named = [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    for requirement in map(Requirement, [*(PROJECT["dependencies"] if not extras else ()), *named]):
        if requirement.name == PROJECT["name"]:
            yield from asked_for(*requirement.extras)
        else:
            yield requirement


@pytest.mark.parametrize("lock", [*LOCKS, *VERSIONS], ids=lambda lock: Path(lock).name)
def test_a_lock_holds_names_versions_and_hashes_alone(lock: str) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8")
    assert ENTRY.sub("", text) == ""
    assert len(entries(lock)) == text.count("==") - text.count(" == ")  # each name once


@pytest.mark.parametrize("lock", LOCKS)
def test_all_that_the_project_asks_for_is_locked_at_its_version(lock: str) -> None:
    locked = entries(lock)
    wanted = [*asked_for(), *([] if lock == "requirements.lock" else asked_for("dev")), Requirement("setuptools>=77")]
    assert len(wanted) > 20
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        if lock == "requirements-newest.lock" and name in NEWEST:
            assert locked[name]["version"] == NEWEST[name]
        else:
            assert requirement.specifier.contains(locked[name]["version"], prereleases=True), requirement
    assert ("pytest" in locked) is (lock != "requirements.lock")


def test_the_locks_differ_where_they_must_alone() -> None:
    run, dev, newest = map(entries, LOCKS)
    assert {name: entry[0] for name, entry in run.items()}.items() <= {n: entry[0] for n, entry in dev.items()}.items()
    differing = {name for name in dev.keys() & newest.keys() if dev[name][0] != newest[name][0]}
    assert differing == {*NEWEST, "triton"}
    assert all(re.match("nvidia-|cuda-", name) for name in dev.keys() ^ newest.keys())


def test_this_environment_is_the_lock_that_it_was_made_from() -> None:
    stamp = Path(sys.prefix) / ".installed"
    if not stamp.is_file() or not stamp.stat().st_size:
        pytest.skip("this environment was not made by make from a lock")
    made_from = stamp.read_text(encoding="utf-8")
    (lock,) = [lock for lock in LOCKS if (ROOT / lock).read_text(encoding="utf-8") == made_from]
    wanted = {name: Requirement(entry["what"]) for name, entry in entries(lock).items()}
    expected = {
        name: str(requirement.specifier).removeprefix("==")
        for name, requirement in wanted.items()
        if requirement.marker is None or requirement.marker.evaluate()
    }
    found = importlib.metadata.distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    installed = {canonicalize_name(package.metadata["Name"]): package.version for package in found}
    assert {name: installed.get(name) for name in expected} == expected  # what was added by hand may stay
