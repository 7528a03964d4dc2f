"""The processor: LLaVA-1.5's pixels bit for bit, its token ids one by one, its template."""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from pipeline.encoders.clip import Clip
from pipeline.encoders.decode import load_image
from training.model.decoders.llama import CHAT_TEMPLATE
from training.model.processor import CompactVisionImageProcessor, CompactVisionProcessor, CompactVisionTokenizer
from training.text.templates import prompt_for

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@pytest.fixture
def processor(tiny_tokenizer: Path) -> CompactVisionProcessor:
    tokenizer = CompactVisionTokenizer(str(tiny_tokenizer / "tokenizer.model"), legacy=False)
    return CompactVisionProcessor(
        CompactVisionImageProcessor(image_size=32), tokenizer, image_tokens=4, chat_template=CHAT_TEMPLATE
    )


def picture(color: tuple[int, int, int] = (200, 30, 10), size: tuple[int, int] = (50, 40)) -> Image.Image:
    return Image.new("RGB", size, color)


def test_images_come_from_files_and_from_long_data_addresses(processor: CompactVisionProcessor, tmp_path: Path) -> None:
    picture().save(tmp_path / "red.bmp")
    address = "data:image/bmp;base64," + base64.b64encode((tmp_path / "red.bmp").read_bytes()).decode()
    assert len(address) > 4096  # longer than a path may be
    for where in (str(tmp_path / "red.bmp"), address):
        image = processor.image_processor.fetch_images(where)
        assert np.array_equal(np.asarray(image), np.asarray(picture()))
    grey = np.asarray(picture().convert("L"))
    expected = processor(images=picture().convert("L"), text="<image>\nx", return_tensors="pt")
    for same in (grey, [grey], [[torch.from_numpy(grey.copy())]]):
        assert torch.equal(
            processor(images=same, text="<image>\nx", return_tensors="pt")["pixel_values"], expected["pixel_values"]
        )


@pytest.mark.vectors("images*.npz")
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_pixels_are_those_of_the_original_code_bit_for_bit(vectors: Path, aspect: str) -> None:
    arrays = np.load(vectors, allow_pickle=False)
    facts = json.loads(vectors.with_suffix(".json").read_text(encoding="utf-8"))
    process = CompactVisionImageProcessor(aspect=aspect)
    mode = "pad" if aspect == "pad" else "None"
    names = [name.removeprefix("in::") for name in arrays if name.startswith("in::")]
    assert names
    for name in names:
        pixels = process(Image.fromarray(arrays[f"in::{name}"]), return_tensors="np")["pixel_values"][0]
        assert pixels.shape == (3, 336, 336)
        assert pixels.dtype == np.float32
        assert np.array_equal(pixels.ravel()[arrays["pick"]], arrays[f"px::{mode}::{name}"])
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == facts[f"{name}::{mode}"]["sha256"]


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("kind", ["wide", "tall", "grey", "alpha", "deep", "rotated", "palette"])
def test_pixels_are_those_that_the_feature_store_was_built_from(aspect: str, kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "image.png"
    shape = {"wide": (40, 91, 3), "tall": (77, 35, 3), "alpha": (50, 60, 4), "grey": (50, 60)}.get(kind, (50, 70, 3))
    image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
    if kind == "deep":
        image = Image.fromarray(rng.integers(0, 65536, (50, 60), dtype=np.uint16))
    elif kind == "palette":
        image = image.convert("P")
    exif = Image.Exif()
    if kind == "rotated":
        exif[0x0112] = 6
    image.save(path, exif=exif)
    ours = CompactVisionImageProcessor(aspect=aspect, image_size=32)(Image.open(path))["pixel_values"][0]
    assert np.array_equal(ours, Clip().pixels(load_image(path.read_bytes()), aspect, 32))


def test_arrays_and_nested_lists_are_images_too() -> None:
    image = picture()
    process = CompactVisionImageProcessor(image_size=32)
    expected = process(image, return_tensors="pt")["pixel_values"]
    array = np.asarray(image)
    for same in (array, array.transpose(2, 0, 1), torch.from_numpy(array.copy()), [[image]]):
        assert torch.equal(process(same, return_tensors="pt")["pixel_values"], expected)
    grey = np.asarray(image.convert("L"))
    expected = process(image.convert("L"), return_tensors="pt")["pixel_values"].repeat(2, 1, 1, 1)
    veiled = np.stack([grey, np.full_like(grey, 255)])  # channels: grey and opacity
    for pair in ([grey, grey], [[grey], [torch.from_numpy(grey.copy())]], [veiled, veiled.transpose(1, 2, 0)]):
        assert torch.equal(process(pair, return_tensors="pt")["pixel_values"], expected)
    for stacked in (np.stack([array, array]), torch.from_numpy(np.stack([array, array]).transpose(0, 3, 1, 2))):
        assert process(stacked, return_tensors="pt")["pixel_values"].shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="must be uint8, found float32"):
        process(array.astype(np.float32))
    with pytest.raises(ValueError, match=r"C 1 to 4; found \(40, 30, 5\)"):
        process(np.zeros((40, 30, 5), dtype=np.uint8))


@pytest.mark.vectors("prompts*.json")
def test_token_ids_are_those_of_the_original_code(case: dict, tokenizer_model: Path) -> None:
    tokenizer = CompactVisionTokenizer(str(tokenizer_model), legacy=case["legacy"])
    ids = tokenizer(case["prompt"])["input_ids"]
    assert [-200 if index == tokenizer.image_id else index for index in ids] == case["input_ids"]


def test_a_placeholder_becomes_as_many_as_the_image_has_tokens(processor: CompactVisionProcessor) -> None:
    inputs = processor(images=picture(), text="a <image> b", return_tensors="pt")
    assert (inputs["input_ids"] == 736).sum() == 4
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)


def test_prompts_with_and_without_images_make_one_batch_padded_on_the_left(processor: CompactVisionProcessor) -> None:
    texts = ["USER: <image>\nWhat is this? ASSISTANT:", "USER: Hi. ASSISTANT:"]
    inputs = processor(images=[picture()], text=texts, return_tensors="pt", padding=True)
    alone = processor(text=texts[1], return_tensors="pt")["input_ids"][0]
    length = len(alone)
    assert torch.equal(inputs["input_ids"][1, -length:], alone)
    assert inputs["attention_mask"][1].sum() == length
    assert inputs["pixel_values"].shape[0] == 1


@pytest.mark.parametrize(
    ("text", "images", "said"),
    [
        ("<image> and <image>", 2, "prompt 0 holds 2 images; .* takes one"),
        (["<image>", "<image><image>"], 3, "prompt 1 holds 2 images"),
        ("<image>", 0, "no images were passed"),
        ("none", 1, "should be the same as the number of images"),
    ],
)
def test_images_that_do_not_match_the_prompts_are_refused(
    processor: CompactVisionProcessor, text: str, images: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        processor(text=text, images=[picture()] * images or None)


def test_the_chat_template_is_v1(processor: CompactVisionProcessor) -> None:
    image = {"type": "image", "image": picture()}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "What is this? "}, image]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
        {"role": "user", "content": "Why?"},
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == SYSTEM + "USER: <image>\nWhat is this? ASSISTANT: a dog</s>USER: Why? ASSISTANT:"
    assert processor.apply_chat_template(turns[:1], add_generation_prompt=True) == prompt_for("<image>\nWhat is this?")
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(inputs["input_ids"], processor(text=text, images=picture(), return_tensors="pt")["input_ids"])
    assert inputs["pixel_values"].shape[0] == 1


def test_a_chat_may_bring_its_own_system_sentence(processor: CompactVisionProcessor) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == "Be brief. USER: Hi ASSISTANT:"
    with pytest.raises(TemplateError, match=r"roles are user and assistant.* found tool"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])


@given(
    st.lists(st.tuples(st.sampled_from(["", "Why?", " a\n", "b "]), st.sampled_from(["", "a dog", " x "])), max_size=3),
    st.sampled_from(["What is this?", "<image>\nWhat?"]),
)
def test_the_chat_template_writes_what_stage_two_trained_on(past: list[tuple[str, str]], question: str) -> None:
    messages = [
        {"role": role, "content": text} for pair in past for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    messages.append({"role": "user", "content": question})
    rendered, _ = render_jinja_template([messages], chat_template=CHAT_TEMPLATE, add_generation_prompt=True)
    assert rendered == [prompt_for(question, past)]


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}
URL = "data:image/png;base64," + "A" * 1000


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([USER, USER], "found user, expected assistant"),
        ([USER, ANSWER, ANSWER], "found assistant, expected user"),
        ([ANSWER, USER], "found assistant, expected user"),
        ([USER, {"role": "system", "content": "x"}], "found system, expected assistant"),
        ([USER, ANSWER], "the last message is an answer"),
        ([{"role": "system", "content": [{"type": "image"}]}, USER], "a system message is text"),
        ([{**USER, "images": [URL]}], "put its image into the content"),
        ([USER, {**ANSWER, "tool_calls": [{"id": 1}]}, USER], "leave out tool calls"),
        ([{"role": "user"}], "has no content"),
        ([{"role": "user", "content": []}], "has no content"),
        ([{"role": "user", "content": 7}], "found 7"),
        ([{"role": "user", "content": {"text": "Hi"}}], "a part of a message is"),
        ([{"role": None, "content": "Hi"}], "found None, expected user"),
        ([{"role": "system", "content": True}, USER], "a system message is text"),
    ],
)
def test_a_conversation_that_v1_has_no_words_for_is_refused(messages: list[dict], said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        render_jinja_template([messages], chat_template=CHAT_TEMPLATE, add_generation_prompt=True)
    with pytest.raises(TemplateError, match="knows no tools"):
        render_jinja_template([[USER]], tools=[{"type": "function"}], chat_template=CHAT_TEMPLATE)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_image", "image_url": URL},
        {"type": "input_text", "text": "Hi"},
        {"type": "image_url", "url": URL},
        {"type": "video", "video": "x.mp4"},
        {"type": "text", "text": "Hi", "image_url": {"url": URL}},
        {"type": "text", "text": 7},
        {"type": "text"},
        {"type": "image", "url": URL, "text": "a caption"},
        {"text": "Hi"},
        "Hi",
        7,
        None,
    ],
)
def test_a_part_that_is_neither_text_nor_image_is_refused_never_dropped(part: object) -> None:
    usual = {"type": "text", "text": "What is this?"}
    for content in ([part], [usual, part], [part, usual]):
        with pytest.raises(TemplateError, match="a part of a message is") as raised:
            render_jinja_template([[{"role": "user", "content": content}]], chat_template=CHAT_TEMPLATE)
        assert len(str(raised.value)) < 250


def test_decoding_gives_the_text_back_without_placeholders(processor: CompactVisionProcessor) -> None:
    for text in ("USER: Hi there. ASSISTANT: a dog", "two  spaces\nand a line", "Ünï¢ødé 犬"):
        ids = processor.tokenizer(text)["input_ids"]
        assert processor.decode(ids, skip_special_tokens=True) == text
    ids = processor.tokenizer("a<image>b</s>")["input_ids"]
    assert processor.decode(ids, skip_special_tokens=True).replace(" ", "") == "ab"
    assert processor.decode(ids).replace(" ", "") == "<s>ab</s>"


def test_saved_and_loaded_it_makes_the_same_inputs(processor: CompactVisionProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    loaded = CompactVisionProcessor.from_pretrained(tmp_path)
    texts = ["USER: <image>\nWhat is this? ASSISTANT:", "USER: Hi. ASSISTANT:"]
    ours, theirs = (p(images=[picture()], text=texts, padding=True, return_tensors="pt") for p in (processor, loaded))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.chat_template == processor.chat_template
    assert loaded.tokenizer.legacy is False
    loaded.save_pretrained(tmp_path)  # over itself: tokenizer.model is its own source
    assert CompactVisionProcessor.from_pretrained(tmp_path).tokenizer.vocab_size == 736
