"""Scratch folders of a store: whose are swept, and what is said if the file system refuses."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.storage import SCRATCH_LASTS, Storage


def made(store: Path, name: str, age: float = 0) -> Path:
    """A scratch folder of that name, as old as that by the clock of the file system."""
    folder = store / ".scratch" / name
    folder.mkdir(parents=True)
    present = folder.stat().st_mtime
    os.utime(folder, (present - age, present - age))
    return folder


@pytest.mark.parametrize("wrong_by", [-10 * 365 * 86400, 0, 10 * 365 * 86400])
def test_no_clock_of_this_machine_decides_about_the_files_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong_by: float
) -> None:
    present = time.time()
    monkeypatch.setattr(time, "time", lambda: present + wrong_by)
    lives = made(tmp_path, "other.example.org.17.0123abcd", age=SCRATCH_LASTS - 3600)
    old = made(tmp_path, "other.example.org.18.0123abcd", age=SCRATCH_LASTS + 3600)
    Storage(tmp_path).sweep_scratch()
    assert lives.exists()
    assert not old.exists()


def test_what_a_dead_process_of_this_machine_left_goes_at_once_and_a_living_one_keeps_its_own(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pipeline.storage import Storage\n"
        "with Storage(sys.argv[1]).scratch() as folder: print(folder, flush=True); os._exit(1)"
    )
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    storage = Storage(tmp_path)
    with storage.scratch() as own:
        assert Path(said.stdout.strip()).is_dir()
        storage.sweep_scratch()
        assert not Path(said.stdout.strip()).exists()
        assert own.is_dir()
    assert not (tmp_path / ".scratch").exists()


def test_two_processes_come_and_go_at_once_and_none_loses_its_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.storage import Storage\n"
        "for _ in range(1_000):\n"
        "    with Storage(sys.argv[1]).scratch(): pass"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert not (tmp_path / ".scratch").exists()


def test_a_full_disk_is_named_with_its_place(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/\.scratch/") as caught,
        Storage(tmp_path).scratch(),
        Path("/dev/full").open("wb") as file,
    ):
        file.write(b"x")
    assert caught.value.errno == errno.ENOSPC


def test_a_file_system_without_hard_links_is_named_with_the_cure(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system")
    target = elsewhere / tmp_path.name
    target.mkdir()
    try:
        (tmp_path / ".scratch").symlink_to(target)  # a link from one file system to another is refused as on FAT
        with pytest.raises(OSError, match=f"{tmp_path}/a.tar has no hard links.*on another file system, or on S3"):
            Storage(tmp_path).publish_bytes("a.tar", b"x")
        assert not (tmp_path / "a.tar").exists()
    finally:
        target.rmdir()
