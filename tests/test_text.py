"""Prompts, token ids and labels: equal to LLaVA-1.5's, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from training.batch import IGNORE, PLACEHOLDER, Encoded, collate, encode, tokenize, tokenize_with_image
from training.conversation import SYSTEM, plain_prompt, prompt_for, v1_prompt
from training.tokenizer import Tokenizer

IMAGE_ID, IMAGE_TOKENS = 9000, 4


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "non-legacy"])
def tokenizer(request: pytest.FixtureRequest, tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer / "tokenizer.model", legacy=request.param)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def ids_and_labels(tokenizer: Tokenizer, *texts: str, has_image: bool = True, max_length: int = 2048) -> Encoded:
    return encode(turns(*texts), tokenizer, "v1", has_image, IMAGE_TOKENS, max_length, IMAGE_ID)


def supervised(tokenizer: Tokenizer, example: Encoded) -> str:
    return tokenizer.decode([i for i in example.labels if i != IGNORE], skip_special_tokens=False)


@pytest.mark.vectors("conversations*.json")
def test_every_conversation_has_the_originals_ids_and_labels(case: dict[str, Any], tokenizer_model: Path) -> None:
    ids, labels = tokenize(
        case["conversations"],
        Tokenizer(tokenizer_model, case["legacy"]),
        case["version"],
        case["has_image"],
        case["model_max_length"],
    )
    assert (ids, labels) == (case["input_ids"], case["labels"])


@pytest.mark.vectors("prompts*.json")
def test_every_prompt_has_the_originals_ids(case: dict[str, Any], tokenizer_model: Path) -> None:
    assert tokenize_with_image(case["prompt"], Tokenizer(tokenizer_model, case["legacy"])) == case["input_ids"]


def test_a_prompt_is_what_stage_two_trained_on() -> None:
    assert prompt_for("<image>\nWhat?") == f"{SYSTEM} USER: <image>\nWhat? ASSISTANT:"
    trained = v1_prompt(turns("a", "b", "c", "d"))
    assert trained.startswith(prompt_for("c", [("a", "b")]))


def test_a_leading_answer_is_dropped() -> None:
    assert v1_prompt(turns("", "x", "y")[1:]) == v1_prompt(turns("y")) == f"{SYSTEM} USER: y "


def test_speakers_that_do_not_alternate_are_refused() -> None:
    with pytest.raises(ValueError, match="turn 1"):
        v1_prompt([*turns("a"), *turns("b")])


def test_the_plain_template_is_for_captions_only() -> None:
    assert plain_prompt(turns("say it <image>", "a dog")) == "<image>a dog\n"
    with pytest.raises(ValueError, match="CC-595K"):
        plain_prompt(turns("no image", "a dog"))


def test_only_answers_and_their_ends_are_supervised(tokenizer: Tokenizer) -> None:
    example = ids_and_labels(tokenizer, "<image>\nWhat is it?", "a dog", "Sure?", "yes")
    assert supervised(tokenizer, example) == "a dog</s>yes</s>"
    assert all(label in (IGNORE, i) for i, label in zip(example.input_ids, example.labels, strict=True))


def test_an_image_takes_as_many_places_as_it_has_tokens(tokenizer: Tokenizer) -> None:
    example = ids_and_labels(tokenizer, "what is <image> this <image>?", "a dog")
    assert example.input_ids.count(IMAGE_ID) == IMAGE_TOKENS
    assert PLACEHOLDER not in example.input_ids


@pytest.mark.parametrize(
    "texts", [("What?", "a dog"), ("<image> a", "b", "<image> c", "d"), ("a", "the <image>", "c", "d")]
)
def test_an_image_is_shown_once_whatever_the_text_says(tokenizer: Tokenizer, texts: tuple[str, ...]) -> None:
    example = ids_and_labels(tokenizer, *texts)
    assert example.input_ids.count(IMAGE_ID) == IMAGE_TOKENS
    assert supervised(tokenizer, example).startswith(("a dog", "b", "the"))


def test_the_word_for_an_image_is_ordinary_text_without_one(tokenizer: Tokenizer) -> None:
    example = ids_and_labels(tokenizer, "what does <image> mean?", "a tag", has_image=False)
    assert IMAGE_ID not in example.input_ids
    assert "<image>" in tokenizer.decode(example.input_ids)


def test_what_is_too_long_is_cut_after_the_image_was_expanded(tokenizer: Tokenizer) -> None:
    whole = ids_and_labels(tokenizer, "<image>\nWhat is it?", "a dog " * 50)
    cut = ids_and_labels(tokenizer, "<image>\nWhat is it?", "a dog " * 50, max_length=80)
    assert cut.input_ids == whole.input_ids[:80]
    assert cut.labels == whole.labels[:80]


def test_a_limit_that_cuts_the_image_is_refused_with_what_to_do(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"raise data.max_length"):
        ids_and_labels(tokenizer, "<image>\nWhat?", "a dog", max_length=10)


def test_padding_never_hides_a_real_token(tokenizer: Tokenizer) -> None:
    unknown = Encoded([1, tokenizer.unk_id, 5], [IGNORE, IGNORE, 5], has_image=False)
    batch = collate([unknown, Encoded([1, 6, 7, 8, 9], [IGNORE] * 5, has_image=False)], tokenizer.pad_id)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"][0].tolist() == [IGNORE, IGNORE, 5, IGNORE, IGNORE]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_decoding_gives_the_text_back(tokenizer: Tokenizer) -> None:
    for text in ("a dog  runs", "Größe: 12 cm, 猫", "line\nline"):
        assert tokenizer.decode(tokenizer.encode(text)).strip() == text


def test_a_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = Tokenizer.from_pretrained(str(tmp_path))
    assert again.legacy == tokenizer.legacy
    assert again.encode("hello </s> there") == tokenizer.encode("hello </s> there")


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.model does not exist"):
        Tokenizer.from_pretrained(str(tmp_path))
