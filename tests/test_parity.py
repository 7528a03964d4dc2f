"""The reference vectors: every file opens without pickle and holds what it says; a further folder's cases run too."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TESTS = Path(__file__).parent
OWN = TESTS / "parity"


@pytest.mark.vectors("**/*.npz")
def test_every_file_of_arrays_opens_without_pickle(vectors: Path) -> None:
    with np.load(vectors, allow_pickle=False) as arrays:
        assert arrays.files
        for name in arrays.files:
            assert arrays[name].dtype.kind in "biuf", name


@pytest.mark.vectors("systems/*.json")
def test_a_systems_arrays_are_those_that_its_json_names(vectors: Path) -> None:
    facts = json.loads(vectors.read_text(encoding="utf-8"))
    with np.load(vectors.with_suffix(".npz"), allow_pickle=False) as arrays:
        found = {name: (list(arrays[name].shape), arrays[name].dtype.name) for name in arrays.files}
    assert found == {name: (array["shape"], array["dtype"]) for name, array in facts["arrays"].items()}
    owners = {name.split("::")[0] for name in found}
    assert set(facts["cases"]) <= owners
    assert all(array["meaning"] for array in facts["arrays"].values())


def write_list(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """A list of two cases. Something in the second is wrong."""
    right, wrong = json.loads((OWN / f"{name}.json").read_text(encoding="utf-8"))[:2]
    change(wrong)
    (folder / f"{name}.json").write_text(json.dumps([right, wrong]), encoding="utf-8")


def write_arrays(folder: Path, name: str, array: str) -> None:
    """Two files. One number in the second is wrong."""
    with np.load(OWN / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    np.savez(folder / f"{name}_right.npz", **arrays)
    arrays[array].flat[17] *= 1.01
    np.savez(folder / f"{name}_wrong.npz", **arrays)
    for json_file in OWN.glob(f"{name}.json"):
        for which in ("right", "wrong"):
            shutil.copy(json_file, folder / f"{name}_{which}.json")


def test_cases_of_a_further_folder_run_too_and_a_wrong_number_fails(tmp_path: Path) -> None:
    folder = tmp_path / "further"
    folder.mkdir()
    write_list(folder, "conversations", lambda case: case["labels"].append(5))
    write_list(folder, "prompts", lambda case: case["input_ids"].append(5))
    write_list(folder, "learning_rates", lambda case: case["lr"].update({"1": 1.29e-07}))
    write_arrays(folder, "images", "px::pad::img3_333x500")
    write_arrays(folder, "released_projector", "y_fp32")

    command = [sys.executable, "-m", "pytest", "-k", "further-", "-rA", "--tb=no", "-p", "no:cacheprovider"]
    mark = "@pytest.mark.vectors("
    files = [file for file in sorted(TESTS.rglob("test_*.py")) if mark in file.read_text(encoding="utf-8")]
    command += [str(file) for file in files if file != Path(__file__)]
    environment = {**os.environ, "COMPACT_VISION_VECTORS": str(folder)}
    done = subprocess.run(command, check=False, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    ended: dict[str, set[str]] = {"PASSED": set(), "FAILED": set()}
    for how, case in re.findall(r"^(PASSED|FAILED) .*\[further-(\S+)\](?: - .*)?$", done.stdout, re.MULTILINE):
        ended[how].add(case)
    right = {"conversations-0", "prompts-0", "learning_rates-0", "images_right-pad", "images_right-square"}
    right |= {"images_wrong-square", "released_projector_right"}
    wrong = {"conversations-1", "prompts-1", "learning_rates-1", "images_wrong-pad", "released_projector_wrong"}
    assert ended == {"PASSED": right, "FAILED": wrong}, done.stdout + done.stderr


def test_a_further_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    environment = {**os.environ, "COMPACT_VISION_VECTORS": str(tmp_path / "missing")}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, check=False, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"{tmp_path / 'missing'} is not a folder; set COMPACT_VISION_VECTORS to one" in done.stdout + done.stderr
