"""The official layouts: prompts as LLaVA-1.5 asks them, answers found by what prediction files call a question."""

import io
import json
import shutil
from pathlib import Path

import pytest
from openpyxl import Workbook, load_workbook

from fixtures.official_files import opened, read, scores
from training.benchmarks import BENCHMARKS, benchmark_class, open_benchmark
from training.benchmarks.predictions import read_predictions

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
KINDS = {name: benchmark_class(name) for name in BENCHMARKS}


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("GQA", "Is it red?" + SHORT),
        ("ScienceQA", "Context: Look.\nWhich?\nA. x\nB. y" + LETTER),
        ("textvqa", "What brand?\nReference OCR token: NOKIA, 12:30" + SHORT),
        ("POPE", "Is there a dog1 in the image?" + SHORT),
        ("MMBench", 'A hint.\nWhich, "quoted"?\nA. cat\nB. dog' + LETTER),
        ("mmbench_cn", 'A hint.\nWhich, "quoted"?\nA. cat\nB. dog\n请直接回答选项字母。'),
        ("VQAv2", "Is it?" + SHORT),
        ("VizWiz", "What is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT),
        ("MME", "Is this existence?" + SHORT),
    ],
)
def test_prompts_and_images(data: Path, name: str, prompt: str) -> None:
    benchmark = opened(data, name)
    assert benchmark.questions[0].text == prompt
    assert benchmark.absent_images() == []
    for question in benchmark.questions:
        assert question.image is None or len(benchmark.image(question.image)) > 50


def test_lengths_of_answers() -> None:
    assert {name: kind.max_new_tokens for name, kind in KINDS.items() if kind.max_new_tokens != 128} == {
        "scienceqa": 1024,
        "mmbench": 1024,
        "mmbench-cn": 1024,
    }


def test_gqa_from_llava_and_from_its_own_format(data: Path, tmp_path: Path) -> None:
    gqa = opened(data, "gqa")
    said = [{"question_id": id, "text": text} for id, text in (("201", "Yes."), ("202", "A cat"), ("203", "Left"))]
    assert scores(gqa, read(gqa, tmp_path, said))["accuracy"] == pytest.approx(100 * 2 / 3)
    server = [{"questionId": id, "prediction": text} for id, text in (("201", "Yes."), ("202", "cat"), ("203", "left"))]
    assert scores(gqa, read(gqa, tmp_path, server, "own.json"))["accuracy"] == pytest.approx(100 * 2 / 3)
    _, file = gqa.server_file(read(gqa, tmp_path, said).answers) or ("", b"")
    assert json.loads(file)[0] == {"questionId": "201", "prediction": "yes"}


def test_science_qa_counts_images_and_all(data: Path, tmp_path: Path) -> None:
    sqa = opened(data, "scienceqa")
    said = [{"question_id": "4", "text": "B", "prompt": "<image>\nWhich?"}, {"question_id": "5", "text": "A. x"}]
    result = read(sqa, tmp_path, said)
    assert result.missing == ["11"]
    assert scores(sqa, result) == {"img": 50.0, "all": pytest.approx(100 * 2 / 3)}
    own = {"acc": 66, "results": {"4": 1, "5": 1, "11": 2}}
    assert scores(sqa, read(sqa, tmp_path, own, "own.json")) == {"img": 100.0, "all": pytest.approx(100 * 2 / 3)}
    llava = {"results": {"4": -1}, "outputs": {"4": "B", "5": "A", "11": "The answer is C."}}
    assert scores(sqa, read(sqa, tmp_path, llava, "own.json"))["all"] == 100.0


def test_text_vqa_finds_questions_by_image_and_prompt(data: Path, tmp_path: Path) -> None:
    text = opened(data, "textvqa")
    said = [
        {"question_id": "aa", "prompt": f"what brand?\nReference OCR token: NOKIA{SHORT}", "text": "Nokia"},
        {"question_id": "aa", "prompt": f"What color?{SHORT}", "text": "red."},
    ]
    assert scores(text, read(text, tmp_path, said))["accuracy"] == 100.0
    server = [{"question_id": 34602, "answer": "phone"}, {"question_id": 34603, "answer": "red"}]
    assert scores(text, read(text, tmp_path, server, "own.json"))["accuracy"] == pytest.approx(65.0)


def test_pope_pairs_by_question_and_by_row(data: Path, tmp_path: Path) -> None:
    pope = opened(data, "pope")
    said = ["yes", "no", "no", "yes", "yes", "yes", "no"]  # random, popular, adversarial; labels yny ny yn
    ids = [q.id for q in pope.questions]
    rows = [{"question_id": id, "text": text} for id, text in zip(ids, said, strict=True)]
    expected = (100 * 2 / 3 + 100 * 2 / 3 + 100) / 3
    result = scores(pope, read(pope, tmp_path, rows))
    assert result["f1"] == pytest.approx(expected)
    assert result["f1_row_order"] == pytest.approx(expected)
    assert result["accuracy"] == pytest.approx(100 * 5 / 7)
    turned = scores(pope, read(pope, tmp_path, rows[::-1]))
    assert turned["f1"] == pytest.approx(expected)
    assert turned["f1_row_order"] != pytest.approx(expected)


def test_pope_knows_llavas_ids_splits_and_its_own_files(data: Path, tmp_path: Path) -> None:
    pope = opened(data, "pope")
    llava = [{"question_id": 2_000_002, "prompt": "Is there a dog2 in the image?" + SHORT, "text": "Yes"}]
    assert list(read(pope, tmp_path, llava).answers) == ["popular/2"]
    split = [{"question_id": 2, "category": "adversarial", "text": "No"}]
    assert list(read(pope, tmp_path, split).answers) == ["adversarial/2"]
    folder = tmp_path / "own"
    folder.mkdir()
    for kind, count in (("random", 3), ("popular", 2), ("adversarial", 2)):
        rows = [{"question": f"is there a dog{n} in the image?", "answer": "yes"} for n in range(1, count + 1)]
        (folder / f"coco_pope_{kind}_answers.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = read_predictions(folder, pope)
    assert len(result.answers) == 7
    assert scores(pope, result)["f1_random"] == pytest.approx(100 * 4 / 5)


def test_pope_finds_its_way_without_llavas_question_file(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pope"
    shutil.copytree(data / "pope" / "coco", folder / "coco")
    pope = open_benchmark("pope", folder)
    order = ("adversarial", "popular", "random")  # ids of no meaning, splits one after another
    asked = [q for kind in order for q in pope.questions if q.group == kind]
    whole = [{"question_id": 1 + n % 3, "prompt": q.text, "text": "Yes"} for n, q in enumerate(asked)]
    whole[0]["prompt"] = whole[0]["prompt"].replace("dog1", "dog1 ")
    assert list(read(pope, tmp_path, whole).answers)[-1] == "random/3"
    with_image = [{"question_id": 9, "image": q.image, "prompt": q.text, "text": "No"} for q in asked]
    assert sorted(read(pope, tmp_path, with_image).answers) == sorted(q.id for q in asked)
    with pytest.raises(ValueError, match="no prediction for pope"):
        read(pope, tmp_path, whole[:4])


def test_text_vqa_asked_twice_is_answered_twice(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "textvqa"
    shutil.copytree(data / "textvqa", folder)
    path = folder / "TextVQA_0.5.1_val.json"
    rows = json.loads(path.read_text())["data"]
    path.write_text(json.dumps({"data": [*rows, {**rows[0], "question_id": 34604}]}))
    text = open_benchmark("textvqa", folder)
    said = [{"question_id": "aa", "prompt": "What brand?" + SHORT, "text": "nokia"}] * 2
    result = read(text, tmp_path, said)
    assert list(result.answers) == ["34602", "34604"]
    assert not result.duplicates


def test_science_qa_reads_letters_under_any_key_and_the_table_that_its_accuracy_comes_from(
    data: Path, tmp_path: Path
) -> None:
    sqa = opened(data, "scienceqa")
    letters = {"4": "B", "5": "A", "11": "C"}
    for key in ("text", "output", "response", "pred", "prediction", "answer"):
        rows = [{"question_id": id, key: letter} for id, letter in letters.items()]
        assert scores(sqa, read(sqa, tmp_path, rows))["all"] == 100.0, key
    for name in ("said.json", "said.csv"):
        if name == "said.json":
            result = read(sqa, tmp_path, letters, name)
        else:
            table = "question_id,prediction\n" + "".join(f"{id},{letter}\n" for id, letter in letters.items())
            (tmp_path / name).write_text(table)
            result = read_predictions(tmp_path / name, sqa)
        assert scores(sqa, result)["all"] == 100.0
    both = {"outputs": letters, "results": {"4": 0, "5": 1, "11": 2}}
    for acc, expected in ((100, 100.0), (33.3, 100 / 3)):
        assert scores(sqa, read(sqa, tmp_path, {"acc": acc, **both}, "own.json"))["all"] == pytest.approx(expected)


def test_pope_aligns_a_file_with_faults_and_pairs_rows_as_llava_does(tmp_path: Path) -> None:
    folder = tmp_path / "pope"
    folder.mkdir()
    for kind in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": n,
                "image": f"{n // 6}.jpg",
                "text": f"Is there a {kind[: n % 3 + 1]}{n} in it?",
                "label": "yes",
            }
            for n in range(12)
        ]
        (folder / f"coco_pope_{kind}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pope = open_benchmark("pope", folder)
    order = ("popular", "random", "adversarial")
    asked = [q for kind in order for q in pope.questions if q.group == kind]
    said = [{"question_id": n, "prompt": q.text.replace("\n", "\\n"), "text": "Yes"} for n, q in enumerate(asked)]
    faulty = [*said[:5], said[4], *said[5:20], *said[21:]]  # one twice, one missing
    for name in ("said.jsonl", "said.json"):
        result = read(pope, tmp_path, faulty, name)
        assert len(result.answers) == 35
        assert result.missing == [asked[20].id]
        assert scores(pope, result)["f1_row_order"] is not None
    (tmp_path / "cut.jsonl").write_text("\n".join(["{", *map(json.dumps, said[1:])]))  # a damaged line
    assert len(read_predictions(tmp_path / "cut.jsonl", pope).answers) == 35
    with pytest.raises(ValueError, match=r"llava_pope_test.jsonl .*tells what the ids mean"):
        read(pope, tmp_path, said[::-1])
    rows = [{"question_id": q.id, "text": "No" if q.id == "random/0" else "Yes"} for q in pope.questions]
    twice = read(pope, tmp_path, [rows[1], *rows])  # LLaVA pairs the n-th answer with the n-th label
    counts = pope.score_rows(twice.rows)["f1_row_order"].counts()["random"]
    assert dict(counts) == {("yes", "yes"): 11, ("no", "yes"): 1}
    assert len(twice.notes) == 0
    assert "commit e3e3926, with 2910" in read(pope, tmp_path, rows[:30]).notes[0]


def test_a_folder_of_llavas_evaluation_is_enough_to_score(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "textvqa", tmp_path / "textvqa")
    (tmp_path / "textvqa" / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    text = opened(tmp_path, "textvqa")
    assert len(read(text, tmp_path, [{"question_id": 34602, "text": "nokia"}]).answers) == 1
    with pytest.raises(ValueError, match="Rosetta_OCR"):
        text.to_ask()
    shutil.copytree(data / "vizwiz", tmp_path / "vizwiz")
    for path in (tmp_path / "vizwiz").rglob("val.json"):
        path.unlink()
    assert opened(tmp_path, "vizwiz").split == "test"
    listed = [{"question_id": 70, "image": "COCO_test2015_000000000007.jpg", "text": "Is it?" + SHORT, "category": "x"}]
    (tmp_path / "vqav2").mkdir()
    for subset in ("test-dev2015", "test2015"):
        (tmp_path / "vqav2" / f"llava_vqav2_mscoco_{subset}.jsonl").write_text(json.dumps(listed[0]))
    (question,) = opened(tmp_path, "vqav2").questions
    assert (question.id, question.image, question.text) == ("70", listed[0]["image"], listed[0]["text"])


def test_every_benchmark_lists_its_files() -> None:
    assert all(kind.files for kind in KINDS.values())


def test_a_missing_pope_answer_is_wrong_whatever_the_truth(data: Path, tmp_path: Path) -> None:
    pope = opened(data, "pope")
    result = read(
        pope, tmp_path, [{"question_id": "random/1", "text": "Yes"}, {"question_id": "random/2", "text": "No"}]
    )
    assert len(result.missing) == 5
    assert scores(pope, result)["f1_random"] == pytest.approx(100 * 2 / 3)
    assert scores(pope, result)["f1_popular"] == 0.0


@pytest.mark.parametrize("name", ["mmbench", "mmbench-cn"])
def test_mmbench_wants_every_row_of_a_question(data: Path, tmp_path: Path, name: str) -> None:
    bench = opened(data, name)
    said = dict(zip(["1", "1000001", "2", "1000002", "2000002"], ["A", "B.", "C", "B", "B"], strict=True))
    rows = [{"question_id": int(id), "text": text, "round_id": 0} for id, text in said.items()]
    assert scores(bench, read(bench, tmp_path, rows)) == {"circular": 50.0, "circular_exact": 0.0, "rows": 80.0}
    rows[-1]["text"] = "up"
    assert scores(bench, read(bench, tmp_path, rows))["circular"] == 100.0
    missing = read(bench, tmp_path, rows[:-1])
    assert missing.missing == ["2000002"]
    assert scores(bench, missing)["circular"] == 50.0


def test_mmbench_reads_and_writes_the_servers_spreadsheet(data: Path, tmp_path: Path) -> None:
    bench = opened(data, "mmbench")
    book = Workbook()
    book.active.append(["index", "question", "A", "prediction"])
    for index, text in ((1, "A"), (1000001, "B"), (2, "C"), (1000002, "B"), (2000002, "=A")):
        book.active.append([index, "?", "cat", text])
        book.active.cell(book.active.max_row, 4).data_type = "s"
    book.save(tmp_path / "said.xlsx")
    result = read_predictions(tmp_path / "said.xlsx", bench)
    assert result.answers["2000002"].text == "=A"
    assert scores(bench, result)["circular"] == 50.0
    _, written = bench.server_file(result.answers) or ("", b"")
    rows = list(load_workbook(io.BytesIO(written)).active.iter_rows(values_only=True))
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[5][0] == 2000002
    assert rows[5][6] == "=A"


def test_vqav2_scores_val_and_fills_the_servers_file_for_test_dev(data: Path, tmp_path: Path) -> None:
    val = opened(data, "vqav2")
    said = [{"question_id": 5, "text": "No"}, {"question_id": 6, "text": "two"}]
    assert scores(val, read(val, tmp_path, said)) == {
        "accuracy": pytest.approx(80.0),
        "accuracy_vqaeval": pytest.approx(80.0),
    }
    server = [{"question_id": 5, "answer": "No"}, {"question_id": 6, "answer": "2"}]
    as_sent = scores(val, read(val, tmp_path, server, "own.json"))
    assert as_sent == {"accuracy": pytest.approx(80.0), "accuracy_vqaeval": pytest.approx(30.0)}
    dev = opened(data, "vqav2", "test-dev")
    assert [q.id for q in dev.questions] == ["70", "71"]
    assert dev.questions[0].image == "COCO_test2015_000000000007.jpg"
    _, file = dev.server_file(read(dev, tmp_path, [{"question_id": 71, "text": "The Cat"}]).answers) or ("", b"")
    assert json.loads(file) == [
        {"question_id": 70, "answer": ""},
        {"question_id": 71, "answer": "cat"},
        {"question_id": 72, "answer": ""},
    ]
    assert scores(dev, read(dev, tmp_path, [{"question_id": 71, "text": "x"}]))["accuracy"] is None


def test_vizwiz_by_image_or_by_row(data: Path, tmp_path: Path) -> None:
    val = opened(data, "vizwiz")
    server = [{"image": "VizWiz_val_00000000.jpg", "answer": "cup"}]
    assert scores(val, read(val, tmp_path, server, "own.json")) == {
        "accuracy": 100.0,
        "accuracy_vqaeval": pytest.approx(60.0),
    }
    row = [{"question_id": 0, "text": "Cup"}]
    assert scores(val, read(val, tmp_path, row))["accuracy"] == 100.0
    test = opened(data, "vizwiz", "test")
    _, file = test.server_file(read(test, tmp_path, row).answers) or ("", b"")
    assert json.loads(file) == [{"image": "VizWiz_test_0.jpg", "answer": "cup"}]


def test_mme_from_llava_and_from_result_files(data: Path, tmp_path: Path) -> None:
    mme = opened(data, "mme")
    rows = []
    for question in mme.questions:
        assert question.image is not None
        wrong = question.group == "count" and "hat" in question.text and question.image.endswith("2.png")
        answer = "Yes" if ("hat" not in question.text) or wrong else "No"
        category, _, file = question.image.rpartition("/")
        id = f"{category.partition('/')[0]}/{file}"
        rows.append({"question_id": id, "prompt": question.text, "text": answer})
    result = read(mme, tmp_path, rows)
    assert not result.missing
    assert not result.duplicates
    points = scores(mme, result)
    assert points["count"] == pytest.approx(75 + 50)
    assert points["perception"] == pytest.approx(9 * 200 + 125)
    assert points["cognition"] == pytest.approx(800)
    folder = tmp_path / "results"
    folder.mkdir()
    ask = "Please answer yes or no."
    for category in {q.group for q in mme.questions}:
        text = "".join(
            f"{n:04d}.png\tIs this {category}? {ask}\tYes\tyes\n{n:04d}.png\tIs this a hat? {ask}\tNo\tNo.\n"
            for n in (1, 2)
        )
        (folder / f"{category}.txt").write_text(text)
    assert scores(mme, read_predictions(folder, mme))["perception"] == pytest.approx(2000)


@pytest.mark.parametrize(
    ("name", "guessed"),
    [("gqa", 200 / 3), ("pope", 440 / 9), ("mme", 500.0), ("mmbench", None), ("vqav2", None), ("scienceqa", None)],
)
def test_what_guessing_scores_where_truths_are_texts(data: Path, name: str, guessed: float | None) -> None:
    benchmark = opened(data, name)
    scores = benchmark.score(benchmark.guesses()) if benchmark.guesses() else {}
    assert [scored.report()["score"] for scored in scores.values()][:1] == (
        [] if guessed is None else [pytest.approx(guessed)]
    )
