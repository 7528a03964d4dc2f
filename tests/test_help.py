"""Every command explains itself at once: `--help` needs neither torch nor anything else that takes seconds to load."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("pipeline", "training")
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.read_text(encoding="utf-8").startswith("#!")
]
ASK = """
import runpy, sys
sys.argv = [{command!r}, "--help"]
try:
    runpy.run_path({command!r}, run_name="__main__")
except SystemExit as ended:
    print("ended with", ended.code)
print("loaded", sorted({{"torch", "transformers", "ray", "composer", "gradio"}} & sys.modules.keys()))
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_there_and_quick(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(command=command)], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.startswith("usage: ")
    assert done.stdout.endswith("ended with 0\nloaded []\n")
