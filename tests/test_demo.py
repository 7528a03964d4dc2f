"""The demo's own-data form: what it is asked to do is looked at before its first step, and one folder holds one run."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from training import demo


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line, with files of the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    for name in ("chat.json", "instruct.json"):
        (tmp_path / name).write_text("[]")
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question_id": 1, "image": "a.png", "text": "What?"}))
    files = ["--chat", "chat.json", "--instruct", "instruct.json", "--questions", "questions.jsonl"]
    return ["demo.py", "--run", "mine", "--images", "images", *files]


def test_files_are_those_of_the_folder_that_the_command_was_typed_in(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def step(self: demo.Demo, name: str, command: list[str], done: Path | None = None) -> None:
        steps.append(" ".join(command))
        raise ValueError("only its command is looked at")

    monkeypatch.setattr(demo.Demo, "step", step)
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit, match="only its command"):
        demo.main()
    assert f"--captions {tmp_path}/chat.json --talk {tmp_path}/instruct.json --images {tmp_path}/images" in steps[0]
    (tmp_path / "mine" / "seconds.json").write_text("{}")  # as if a step were done
    (tmp_path / "chat.json").write_text("[1]")
    with pytest.raises(SystemExit, match=r"mine holds a run on other data \(chat\); give another --run"):
        demo.main()
    monkeypatch.setattr(sys, "argv", asked[:3])
    with pytest.raises(SystemExit, match=r"on other data \(chat, instruct, questions\)"):  # drawn scenes
        demo.main()


@pytest.mark.parametrize(
    ("file", "said"),
    [("images/a.png", r"1 image\(s\) of own are not in"), ("chat.json", r"No such file .*chat\.json"),
     ("questions.jsonl", r"No such file .*questions\.jsonl")],
)  # fmt: skip
def test_what_is_missing_is_named_before_the_first_step(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, said: str
) -> None:
    (tmp_path / file).unlink()
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        demo.main()
    assert not (tmp_path / "mine").exists()
