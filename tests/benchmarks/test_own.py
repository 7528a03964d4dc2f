"""Your own questions about images, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from fixtures.official_files import opened, read
from training.benchmarks import Source
from training.benchmarks.own import OwnQuestions, is_right
from training.benchmarks.scores import report_on, score_file


def own_questions(folder: Path, lines: list[dict[str, Any]]) -> OwnQuestions:
    folder.mkdir(exist_ok=True)
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        (folder / line["image"]).write_bytes(b"an image")
    (benchmark,) = Source(questions=path, images=folder).open()
    assert isinstance(benchmark, OwnQuestions)
    return benchmark


OWN = [
    {"question_id": 7, "image": "a.png", "text": "What?", "answer": "cat", "category": "what"},
    {"image": "b.png", "question_id": 7, "text": "What?", "answer": "Dog.", "category": "what"},
    {"question_id": "8", "image": "a.png", "text": "How many?", "answer": 2, "category": "count", "why": "kept"},
    {"question_id": "9", "image": "b.png", "text": "Why?"},
]


def test_own_questions_are_scored_in_all_and_by_category(tmp_path: Path) -> None:
    own = own_questions(tmp_path / "own", OWN)
    texts = zip(OWN, [" CAT.", "cat", "2", "x"], strict=True)
    said = [{**line, "prompt": line["text"], "text": text} for line, text in texts]
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in said))
    report = score_file(own, path, out=tmp_path / "out" / "said.jsonl")
    written = json.loads((tmp_path / "out" / "said.scores.json").read_text())
    assert written == own.as_json(report) | {"interval": written["interval"]}
    assert {key: written[key] for key in ("questions", "scored", "accuracy")} == {
        "questions": 4,
        "scored": 3,
        "accuracy": report["score"] / 100,
    }
    assert written["accuracy"] == pytest.approx(2 / 3)
    assert {name: part["accuracy"] for name, part in written["categories"].items()} == {"count": 1.0, "what": 0.5}
    assert own.headline(written) == ("accuracy", pytest.approx(200 / 3))


def test_categories_and_what_guessing_scores_in_each(tmp_path: Path) -> None:
    """The most frequent truth of its category, whatever its case; a question without a truth is left out."""
    truths = [("a", "Red"), ("a", "red"), ("a", "blue"), ("b", "1"), ("b", None)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(
            json.dumps({"question_id": n, "image": "x.png", "text": "What?", "category": category, "answer": truth})
            + "\n"
            for n, (category, truth) in enumerate(truths)
        )
    )
    own = OwnQuestions(questions, images=tmp_path)
    guessed = own.score(own.guesses())
    assert len(own.guesses()) == 4
    assert {name: part.report()["score"] for name, part in own.categories(guessed).items()} == {
        "a": pytest.approx(200 / 3),
        "b": 100,
    }
    assert own.keep(3).categories(own.score({})) == {}  # one category is all questions


def test_own_questions_keep_their_line_and_are_found_by_id_and_image(tmp_path: Path) -> None:
    own = own_questions(tmp_path / "own", OWN)
    assert [list(q.line.items()) for q in own.to_ask()] == [list(line.items()) for line in OWN]
    result = read(own, tmp_path, [{"question_id": 7, "text": "x"}, {"question_id": 8, "text": "2"}])
    assert list(result.answers) == ["8 a.png"]
    assert len(result.unknown) == 1  # two questions have the id 7
    own.shuffle_images(0)
    assert [q.line for q in own.to_ask()] == [
        {**line, "image": {"a.png": "b.png", "b.png": "a.png"}[line["image"]]} for line in OWN
    ]
    shuffled = read(own, tmp_path, [{"question_id": 7, "image": "b.png", "text": "cat"}])
    assert list(shuffled.answers) == ["7 a.png"]


@pytest.mark.parametrize("word", ["<image>\nWhat?", "What is <image>?", "a <ima<image>ge>"])
def test_a_question_that_holds_the_word_for_an_image_is_named_before_any_is_asked(tmp_path: Path, word: str) -> None:
    own = own_questions(tmp_path / "own", [*OWN[:2], {**OWN[2], "text": word}])
    with pytest.raises(ValueError, match=rf"asked.jsonl: question 3 \(id {OWN[2]['question_id']} .* holds <image>"):
        own.to_ask()


def test_own_questions_may_lie_beside_the_official_files(tmp_path: Path) -> None:
    own_questions(tmp_path, [OWN[3]])
    (tmp_path / "own" / "images").mkdir(parents=True)
    (tmp_path / "asked.jsonl").rename(tmp_path / "own" / "questions.jsonl")
    own = opened(tmp_path, "own")
    with pytest.raises(ValueError, match=r"1 image\(s\) of own are not in .*images: b.png"):
        own.to_ask()
    (tmp_path / "b.png").rename(tmp_path / "own" / "images" / "b.png")
    assert own.image(own.to_ask()[0].image or "") == b"an image"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "holds no question"),
        ([{"question_id": 1, "image": "a.png"}], "question 1 lacks text, give it; it has question_id, image"),
        ([{**OWN[0], "text": 3}], "question 1 has text 3; give it text"),
        ([{**OWN[0], "answer": ["cat", "dog"]}], r"question 1 has answer \['cat', 'dog'\]"),
        ([{**OWN[0], "answer": True}], "question 1 has answer True"),
        ([{**OWN[0], "answer": float("nan")}], "question 1 has answer nan; give it text, or null if it is not known"),
        ([{**OWN[0], "answer": float("inf")}], "question 1 has answer inf; give it text, or null"),
        *(
            ([{**OWN[0], key: "What \ud800?"}], r"question 1 has '\\ud800', half of a character, .*; correct it")
            for key in ("text", "answer", "category")
        ),
        ([OWN[0], {**OWN[0], "question_id": "7"}], r"occur again with the same image, first \('7', 'a.png'\)"),
    ],
)
def test_mistakes_in_own_questions_are_named(tmp_path: Path, lines: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ValueError, match=f"asked.jsonl.*{said}"):
        own_questions(tmp_path, lines)


@pytest.mark.parametrize(
    ("line", "key"),
    [('{"question_id": 2, "text": "What?", "image": "a.png", "text": "Why?"}', "text"),
     ('{"question_id": 2, "text": "What?", "image": "a.png", "more": [{"x": 1, "x": 1}]}', "x")],
)  # fmt: skip
def test_a_key_given_twice_is_named_with_its_line(tmp_path: Path, line: str, key: str) -> None:
    (tmp_path / "asked.jsonl").write_text(f"{json.dumps(OWN[0])}\n{line}\n")
    with pytest.raises(ValueError, match=f"asked.jsonl:2: key '{key}' is there twice; keep one"):
        OwnQuestions(tmp_path / "asked.jsonl", images=tmp_path)


def test_a_truth_may_be_a_number_as_tables_write_it_and_null_is_not_known(tmp_path: Path) -> None:
    own = own_questions(tmp_path, [{**OWN[0], "answer": 2.0}, {**OWN[3], "answer": None, "category": None}])
    assert [q.group for q in own.questions] == ["what", "all"]
    result = read(own, tmp_path, [{"question_id": q.line["question_id"], "text": "2"} for q in own.questions])
    report = own.as_json(report_on(own, result))
    assert (report["questions"], report["scored"], report["accuracy"]) == (2, 1, 1.0)
    assert [is_right({**q.line, "text": "2"}) for q in own.questions] == [True, False]
