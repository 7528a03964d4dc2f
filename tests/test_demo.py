"""The demo's own-data form: what it is asked to do is looked at before its first step, and one folder holds one run."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from training import demo


def about(image: str) -> dict[str, object]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    return {"image": image, "conversations": turns}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line, with files of the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    for name in ("chat.json", "instruct.json"):
        (tmp_path / name).write_text(json.dumps([about("a.png")]))
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
    (tmp_path / "chat.json").write_text(json.dumps([about("a.png"), 1]))
    with pytest.raises(SystemExit, match=r"mine holds a run on other data \(chat\); give another --run"):
        demo.main()
    monkeypatch.setattr(sys, "argv", asked[:3])
    with pytest.raises(SystemExit, match=r"on other data \(chat, instruct, questions, images, scenes\)"):
        demo.main()


def test_a_run_of_another_size_or_seed_is_not_taken_up(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.Demo, "step", lambda *_, **__: (_ for _ in ()).throw(ValueError("it goes on")))
    other = (("--size=large", r"a run on other data \(size\)"), ("--seed=1", r"a run on other data \(seed\)"))
    for option, said in (("--size=small", "it goes on"), *other, ("--seed=0", "it goes on")):
        monkeypatch.setattr(sys, "argv", [*asked, option])
        with pytest.raises(SystemExit, match=said):
            demo.main()
        (tmp_path / "mine" / "seconds.json").write_text("{}")  # as if a step were done


def test_steps_side_by_side_all_end_and_the_failed_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = demo.Demo(tmp_path, {}, drawn=True)
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()"
    good = ("good", [sys.executable, "-c", write, str(tmp_path / "good")], tmp_path / "good")
    bad = ("bad", [sys.executable, "-c", "raise ValueError('broken')"], tmp_path / "bad")
    with pytest.raises(SystemExit, match=r"ValueError: broken[\s\S]*step 'bad' ended with 1"):
        job.side_by_side(bad, good)
    assert (tmp_path / "good").exists()
    again = ("bad", [sys.executable, "-c", write, str(tmp_path / "bad")], tmp_path / "bad")
    job.side_by_side(again, good)
    assert "good                   done before" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "seconds.json").read_text())) == {"good", "bad"}


@pytest.mark.parametrize("shown_in", ["questions.jsonl", "chat.json", "instruct.json"])
def test_other_images_in_another_folder_are_noticed_the_same_ones_are_not(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown_in: str
) -> None:
    """And a folder whose note is of the time before images were noted is taken up, and noted."""
    if shown_in != "questions.jsonl":
        (tmp_path / shown_in).write_text(json.dumps([about("b.png"), {"id": "no image"}, about("absent.png")]))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "b.png")
    monkeypatch.setattr(demo.Demo, "step", lambda *_, **__: (_ for _ in ()).throw(ValueError("it goes on")))
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit, match="it goes on"):
        demo.main()
    (tmp_path / "mine" / "seconds.json").write_text("{}")  # as if a step were done
    shutil.copytree(tmp_path / "images", tmp_path / "other")
    monkeypatch.setattr(sys, "argv", [word if word != "images" else "other" for word in asked])
    with pytest.raises(SystemExit, match="it goes on"):
        demo.main()
    note = json.loads((tmp_path / "mine" / "data.json").read_text())
    name = "a.png" if shown_in == "questions.jsonl" else "b.png"
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "other" / name)
    with pytest.raises(SystemExit, match=r"a run on other data \(images\); give another --run, or delete it"):
        demo.main()
    (tmp_path / "mine" / "data.json").write_text(json.dumps({k: v for k, v in note.items() if k != "images"}))
    with pytest.raises(SystemExit, match="it goes on"):
        demo.main()
    assert json.loads((tmp_path / "mine" / "data.json").read_text()).keys() == note.keys()


@pytest.mark.parametrize(
    ("file", "said"),
    [("images/a.png", r"1 image\(s\) of own are not in"), ("chat.json", r"--chat .*chat\.json: No such file"),
     ("questions.jsonl", r"--questions .*questions\.jsonl: No such file")],
)  # fmt: skip
def test_what_is_missing_is_named_before_the_first_step(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, said: str
) -> None:
    (tmp_path / file).unlink()
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        demo.main()
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(("path", "said"), [("chat.json", "--chat .*chat.json: No such file"), ("mine", "mine")])
def test_a_link_to_itself_is_named_as_a_path_that_leads_nowhere(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str
) -> None:
    (tmp_path / path).unlink(missing_ok=True)
    (tmp_path / path).symlink_to(path)
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        demo.main()
