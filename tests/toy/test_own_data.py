"""Own data are looked through before anything is made, and a result that means nothing is said to be one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from training.benchmarks.own import OwnQuestions
from training.toy.meaning import meaning, shuffled_tells
from training.toy.own_data import look_through, read_records

NAMES = ("a.png", "b.png")


def about(image: object = "a.png", *values: str, **more: object) -> dict[str, Any]:
    said = values or ("<image>\nWhat?", "A square.")
    turns = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(said)]
    return {"image": image, "conversations": turns, **more}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Path]:
    """Two images, a caption and a conversation of each, a question about the first."""
    images = tmp_path / "images"
    images.mkdir()
    for name in NAMES:
        Image.new("RGB", (8, 8)).save(images / name)
    data = {name: tmp_path / f"{name}.json" for name in ("chat", "instruct")}
    for path in data.values():
        path.write_text(json.dumps([about(name) for name in NAMES]))
    write_lines(tmp_path / "questions.jsonl", [{"question_id": 1, "image": "a.png", "text": "What?"}])
    return {**data, "images": images, "questions": tmp_path / "questions.jsonl"}


def test_data_without_a_flaw_are_passed_without_a_word(own: dict[str, Path]) -> None:
    assert look_through(**own) == []
    lines = [json.dumps(about(name)) for name in NAMES]
    own["chat"].write_text("\n".join(lines))  # JSON lines
    assert look_through(**own) == []


@pytest.mark.parametrize("name", ["chat", "instruct", "questions", "images"])
def test_a_path_that_is_not_there_or_of_another_kind_is_named(own: dict[str, Path], name: str) -> None:
    kind = "folder" if name == "images" else "file"
    with pytest.raises(ValueError, match=rf"^--{name} .*/nowhere: No such {kind}; correct the path$"):
        look_through(**{**own, name: own["chat"].parent / "nowhere"})
    other = own["chat"] if name == "images" else own["images"]
    with pytest.raises(ValueError, match=rf"--{name} {other} is (no|a) folder; name the"):
        look_through(**{**own, name: other})


def test_all_wrong_paths_are_named_at_once(own: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--chat .*No such file.*; --instruct .*No such file.*; --images .*No such"):
        look_through(tmp_path / "1", tmp_path / "2", tmp_path / "3", own["questions"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a device, a pipe or a socket"):
        look_through(**{**own, "chat": tmp_path / "pipe"})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["chat", "instruct", "questions", "images"])
def test_a_path_that_may_not_be_read_is_named(own: dict[str, Path], name: str) -> None:
    own[name].chmod(0)
    with pytest.raises(ValueError, match=f"--{name} .* may not be read; change its permissions"):
        look_through(**own)
    own[name].chmod(0o700)


@pytest.mark.parametrize("option", ["chat", "instruct"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no record; give it LLaVA records"),
        ("[]", "holds no record; give it LLaVA records"),
        ("[1, 2]", "none of its 2 records can be used; the first has no keys, it is '1'"),
        ("{}", "the first has no list `conversations`, its keys are none"),
        ('[{"image": "a.png", "text": "x"}]', "the first has no list `conversations`, its keys are image, text"),
        ('[{"image": "a.png", "conversations": []}]', "the first has the speakers none"),
        ('[{"image": "a.png", "conversations": [5]}]', "the first has a turn 5; give each turn `from`"),
        (json.dumps([about("a.png", "only asked")]), "the first has the speakers human; give it human, gpt"),
        (json.dumps([about("a.png", "What?", "A \ud83d.")]), r"the first has '\\ud83d', half of a character"),
        (json.dumps([about(5)]), "the first has the image 5; give the name of a file"),
        (json.dumps([about(None)]), "names no image in its 1 records"),
        (json.dumps([about(f"{n}.jpg") for n in range(5)]), "none of its 5 images is in .*'0.jpg', '1.jpg', '2.jpg' "),
        ("[" * 9999, "is not JSON: its brackets are nested too deep"),
        ('[{"image": "a.png"}', "is not JSON"),
        ("no JSON", ":1 is not JSON"),
    ],
)
def test_data_that_cannot_be_used_are_named_with_what_is_wrong(
    own: dict[str, Path], option: str, text: str, said: str
) -> None:
    own[option].write_text(text)
    with pytest.raises(ValueError, match=said) as raised:
        look_through(**own)
    assert str(own[option]) in str(raised.value)


def test_what_is_left_out_is_said_with_its_number_and_its_first_name(own: dict[str, Path]) -> None:
    own["chat"].write_text(json.dumps([about(), about("lost.png"), {"image": "b.png"}]))
    assert look_through(**own) == [
        "--chat: 1 of 3 records cannot be used; the first has no list `conversations`, its keys are image; give it one",
        f"--chat: 1 of 2 images are not in {own['images']} and left out: first 'lost.png'",
    ]


def test_questions_about_images_that_are_not_there_are_counted_and_named(own: dict[str, Path]) -> None:
    write_lines(own["questions"], [{"question_id": n, "image": f"{n}.png", "text": "What?"} for n in range(7)])
    with pytest.raises(ValueError, match=r"7 image\(s\) of own are not in .*: 0.png, 1.png, .* \.\.\.; put them there"):
        look_through(**own)
    own["questions"].write_text("")
    with pytest.raises(ValueError, match="holds no question"):
        look_through(**own)


def test_a_conversation_begins_with_its_question(own: dict[str, Path]) -> None:
    record = about("a.png", "What?", "A square.")
    record["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
    own["chat"].write_text(json.dumps([record]))
    (found,) = read_records(own["chat"])
    assert [turn["value"] for turn in found["conversations"]] == ["What?", "A square."]


def test_few_examples_are_seen_a_few_times_and_many_as_the_demo_sees_its_own() -> None:
    from training.toy.settings import SIZES
    from training.toy.steps import WARMUP, steps_for

    small = SIZES["small"]
    for how in (small["tower"], small["reading"], small["talking"]):
        many = how["steps"] * how["batch"]
        assert steps_for(how, many) == how["steps"]
        assert steps_for(how, 230) == max(WARMUP, -(-230 * how["epochs"] // min(how["batch"], 230)))
        assert steps_for(how, 230) < how["steps"]
        assert steps_for(how, 1) == WARMUP
        assert steps_for(how, 0) == 0


def test_a_text_of_any_length_is_an_example_of_bounded_length(tiny_tokenizer: Path) -> None:
    from training.model.tokenizer import Tokenizer
    from training.toy.reading import MAX_LENGTH, reading_matter

    tokenizer = Tokenizer(tiny_tokenizer / "tokenizer.model", legacy=False)
    long = "A square. " * 2000
    conversations = [about("a.png", "<image>\nWhat?", long), about("a.png", f"<image>\n{long}?", "Cut off.")]
    for matter in reading_matter({"a.png": long}, conversations, tokenizer, 0):
        assert len(matter) == 1
        assert len(matter[0].text.input_ids) <= MAX_LENGTH


def test_images_that_cannot_be_read_are_left_out_of_the_towers_training(
    own: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from training.toy.tower import read_pixels

    (own["images"] / "text.png").write_text("no image")
    pixels = read_pixels(own["images"], ["text.png", *NAMES, "lost.png"], 16)
    assert {name: tuple(of.shape) for name, of in pixels.items()} == dict.fromkeys(NAMES, (3, 16, 16))
    assert "2 of 4 images" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"1 of 1 images in .* cannot be read, first .*text\.png: unreadable image"):
        read_pixels(own["images"], ["text.png"], 16)


Said = Callable[..., list[str]]


@pytest.fixture
def said(own: dict[str, Path], tmp_path: Path) -> Said:
    """What is said of answers, given as they are and to wrong images, to 400 questions about two images."""

    def say(
        truths: list[str | None],
        given: list[str],
        shuffled: list[str] | None = None,
        loss: float = 1.0,
        seen: int = 2000,
    ) -> list[str]:
        asked = [
            {"question_id": n, "image": NAMES[n % 2], "text": "What?", **({} if truth is None else {"answer": truth})}
            for n, truth in enumerate(truths)
        ]
        write_lines(own["questions"], asked)
        (tmp_path / "run").mkdir()
        for name, texts, turn in (("answers", given, 0), ("answers_shuffled", shuffled, 1)):
            if texts is not None:
                lines = [
                    {**line, "image": NAMES[(n + turn) % 2], "prompt": "What?", "text": text}
                    for n, (line, text) in enumerate(zip(asked, texts, strict=True))
                ]
                write_lines(tmp_path / "run" / f"{name}.jsonl", lines)
        questions = OwnQuestions(own["questions"], images=own["images"])
        assert shuffled_tells(questions) or len(truths) == 1
        stages = {"stage 1": {"loss_first": 2.0}, "stage 2": {"loss_first": loss}}
        return meaning(tmp_path / "run", questions, stages, {"stage 1": 2000, "stage 2": seen})

    return say


MIXED = ["red", "blue"] * 200


def test_a_sound_result_is_better_than_guessing_and_than_wrong_images(said: Said) -> None:
    found = said(MIXED, MIXED, ["red", "blue", "blue", "red"] * 100)
    assert found[0].startswith("Better than always giving the most frequent answer (50.0% right), by +50.0 points")
    assert found[1].startswith("Better than looking at wrong images (50.0% right), by +50.0 points [")
    assert len(found) == 2


def test_answers_that_are_all_the_same_mean_nothing(said: Said) -> None:
    found = said(MIXED, ["Red."] * 400, ["red"] * 400)
    assert "Means nothing: 400 of 400 answers are 'red', whatever is asked." in found
    assert "The images play no part: shown a wrong one, 400 of 400 answers stay the same." in found
    assert any(each.startswith("Means nothing: not better than always giving the most frequent") for each in found)
    assert any(each.startswith("Means nothing: not better than looking at wrong images") for each in found)


def test_answers_without_a_truth_are_judged_by_how_they_differ(said: Said) -> None:
    found = said([None] * 400, [f"{n}" for n in range(400)], [f"{n}" for n in range(400)])
    assert found == [
        "The images play no part: shown a wrong one, 400 of 400 answers stay the same.",
        "Whether the answers are right is not known: the questions have no `answer`. Give them one.",
    ]


def test_few_questions_and_few_images_and_nothing_to_learn_are_said(said: Said) -> None:
    found = said(MIXED[:100], MIXED[:100], loss=0.0002, seen=68)
    assert (
        "100 questions are few: an accuracy of them is known to 10 points either way; 5 points take 385 questions."
        in found
    )
    assert any(each.startswith("Nothing to learn in stage 2: its loss was 0.000 at its first step") for each in found)
    assert any(each.startswith("Few images (stage 1 saw 2,000 and stage 2 saw 68): models") for each in found)


def test_one_question_has_its_meaning_too(said: Said) -> None:
    found = said(["red"], ["red"])
    assert found[0].startswith("Means nothing: not better than always giving the most frequent answer (100.0% right)")
    assert "known to 98 points" in found[1]
