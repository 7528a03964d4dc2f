"""The demo's models are made from texts and pixels: what the language model reads, and the tower's outlier channels."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.demo_data import DemoData, draw
from training.model.tokenizer import Tokenizer
from training.toy.models import make_models, train_tokenizer
from training.toy.reading import TOKENS, condensed, reading_matter
from training.toy.settings import SIZES, Size
from training.toy.tower import train_tower

BRIEF: Size = {
    **SIZES["large"],
    "tower": {"steps": 3, "epochs": 20, "batch": 4, "lr": 1e-3, "muon_lr": 2e-2},
    "reading": {"steps": 3, "epochs": 20, "batch": 4, "lr": 1e-3, "muon_lr": 2e-2},
    "talking": {"steps": 3, "epochs": 20, "batch": 4, "lr": 1e-3, "muon_lr": 2e-2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return draw(tmp_path_factory.mktemp("scenes"), images=24, heldout=0)


@pytest.fixture(scope="module")
def captions(data: DemoData) -> dict[str, str]:
    return {r["image"]: r["conversations"][1]["value"] for r in json.loads(data.chat.read_text())}


@pytest.fixture(scope="module")
def tokenizer(data: DemoData, captions: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(captions, json.loads(data.instruct.read_text())))
    return Tokenizer(path, legacy=False)


def test_a_condensed_phrase_is_the_mean_of_its_words_and_an_empty_one_nothing() -> None:
    words = torch.arange(12.0).reshape(6, 2)
    assert condensed(words, [[1, 3], [], [5], []]).tolist() == [[4.0, 5.0], [0.0, 0.0], [10.0, 11.0], [0.0, 0.0]]


def test_the_model_reads_the_phrases_of_a_caption_in_any_order(
    data: DemoData, captions: dict[str, str], tokenizer: Tokenizer
) -> None:
    read, talk = reading_matter(captions, json.loads(data.instruct.read_text()), tokenizer, seed=0)
    assert (len(read), len(talk)) == (24, data.conversations)
    for text, example in zip(captions.values(), read, strict=True):
        phrases = text.removesuffix(" .").split(" , ")
        assert sorted(tokenizer.decode(ids).strip() for ids in example.phrases if ids) == sorted(phrases)
    for example in read + talk:
        assert len(example.phrases) == example.text.input_ids.count(-1) == TOKENS


def test_what_teaches_nothing_is_left_out(captions: dict[str, str], tokenizer: Tokenizer) -> None:
    """No caption, no answer, an image beyond what is read; a caption of many phrases is cut, not left out."""
    image = next(iter(captions))

    def record(question: str, answer: str, image: str = image) -> dict[str, object]:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"image": image, "conversations": turns}

    good, long = record("<image>\nWhat?", "red"), "a word " * 600
    others = [
        record("<image>\nWhat?", "red", "absent.jpg"),
        record("<image>\nWhat?", ""),
        record(long + "<image>", "red"),
    ]
    for other in others:
        assert len(reading_matter({image: "a dog"}, [good, other], tokenizer, seed=0)[1]) == 1
    (many,), _ = reading_matter({image: " , ".join(["a dog"] * 40)}, [], tokenizer, seed=0)
    assert all(many.phrases)


def test_the_large_demos_tower_has_outlier_channels_in_every_block(
    data: DemoData, captions: dict[str, str], tokenizer: Tokenizer
) -> None:
    """Some 20 to 100 times the usual magnitude, as of real encoders; the small one has none."""
    torch.manual_seed(0)
    for size, outliers in ((BRIEF, 3), ({**BRIEF, "outliers": 0}, 0)):
        tower = train_tower(captions, data.images, tokenizer, size, seed=0)
        with torch.no_grad():
            states = tower(pixel_values=torch.randn(2, 3, 64, 64), output_hidden_states=True).hidden_states
        for state in states:
            channels = state.abs().mean(dim=(0, 1))
            times = channels / channels.median()
            assert ((times > 20) & (times < 100)).sum() == outliers
            assert (times > 20).sum() == outliers


@pytest.mark.slow
def test_the_same_seed_makes_the_same_models_and_another_one_others(data: DemoData, tmp_path: Path) -> None:
    names = ["clip/model.safetensors", "llm/model.safetensors", "llm/tokenizer.model"]
    for folder, seed in (("one", 0), ("two", 0), ("three", 1)):
        make_models(tmp_path / folder, data.chat, data.instruct, data.images, BRIEF, seed)
    one, two, three = (
        [(tmp_path / folder / name).read_bytes() for name in names] for folder in ("one", "two", "three")
    )
    assert one == two
    assert one[2] == three[2]
    assert one[0] != three[0]
    assert one[1] != three[1]
