"""The drawn data of the demo: nothing is seen twice, nothing is guessed, and the same arguments give the same bytes."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.demo_data import DemoData, draw
from pipeline.demo_questions import CATEGORIES, KINDS, possible_questions
from pipeline.demo_scenes import CORNERS, PLACES, WORDS, Scene, caption, render, sample_scene

HELDOUT = 7 * 36


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return draw(tmp_path_factory.mktemp("scenes"), images=300, heldout=HELDOUT, seed=3)


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def turns(data: DemoData) -> list[tuple[str, str]]:
    """Questions and answers of all conversations."""
    found = []
    for record in json.loads(data.instruct.read_text()):
        said = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        found += list(zip(said[::2], said[1::2], strict=True))
    return found


def test_training_and_held_out_images_are_of_different_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where half of all scenes come again."""
    few = [sample_scene(np.random.default_rng(seed)) for seed in range(4)]

    def again(rng: np.random.Generator) -> Scene:
        return few[rng.integers(len(few))] if rng.random() < 0.5 else sample_scene(rng)

    monkeypatch.setattr("pipeline.demo_data.sample_scene", again)
    drawn: dict[str, list[Scene]] = defaultdict(list)

    def note(scene: Scene, size: int, rng: np.random.Generator) -> Image.Image:
        drawn["training" if len(drawn["training"]) < 40 else "held out"].append(scene)
        return render(scene, size, rng)

    monkeypatch.setattr("pipeline.demo_data.render", note)
    draw(tmp_path, images=40, heldout=40)
    assert len(drawn["training"]) == len(drawn["held out"]) == 40
    assert set(few) & set(drawn["training"])
    assert not set(drawn["training"]) & set(drawn["held out"])


def test_what_is_held_out_is_in_no_other_file_and_on_no_other_picture(data: DemoData) -> None:
    shown = [line["image"] for line in lines(data.heldout)]
    assert len(set(shown)) == HELDOUT
    for path in (data.chat, data.instruct):
        assert not set(shown) & {record["image"] for record in json.loads(path.read_text())}
    pictures = Counter((data.images / path.name).read_bytes() for path in data.images.iterdir())
    assert max(pictures.values()) == 1
    assert len(pictures) == 300 + HELDOUT


def test_each_answer_of_a_kind_is_held_out_as_often_as_the_others(data: DemoData) -> None:
    """So what is right by chance is known; and every category has as many questions as the others."""
    asked: dict[str, Counter[str]] = defaultdict(Counter)
    for line in lines(data.heldout):
        asked[line["text"]][line["answer"]] += 1
        assert KINDS[line["text"]].category == line["category"]
    assert set(asked) == set(KINDS)
    for text, answers in asked.items():
        often = [answers[answer] for answer in KINDS[text].answers]
        assert max(often) - min(often) <= 1, text
        assert sum(often) == sum(answers.values())
    assert set(Counter(line["category"] for line in lines(data.heldout)).items()) == {(c, 36) for c in CATEGORIES}


def test_in_training_no_answer_of_a_kind_is_much_more_frequent_than_another(data: DemoData) -> None:
    asked: dict[str, Counter[str]] = defaultdict(Counter)
    for text, answer in turns(data):
        asked[text][answer] += 1
    assert set(asked) == set(KINDS)
    for text, answers in asked.items():
        mean = sum(answers.values()) / len(KINDS[text].answers)
        assert max(answers.values()) < 1.6 * mean, (text, answers)


def test_each_question_has_one_answer_and_each_answer_is_of_its_kind() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        questions = possible_questions(sample_scene(rng))
        assert {question.kind.text for question in questions} == set(KINDS)
        assert len(questions) == len(KINDS)
        for question in questions:
            assert question.answer in question.kind.answers


def test_a_caption_says_all_that_is_in_a_scene() -> None:
    """No two scenes have the same caption, whatever the order of its parts."""
    rng = np.random.default_rng(0)
    scenes = {sample_scene(rng) for _ in range(2000)}
    told = set()
    for scene in scenes:
        parts = caption(scene, rng).removesuffix(" .").split(" , ")
        told.add(tuple(sorted(" ".join(sorted(part.split())) for part in parts)))
    assert len(told) == len(scenes)


SCENE = Scene("stop", 5, "red", "square", "dot", PLACES[0], CORNERS)


@pytest.mark.parametrize(
    ("other", "corner"),
    [(SCENE._replace(word="post"), 0), (SCENE._replace(place=PLACES[8]), 3)],
    ids=["the order of letters", "the place of the mark"],
)
def test_the_mean_over_a_corner_loses_it(other: Scene, corner: int) -> None:
    """The corner's mean colour hardly changes, its patches' do."""
    row, column = divmod(corner, 2)
    one, two = (np.asarray(render(s, 64, np.random.default_rng(0)), dtype=float) for s in (SCENE, other))
    changed = np.abs(one - two).sum(axis=2) > 0
    rows, columns = np.nonzero(changed)
    assert set((rows // 32).tolist()) == {row}
    assert set((columns // 32).tolist()) == {column}
    one, two = (p[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] for p in (one, two))
    patches = np.abs(one - two).reshape(2, 16, 2, 16, 3).mean(axis=(1, 3)).max(axis=2)
    assert np.abs(one.mean(axis=(0, 1)) - two.mean(axis=(0, 1))).max() < 2
    assert (patches > 5).sum() >= 2


@pytest.mark.parametrize("size", [32, 48, 64, 128])
def test_same_arguments_same_bytes_at_every_size(tmp_path: Path, size: int) -> None:
    for name in ("one", "two"):
        draw(tmp_path / name, images=5, heldout=7, seed=1, image_size=size)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 5 + 7 + 3
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_every_number_of_pips_and_every_word_comes(data: DemoData) -> None:
    answers = {answer for _, answer in turns(data)}
    assert {str(number) for number in range(1, 10)} | set(WORDS) <= answers


@pytest.mark.parametrize(("arguments", "said"), [({"images": 0}, "images=0"), ({"image_size": 31}, "image_size=31")])
def test_what_cannot_be_drawn_is_said(tmp_path: Path, arguments: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        draw(tmp_path, **{"images": 1, "heldout": 0, **arguments})
