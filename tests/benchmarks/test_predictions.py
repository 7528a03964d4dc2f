"""Files of predictions, whoever wrote them: what is wrong is counted and named, nothing is dropped silently."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openpyxl import Workbook

from fixtures.official_files import opened, read, scores
from training.benchmarks import AVERAGED, paper_average
from training.benchmarks.predictions import read_predictions
from training.benchmarks.report import describe
from training.benchmarks.scores import averages, score_file


def test_a_reply_beats_the_truth_beside_it_and_two_replies_are_refused(data: Path, tmp_path: Path) -> None:
    gqa = opened(data, "gqa")
    for key in ("output", "pred", "response", "prediction", "text"):
        rows = [{"question_id": id, "answer": "yes", key: "no"} for id in ("201", "202", "203")]
        assert scores(gqa, read(gqa, tmp_path, rows))["accuracy"] == 0.0, key
    rows = [{"question_id": "201", "text": "Is it red?", "answer": "yes"}]
    assert read(gqa, tmp_path, rows).answers["201"].text == "yes"
    rows = [{"question_id": "201", "pred": "yes", "response": "no"}, {"question_id": "202", "text": "cat"}]
    assert "pred differ" in read(gqa, tmp_path, rows).malformed[0]


@pytest.mark.parametrize("odd", ["null", "NaN", "3", "true", "[]", "{}", "-Infinity"])
@pytest.mark.parametrize("name", ["pope", "mme", "mmbench"])
def test_what_is_no_text_is_no_answer(data: Path, tmp_path: Path, name: str, odd: str) -> None:
    bench = opened(data, name)
    first, second = (json.dumps({"question_id": q.id}) for q in bench.questions[:2])
    (tmp_path / "said.jsonl").write_text(f'{first[:-1]}, "text": {odd}}}\n{second[:-1]}, "text": "yes"}}')
    result = read_predictions(tmp_path / "said.jsonl", bench)
    assert list(result.answers) == [bench.questions[1].id]
    assert len(result.malformed) == 1
    assert "text was expected" in result.malformed[0]


def test_an_empty_column_of_a_spreadsheet_is_no_answer(data: Path, tmp_path: Path) -> None:
    book = Workbook()
    book.active.append(["index", "prediction"])
    for index in (1, 1000001, 2, 1000002, 2000002):
        book.active.append([index, None])
    book.save(tmp_path / "said.xlsx")
    with pytest.raises(ValueError, match=r"no prediction for mmbench dev: found said\.xlsx row 2: prediction is null"):
        read_predictions(tmp_path / "said.xlsx", opened(data, "mmbench"))


def test_another_benchmarks_answers_are_refused_by_what_they_name(data: Path, tmp_path: Path) -> None:
    gqa, vizwiz = opened(data, "gqa"), opened(data, "vizwiz", "val")
    ids = ("201", "202", "203")
    prompts = [{"question_id": id, "prompt": f"How many boats are on sea {id}?", "text": "yes"} for id in ids]
    with pytest.raises(ValueError, match="3 of 3 answers name another prompt or image than the question of gqa"):
        read(gqa, tmp_path, prompts)
    images = [{"question_id": id, "image": f"COCO_{id}.jpg", "text": "yes"} for id in ids]
    with pytest.raises(ValueError, match=r"3 of 3.*COCO_201"):
        read(gqa, tmp_path, images)
    with pytest.raises(ValueError, match="only 1 of 3 answers are to questions of gqa"):
        read(gqa, tmp_path, [{"question_id": id, "text": "yes"} for id in ("201", "9", "10")])
    with pytest.raises(ValueError, match="no prediction for vizwiz val"):
        read(vizwiz, tmp_path, [{"question_id": 0, "prompt": "Which colour has the sky?", "text": "blue"}])
    templates = [
        {"question_id": id, "prompt": f"USER: {q} ASSISTANT:", "text": "yes"}
        for id, q in zip(ids, ("is it red?", "What is it?\\n", "A boat?"), strict=True)
    ]
    result = read(gqa, tmp_path, templates)
    assert len(result.answers) == 3
    assert result.notes[0].startswith("1 of 3 answers name another prompt or image")


def test_odd_files_are_named_without_a_traceback(data: Path, tmp_path: Path) -> None:
    for name in ("gqa", "pope", "textvqa", "vizwiz", "scienceqa", "mme", "mmbench"):
        bench = opened(data, name)
        rows = [{"question_id": bench.questions[0].id, "text": "x"}, {"image": ["a"], "text": "x"}]
        rows += [{"question_id": {}, "text": "x"}, {"row": "x", "question": "y", "answer": "z", "category": "random"}]
        assert len(read(bench, tmp_path, rows).malformed) >= 2
    for text in ("[" * 200_000, '{"a":' * 200_000, '{"question_id": "201", "text": "yes"}\n' + "[" * 200_000):
        (tmp_path / "deep.jsonl").write_text(text)
        if "201" in text:
            assert "nested too deep" in read_predictions(tmp_path / "deep.jsonl", opened(data, "gqa")).malformed[0]
        else:
            with pytest.raises(ValueError, match="nested too deep"):
                read_predictions(tmp_path / "deep.jsonl", opened(data, "gqa"))
    (tmp_path / "latin.jsonl").write_bytes('{"question_id": "201", "text": "caf\xe9"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl is not UTF-8"):
        read_predictions(tmp_path / "latin.jsonl", opened(data, "gqa"))
    (tmp_path / "half.jsonl").write_text('{"question_id": "201", "text": "\\ud800"}\n{"id": "202", "x": 1}')
    result = read_predictions(tmp_path / "half.jsonl", opened(data, "gqa"))
    assert result.answers["201"].text == "?"
    assert result.malformed[0].endswith("it has 'id', 'x'")


def test_the_score_of_an_incomplete_file_stands_beside_its_share(data: Path, tmp_path: Path) -> None:
    said = tmp_path / "said.jsonl"
    said.write_text('{"question_id": "201", "text": "yes"}')
    report = score_file(opened(data, "gqa"), said, out=tmp_path / "gqa.jsonl")
    assert "1 of 3 questions answered, the rest counts as wrong" in describe(report)
    assert "n=3, 33.3% answered" in describe(report)
    assert "33.33, 33.3% answered" in averages(tmp_path)


def test_a_limit_leaves_the_rest_of_a_file_alone(data: Path, tmp_path: Path) -> None:
    gqa = opened(data, "gqa")
    gqa.keep(1)
    result = read(gqa, tmp_path, [{"question_id": id, "text": "yes"} for id in ("203", "201", "x")])
    assert {kind: problem["count"] for kind, problem in result.problems().items()} == {
        "missing": 0,
        "duplicates": 0,
        "malformed": 0,
        "unknown": 1,
    }
    assert scores(gqa, result)["accuracy"] == 100.0


def test_what_is_wrong_with_predictions_is_counted_and_named(data: Path, tmp_path: Path) -> None:
    gqa = opened(data, "gqa")
    path = tmp_path / "bad.jsonl"
    text = [
        '{"question_id": "201", "text": "no"}',
        '{"question_id": "201", "text": "Yes"}',
        "not json",
        "[1]",
        '{"question_id": "202"}',
        '{"question_id": "202", "text": ["a"]}',
        '{"question_id": "nobody", "text": "x"}',
        '{"text": "x"}',
        '{"question_id": "203", "text": "left\u2028\u0085"}',  # separators that end no line
    ]
    path.write_text("\n".join(text), encoding="utf-8")
    result = read_predictions(path, gqa)
    problems = result.problems()
    assert {kind: problem["count"] for kind, problem in problems.items()} == {
        "missing": 1,
        "duplicates": 1,
        "malformed": 4,
        "unknown": 2,
    }
    assert problems["missing"]["first"] == ["202"]
    assert problems["duplicates"]["first"] == ["201"]
    assert problems["malformed"]["first"][0].startswith("bad.jsonl:3")
    assert "'nobody'" in problems["unknown"]["first"][0]
    assert scores(gqa, result)["accuracy"] == pytest.approx(100 * 2 / 3)  # the last of two answers counts


def test_predictions_of_something_else_are_refused(data: Path, tmp_path: Path) -> None:
    gqa = opened(data, "gqa")
    with pytest.raises(ValueError, match=r"no prediction for gqa.*found.*'7'.*ids such as '201'"):
        read(gqa, tmp_path, [{"question_id": "7", "text": "x"}])
    with pytest.raises(ValueError, match="no such file"):
        read_predictions(tmp_path / "none.jsonl", gqa)


SAID = ("A", "B", "C", " A\n", "up", "Yes", "no.", "The answer is B.", "猫", "left\u2028", "")


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(draw=st.data())
@pytest.mark.parametrize("name", ["gqa", "scienceqa", "mmbench", "vqav2", "mme"])
def test_the_order_of_predictions_does_not_matter(data: Path, tmp_path: Path, name: str, draw: Any) -> None:
    benchmark = opened(data, name)
    ids = [question.id for question in benchmark.questions]
    rows = [{"question_id": id, "text": draw.draw(st.sampled_from(SAID))} for id in ids]
    shuffled = draw.draw(st.permutations(rows))
    spaced = [{**row, "text": f" {row['text']} \n"} for row in rows]
    counts = [
        {key: scored.counts() for key, scored in benchmark.score(read(benchmark, tmp_path, each).answers).items()}
        for each in (rows, shuffled, spaced)
    ]
    assert counts[0] == counts[1] == counts[2]


def test_the_papers_average_is_of_its_eight_or_says_what_is_missing() -> None:
    scores: dict[str, float | None] = dict.fromkeys(AVERAGED, 66.0) | {"vizwiz": 2.0, "mme": 1500.0, "own": 1.0}
    assert paper_average(scores) == (58.0, ())
    assert paper_average(scores, without="vizwiz") == (66.0, ())
    assert paper_average(scores | {"gqa": None}) == (None, ("gqa",))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "question_id,text\n201,yes\n202,a cat, yes\n", r"a\.csv row 3: a cell without a column, ' yes'"),
        ("a.TSV", "question_id\ttext\n201\tyes\n202\ta cat\tI think\n", r"a\.TSV row 3: a cell without a column"),
        ("a.json", '{"201": "yes", "202": "cat", "202": "dog"}', "key '202' is there twice"),
        (
            "a.jsonl",
            '{"id": "201", "text": "yes"}\n{"id": "202", "text": "a", "text": "b"}',
            "l:2: key 'text' is there",
        ),
        (
            "b.json",
            '[\n {"id": "201", "text": "yes"},\n {"id": "202",\n  "text": "a", "text": "b"}\n]',
            r"^b\.json entry 2: key 'text' is there twice; keep one$",
        ),
    ],
)
def test_what_a_reader_would_drop_is_malformed(data: Path, tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    if name == "a.json":  # one object: it is whole or nothing
        with pytest.raises(ValueError, match=said):
            read_predictions(tmp_path / name, opened(data, "gqa"))
        return
    result = read_predictions(tmp_path / name, opened(data, "gqa"))
    assert list(result.answers) == ["201"]
    assert re.search(said, "; ".join(result.malformed))


def test_a_table_keeps_what_only_looks_like_the_end_of_a_line_and_names_a_column_twice(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "said.csv").write_text('question_id,text\n201,yes\u2028no\n202,"a\ncat\x85"\n203,left,\n', newline="")
    result = read_predictions(tmp_path / "said.csv", opened(data, "gqa"))
    assert [answer.text for answer in result.answers.values()] == ["yes\u2028no", "a\ncat", "left"]
    assert not result.malformed
    (tmp_path / "said.csv").write_text("question_id,text,text\n201,yes,no\n")
    with pytest.raises(ValueError, match=r"said\.csv has the column text twice"):
        read_predictions(tmp_path / "said.csv", opened(data, "gqa"))


def test_the_case_of_a_files_ending_does_not_matter(data: Path, tmp_path: Path) -> None:
    (tmp_path / "said").mkdir()
    (tmp_path / "said" / "a.CSV").write_text("question_id,text\n201,yes\n")
    (tmp_path / "said" / "b.Jsonl").write_text('{"question_id": 202, "text": "cat"}')
    assert sorted(read_predictions(tmp_path / "said", opened(data, "gqa")).answers) == ["201", "202"]


@pytest.mark.parametrize("name", ["said.jsonl", "said.csv", "said.xlsx"])
def test_a_file_that_may_have_no_end_is_refused_before_it_is_read(data: Path, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a device, a pipe or a socket, which may have no end"):
        read_predictions(tmp_path / name, opened(data, "mmbench"))


@pytest.mark.parametrize(("name", "file"), [("gqa", ".json"), ("pope", ".jsonl"), ("mmbench", ".tsv")])
def test_official_files_that_may_have_no_end_are_refused(data: Path, tmp_path: Path, name: str, file: str) -> None:
    shutil.copytree(data / name, tmp_path / name)
    for path in [p for p in (tmp_path / name).rglob("*") if p.is_file() and file in (p.suffix, f"{p.suffix}l")]:
        path.unlink()
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="is a device, a pipe or a socket"):
        opened(tmp_path, name)
