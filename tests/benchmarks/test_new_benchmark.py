"""A new benchmark is a class and its line in `BENCHMARKS`: it is offered, asked, scored and reported as the others."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from training import evaluate
from training.benchmarks import BENCHMARKS, open_benchmark
from training.benchmarks.metrics import Scored
from training.benchmarks.questions import Answers, Benchmark, Question, read_json
from training.sweep.plan import AblationConfig, open_benchmarks


class Colours(Benchmark):
    """Toy: which colour a picture has; `colours.json` says it by the picture's name."""

    name = "colours"
    folders = ("colours",)
    splits = ("test",)
    max_new_tokens = 3

    def read(self) -> list[Question]:
        path = self.find("https://example.org", "colours.json")
        self.check()
        return [Question(name, "Which colour?", name, colour) for name, colour in read_json(path).items()]

    def score(self, answers: Answers) -> dict[str, Scored]:
        hits = {q.id: ("", float(q.id in answers and q.truth in answers[q.id].text.lower())) for q in self.questions}
        return {"named": Scored("the colour is named", hits)}


class Nameless(Benchmark):
    """A benchmark that is just being written."""

    def read(self) -> list[Question]:
        return []

    def score(self, answers: Answers) -> dict[str, Scored]:
        return {}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy's files; the toy is one more benchmark while the test runs."""
    monkeypatch.setitem(BENCHMARKS, "colours", f"{__name__}:Colours")  # the one line
    folder = tmp_path / "data" / "colours"
    folder.mkdir(parents=True)
    for colour in ("red", "green", "blue"):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), colour).save(buffer, format="PNG")
        (folder / f"{colour}.png").write_bytes(buffer.getvalue())
    (folder / "colours.json").write_text(json.dumps({f"{name}.png": name for name in ("red", "green", "blue")}))
    return folder.parent


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    evaluate.main()


def test_it_is_offered(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    assert "colours" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="did you mean 'colours'"):
        run(monkeypatch, "--benchmark", "colurs", "--data", data, "--predictions", "x")


def test_a_model_is_asked_and_its_answers_are_scored_and_reported(
    data: Path,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = data.parent / "out"
    run(monkeypatch, exported, "--benchmark", "colours", "--data", data, "--out", out)
    said = capsys.readouterr()
    report = json.loads(said.out.splitlines()[-1])
    assert report["answered"] == report["questions"] == 3
    answers = [json.loads(line) for line in (out / "colours.jsonl").read_text().splitlines()]
    assert [answer["image"] for answer in answers] == ["red.png", "green.png", "blue.png"]
    assert json.loads((out / "colours.jsonl.run.json").read_text())["max_new_tokens"] == 3
    assert json.loads((out / "colours.scores.json").read_text()) == report
    assert "colours test: 3 of 3 questions answered" in said.err
    assert "\ncolours      named " in said.err  # the table of averages has it


def test_predictions_of_another_model_are_scored_and_compared(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, colours in (("mine", ("Red.", "green", "a blue one")), ("theirs", ("red", "red", "red"))):
        lines = zip(("red.png", "green.png", "blue.png"), colours, strict=True)
        text = "".join(json.dumps({"question_id": id, "text": said}) + "\n" for id, said in lines)
        (data / f"{name}.jsonl").write_text(text)
    common = ["--benchmark", "colours", "--data", data]
    run(monkeypatch, *common, "--predictions", data / "mine.jsonl", "--against", data / "theirs.jsonl")
    report = json.loads(capsys.readouterr().out)
    assert report["score"] == 100
    assert report["against"]["differences"]["named"]["difference"] == pytest.approx(200 / 3)


def test_an_ablation_may_name_it(data: Path) -> None:
    stage = {"config": "training/pretrain.yaml"}
    arms = [{"name": "STF", "connector": {"arm": "stf"}}]
    config = AblationConfig(
        title="T", run="r", pretrain=stage, finetune=stage, arms=arms, benchmarks=["colours"], data=str(data), limit=2
    )
    (benchmark,) = open_benchmarks(config)
    assert benchmark.heading == "colours"
    assert benchmark.answers_in(Path("run")) == Path("run/colours.jsonl")
    assert len(benchmark.to_ask()) == 2


def test_a_line_that_names_no_whole_benchmark_is_one_message_and_stops_no_other(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "said.jsonl").write_text('{"question_id": "red.png", "text": "red"}')
    another = ["--benchmark", "colours", "--data", data, "--predictions", tmp_path / "said.jsonl", "--out", tmp_path]
    (tmp_path / "torn_benchmark.py").write_text("class Torn:\n    def")
    monkeypatch.syspath_prepend(str(tmp_path))
    for place, said in (
        ("training.benchmarks.gone:Gone", "__init__.py names 'training.benchmarks.gone:Gone': .*No module .*that line"),
        ("training.benchmarks.own:Gone", "AttributeError .* has no attribute 'Gone'"),
        ("training.benchmarks own", "ValueError invalid format"),
        ("torn_benchmark:Torn", r"SyntaxError .*torn_benchmark.py, line 2\); correct that line, or that file"),
        ("training.benchmarks.own:normalise", "own:normalise is no Benchmark; name a class"),
        ("training.benchmarks.scores:Report", "scores:Report is no Benchmark; name a class"),
        (f"{__name__}:Nameless", "Nameless lacks name, folders, splits; write it there"),
        ("training.benchmarks.questions:Benchmark", "questions:Benchmark lacks read, score; write it there"),
        ("training.benchmarks.own:OwnQuestions", "own:OwnQuestions 'half', it calls itself 'own'; correct one"),
    ):
        monkeypatch.setitem(BENCHMARKS, "half", place)
        with pytest.raises(ValueError, match=said):
            open_benchmark("half", data)
        with pytest.raises(SystemExit, match=f"^error: .*{said}"):
            run(monkeypatch, "--benchmark", "half", *another[2:])
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, "--help")
        assert ended.value.code == 0
        assert re.search(f"  half         cannot be used: .*{said}", capsys.readouterr().out)
        run(monkeypatch, *another)
        assert re.search(f"\ncolours .*(?s:.*)\nhalf         is not looked at: .*{said}", capsys.readouterr().err)
