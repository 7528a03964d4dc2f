"""Prompts, token ids and labels: equal to LLaVA-1.5's, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.schema import Conversation, Turn
from training.model.tokenizer import Tokenizer
from training.text.collate import Collator, Example, pad
from training.text.image import PLACEHOLDER, tokenize_with_image
from training.text.labels import Labelled, ids_and_labels
from training.text.templates import IGNORE, TEMPLATES, prompt_for

IMAGE_ID, IMAGE_TOKENS = 9000, 4
SYSTEM = TEMPLATES["v1"].system
v1_prompt, plain_prompt = TEMPLATES["v1"].prompt, TEMPLATES["plain"].prompt


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "non-legacy"])
def tokenizer(request: pytest.FixtureRequest, tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer / "tokenizer.model", legacy=request.param)


def turns(*texts: str) -> list[Turn]:
    return [Turn(speaker=("human", "gpt")[i % 2], value=text) for i, text in enumerate(texts)]


def collator(tokenizer: Tokenizer, template: str = "v1", max_length: int = 2048) -> Collator:
    return Collator(tokenizer, template, max_length, IMAGE_TOKENS, IMAGE_ID)


def labelled(tokenizer: Tokenizer, *texts: str, has_image: bool = True, max_length: int = 2048) -> Labelled:
    return collator(tokenizer, max_length=max_length).labelled(turns(*texts), has_image)


def supervised(tokenizer: Tokenizer, example: Labelled) -> str:
    return tokenizer.decode([i for i in example.labels if i != IGNORE], skip_special_tokens=False)


@pytest.mark.vectors("conversations*.json")
def test_every_conversation_has_the_originals_ids_and_labels(case: dict[str, Any], tokenizer_model: Path) -> None:
    ids, labels = ids_and_labels(
        [Turn.model_validate(turn) for turn in case["conversations"]],
        Tokenizer(tokenizer_model, case["legacy"]),
        TEMPLATES[case["version"]],
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
    example = labelled(tokenizer, "<image>\nWhat is it?", "a dog", "Sure?", "yes")
    assert supervised(tokenizer, example) == "a dog</s>yes</s>"
    assert all(label in (IGNORE, i) for i, label in zip(example.input_ids, example.labels, strict=True))


def test_an_image_takes_as_many_places_as_it_has_tokens(tokenizer: Tokenizer) -> None:
    example = labelled(tokenizer, "what is <image> this <image>?", "a dog")
    assert example.input_ids.count(IMAGE_ID) == IMAGE_TOKENS
    assert PLACEHOLDER not in example.input_ids


@pytest.mark.parametrize(
    "texts", [("What?", "a dog"), ("<image> a", "b", "<image> c", "d"), ("a", "the <image>", "c", "d")]
)
def test_an_image_is_shown_once_whatever_the_text_says(tokenizer: Tokenizer, texts: tuple[str, ...]) -> None:
    example = labelled(tokenizer, *texts)
    assert example.input_ids.count(IMAGE_ID) == IMAGE_TOKENS
    assert supervised(tokenizer, example).startswith(("a dog", "b", "the"))


def test_the_word_for_an_image_is_ordinary_text_without_one(tokenizer: Tokenizer) -> None:
    example = labelled(tokenizer, "what does <image> mean?", "a tag", has_image=False)
    assert IMAGE_ID not in example.input_ids
    assert "<image>" in tokenizer.decode(example.input_ids)


def test_what_is_too_long_is_cut_after_the_image_was_expanded(tokenizer: Tokenizer) -> None:
    whole = labelled(tokenizer, "<image>\nWhat is it?", "a dog " * 50)
    cut = labelled(tokenizer, "<image>\nWhat is it?", "a dog " * 50, max_length=80)
    assert cut.input_ids == whole.input_ids[:80]
    assert cut.labels == whole.labels[:80]


LATE = ("Hi", "hello there", "And here? <image>", "a cat")  # the image comes with the second question


def test_an_image_that_the_limit_cuts_changes_nothing_for_what_stands_before_it(tokenizer: Tokenizer) -> None:
    whole = labelled(tokenizer, *LATE)
    place = whole.input_ids.index(IMAGE_ID)
    for inside in range(1, IMAGE_TOKENS + 1):
        cut = labelled(tokenizer, *LATE, max_length=place + inside)
        assert cut == (whole.input_ids[:place], whole.labels[:place])
    assert supervised(tokenizer, cut) == "hello there</s>"


def test_an_image_beyond_the_limit_is_refused_with_what_to_do(tokenizer: Tokenizer) -> None:
    place = labelled(tokenizer, *LATE).input_ids.index(IMAGE_ID)
    with pytest.raises(ValueError, match=rf"beyond data.max_length {place}: {place} tokens .* raise data.max_length"):
        labelled(tokenizer, *LATE, max_length=place)


@pytest.mark.parametrize("word", ["<ima<image>ge>", "<<image>image>", "<ima" * 9 + "<image>" + "ge>" * 9])
def test_a_word_for_an_image_within_another_leaves_none_behind(tokenizer: Tokenizer, word: str) -> None:
    for texts in (("<image>\nWhat?", f"a {word} dog"), (f"What {word} is it?", "a dog")):
        example = labelled(tokenizer, *texts)
        assert example.input_ids.count(IMAGE_ID) == IMAGE_TOKENS
        assert "<image>" not in tokenizer.decode([i for i in example.input_ids if i != IMAGE_ID])


def test_a_batch_holds_the_ids_and_labels_of_its_examples(tokenizer: Tokenizer) -> None:
    texts = [("<image>\nWhat is it?", "a dog"), ("Hi", "hello there, hello")]
    examples = [
        Example(f"{number}#0", Conversation(id=str(number), turns=turns(*pair)), has_image=number == 0)
        for number, pair in enumerate(texts)
    ]
    batch = collator(tokenizer)(examples)
    for row, example in enumerate(examples):
        expected = labelled(tokenizer, *texts[row], has_image=example.has_image)
        length = int(batch["attention_mask"][row].sum())
        assert batch["input_ids"][row, :length].tolist() == expected.input_ids
        assert batch["labels"][row, :length].tolist() == expected.labels


def example_of(*texts: str, has_image: bool = False) -> Example:
    return Example("000000017#2", Conversation(id="x", turns=turns(*texts)), has_image, "7.jpg")


@pytest.mark.parametrize(
    ("template", "example", "reason"),
    [
        ("plain", example_of("no image", "a dog", "more"), "the plain template takes two turns"),
        ("plain", example_of("a word, <image>", "a dog"), "it has no image"),
        ("v1", example_of("Hi"), "no supervised token: it has no answer"),
        ("v1", example_of("Hi", ""), "no supervised token: it has no answer"),
        ("v1", example_of("Hi", "The log says: USER: hi ASSISTANT: hello"), "no supervised token: it has no answer"),
        ("v1", example_of("Hi", "Ends with </s> and goes on"), "no supervised token: it has no answer"),
        ("v1", example_of("read " * 400, "ok"), "no supervised token within data.max_length"),
        ("v1", example_of("read " * 400, "ok", "<image>", "a cat", has_image=True), "its image lies beyond"),
        ("v1", example_of("<image>" + "read " * 400, "ok", has_image=True), "no supervised token within"),
    ],
)
def test_an_example_that_teaches_nothing_keeps_its_row_and_is_named(
    tokenizer: Tokenizer, template: str, example: Example, reason: str
) -> None:
    usual = Example("1#0", Conversation(id="1", turns=turns("<image>", "a dog")), has_image=True)
    batch = collator(tokenizer, template, max_length=256)([example, usual])
    first, second = batch["skipped"]
    assert second is None
    assert (first.key, first.image, first.id) == ("000000017#2", "7.jpg", "x")
    assert first.reason.startswith(reason)
    assert (batch["labels"][0] == IGNORE).all()
    assert batch["shows_image"].tolist() == [False, True]
    assert batch["attention_mask"].sum(dim=1).tolist() == [1, batch["input_ids"].shape[1]]
    alone = collator(tokenizer, template, max_length=256)([usual])
    assert torch.equal(batch["input_ids"][1], alone["input_ids"][0])


def test_padding_never_hides_a_real_token(tokenizer: Tokenizer) -> None:
    unknown = Labelled([1, tokenizer.unk_id, 5], [IGNORE, IGNORE, 5])
    batch = pad([unknown, Labelled([1, 6, 7, 8, 9], [IGNORE] * 5)], tokenizer.pad_id)
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
