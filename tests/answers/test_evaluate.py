"""The command itself: a tiny exported model on official files, alone, in batches, in two processes, after a crash."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from training.answers.answer import answer_all
from training.answers.answer_file import AnswerFile
from training.benchmarks import AVERAGED, Source
from training.benchmarks.report import describe
from training.benchmarks.scores import averages, score_file, scores_beside

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


def evaluate(*arguments: object, fails: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "training/evaluate.py", *map(str, arguments)]
    done = subprocess.run(command, check=False, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode != 0) is fails, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def texts(path: Path) -> dict[str, str]:
    return {record["question_id"]: record["text"] for record in map(json.loads, path.read_text().splitlines())}


def test_batches_processes_and_a_crash_change_no_answer(exported: Path, data: Path, tmp_path: Path) -> None:
    common = ["--benchmark", "scienceqa", "vizwiz", "--data", data, "--max-new-tokens", 6]
    alone = evaluate(exported, *common, "--out", tmp_path / "alone", "--batch-size", 1)
    reports = [json.loads(line) for line in alone.stdout.splitlines()]
    assert [report["benchmark"] for report in reports] == ["scienceqa", "vizwiz"]
    assert reports[0]["questions"] == reports[0]["answered"] == 3
    expected = texts(tmp_path / "alone" / "scienceqa.jsonl")
    assert len(set(expected.values())) == 3  # pictures and words matter
    assert "average" in alone.stderr
    assert json.loads((tmp_path / "alone" / "server" / "vizwiz_val.json").read_text())[0]["image"].startswith("VizWiz")

    crashed = tmp_path / "crashed" / "scienceqa.jsonl"  # what a killed process leaves: one answer and half another
    crashed.parent.mkdir()
    first, second, _ = (tmp_path / "alone" / "scienceqa.jsonl").read_text().splitlines()
    changed = json.dumps({**json.loads(first), "text": "kept as it was"})
    crashed.write_text(f"{changed}\n{second[:30]}")
    evaluate(exported, *common[:1], "scienceqa", *common[3:], "--out", crashed.parent, "--processes", 2)
    assert texts(crashed) == {**expected, "4": "kept as it was"}
    assert sorted(p.name for p in crashed.parent.iterdir() if ".jsonl" in p.name) == [
        "scienceqa.jsonl",
        "scienceqa.jsonl.run.json",
    ]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_damaged_image_costs_its_own_question_only(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = Image.new("RGB", (40, 30), (200, 30, 60))
    odd = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01"  # an EXIF block that is cut off
    names = ["a.jpg", "damaged.jpg", "odd.jpg"]
    for name in names:
        photo.save(tmp_path / name, exif=odd if name == "odd.jpg" else b"")
    whole = (tmp_path / "damaged.jpg").read_bytes()
    (tmp_path / "damaged.jpg").write_bytes(whole[: len(whole) // 2])
    lines = [json.dumps({"question_id": name, "image": name, "text": "What?"}) + "\n" for name in names]
    (tmp_path / "q.jsonl").write_text("".join(lines))
    out = tmp_path / "a.jsonl"

    def answer() -> str:
        source = Source(names=(), data=None, split=None, questions=tmp_path / "q.jsonl", images=tmp_path, limit=None)
        (questions,) = source.open()
        answer_all(str(exported), questions, out, batch_size=1, max_new_tokens=4)
        return capsys.readouterr().err + describe(score_file(questions, out))

    said = answer()
    assert "question damaged.jpg is not answered" in said
    assert "2 of 3 questions answered" in said
    assert list(texts(out)) == ["a.jpg", "odd.jpg"]
    (tmp_path / "damaged.jpg").write_bytes(whole)
    assert "3 of 3 questions answered" in answer()


def test_answers_of_another_model_are_not_mixed_in(exported: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "gqa.jsonl").write_text("")
    (out / "gqa.jsonl.run.json").write_text(json.dumps({"weights": "other", "max_new_tokens": 128}))
    done = evaluate(exported, "--benchmark", "gqa", "--data", data, "--out", out, fails=True)
    assert "another run" in done.stderr
    assert "weights: 'other' there" in done.stderr


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("a.jsonl.run.json", '{"weights"', r"a\.jsonl\.run\.json is damaged .*; delete it"),
        ("a.jsonl.run.json", "[]", r"a\.jsonl\.run\.json is damaged"),
        (
            "a.jsonl",
            '{"question_id": [1], "image": null, "text": "x"}\n',
            r"a\.jsonl:1 is not an answer \(TypeError: quest",
        ),
        ("a.jsonl", '{"question_id": 1, "image": null}\n', r"a\.jsonl:1 is not an answer \(KeyError: 'text'"),
        ("a.jsonl", "[" * 200_000 + "\n", r"a\.jsonl:1 is not an answer .*nested too deep"),
    ],
)
def test_damaged_files_of_answers_are_named(tmp_path: Path, file: str, text: str, said: str) -> None:
    answers = AnswerFile(tmp_path / "a.jsonl")
    answers.path.write_text("")
    answers.claim(str(tmp_path), 8)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=said):
        answers.claim(str(tmp_path), 8)
        answers.answers()


def test_each_file_of_answers_has_scores_of_its_own(tmp_path: Path) -> None:
    names = {"a.jsonl": "a", "a.json": "a.json", "a.v1": "a.v1", "a.v2": "a.v2"}
    for name, scores in names.items():
        answers = AnswerFile(tmp_path / name)
        assert scores_beside(answers.path).name == f"{scores}.scores.json"
        answers.claim(str(tmp_path), 8)
        answers.path.touch()
    with pytest.raises(
        ValueError, match=r"the scores of .*/a would replace those of .*a\.jsonl in a\.scores\.json; name"
    ):
        AnswerFile(tmp_path / "a").claim(str(tmp_path), 8)
    (tmp_path / "a.jsonl").unlink()
    AnswerFile(tmp_path / "a").claim(str(tmp_path), 8)


def test_predictions_are_scored_and_compared_without_torch(data: Path, tmp_path: Path) -> None:
    said, other = tmp_path / "said.jsonl", tmp_path / "other.jsonl"
    said.write_text("".join(json.dumps({"question_id": id, "text": "yes"}) + "\n" for id in ("201", "202", "203")))
    other.write_text('{"question_id": "202", "text": "Cat."}\noops\n')
    script = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv[0] = 'training/evaluate.py';"
        "runpy.run_path('training/evaluate.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", script, "--benchmark", "gqa", "--data", data, "--predictions", said]
    command += ["--against", other, "--out", tmp_path / "out"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, command)), check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["score"] == pytest.approx(100 / 3)
    assert report["interval"][0] <= report["score"] <= report["interval"][1]
    difference = report["against"]["differences"]["accuracy"]
    assert difference["difference"] == 0.0
    assert difference["units_that_differ"] == 2
    assert report["against"]["problems"]["missing"]["count"] == 2
    assert report["against"]["problems"]["malformed"]["count"] == 1
    assert json.loads((tmp_path / "out" / "gqa.scores.json").read_text()) == report


def test_averages_with_and_without_vizwiz(tmp_path: Path) -> None:
    assert len(AVERAGED) == 8
    for name in (*AVERAGED, "mme"):
        value = {"vizwiz": 2.0, "mme": 1500.0}.get(name, 66.0)
        (tmp_path / f"{name}.scores.json").write_text(json.dumps({"headline": "h", "score": value}))
    table = averages(tmp_path)
    assert "average                      58.00" in table
    assert "... without VizWiz           66.00" in table
    (tmp_path / "gqa.scores.json").unlink()
    assert "gqa missing" in averages(tmp_path)
    for odd in ("[]", '{"headline": "h", "score": "high"}', '{"headline": "h", "score": 1, "questions": "many"}'):
        (tmp_path / "pope.scores.json").write_text(odd)
        with pytest.raises(ValueError, match=r"pope\.scores\.json holds no scores of pope"):
            averages(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "pope", "--predictions", "x"], "--benchmark needs --data"),
        (["--benchmark", "pope", "--data", "."], "give a model, or the --predictions of one"),
        (["model", "--questions", "q.jsonl"], "--questions needs --images and --out"),
        (["--average", ".", "--predictions", "x"], "leave out the model and the predictions"),
        (["model"], "give one of --benchmark, --questions and --average"),
        (
            ["model", "--questions", "q", "--images", ".", "--out", "/dev/null"],
            "/dev/null is no file, in which answers",
        ),
        (["model", "--questions", "q", "--images", ".", "--out", "."], "--out . is no file, in which answers are kept"),
        (["model", "--benchmark", "pope", "--data", ".", "--out", "/dev/null"], "--out /dev/null is no folder"),
        (
            ["model", "--questions", "none.jsonl", "--images", ".", "--out", "x"],
            "none.jsonl does not exist",
        ),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import evaluate as module

    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert message in str(stopped.value)
    capsys.readouterr()
