"""Answers: alone or in a batch, with and without images, and after a round trip through files."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from training.model.model import CompactVisionConfig, CompactVisionForConditionalGeneration
from training.model.reducers import build_connector, connector_config
from training.release.code import write_code

IMAGE = 736
ROWS = [[1, 5, *[IMAGE] * 4, 8, 9], [1, 60, 61, 62], [1, *[IMAGE] * 4, 70]]
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two prompts with an image and one without, padded on the left."""
    length = max(map(len, ROWS))
    input_ids = torch.tensor([[0] * (length - len(row)) + row for row in ROWS])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ROWS])
    return {"input_ids": input_ids, "attention_mask": mask, "pixel_values": PIXELS}


def answer(model: CompactVisionForConditionalGeneration, **inputs: object) -> list[list[int]]:
    start = inputs["input_ids"].shape[1]
    settings = {"max_new_tokens": 6, "do_sample": False, **inputs}
    return model.generate(**settings, eos_token_id=None)[:, start:].tolist()


def test_a_batch_padded_on_the_left_answers_as_each_prompt_alone(
    model: CompactVisionForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> None:
    together = answer(model, **batch)
    alone = [
        answer(model, input_ids=torch.tensor([row]), pixel_values=pixels)[0]
        for row, pixels in zip(ROWS, [PIXELS[:1], None, PIXELS[1:]], strict=True)
    ]
    assert together == alone
    assert len({tuple(row) for row in together}) == 3


def test_another_picture_gets_another_answer(model: CompactVisionForConditionalGeneration) -> None:
    ids = torch.tensor([ROWS[0]])
    assert answer(model, input_ids=ids, pixel_values=PIXELS[:1]) != answer(
        model, input_ids=ids, pixel_values=5 * PIXELS[1:]
    )


def test_cached_columns_answer_as_pixels_do(
    model: CompactVisionForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> None:
    columns = model.encode_images(batch["pixel_values"])
    assert answer(model, **{**batch, "pixel_values": None, "columns": columns}) == answer(model, **batch)


@pytest.mark.parametrize("how", [{"use_cache": False}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 1}])
def test_ways_to_decode_that_change_no_answer(
    model: CompactVisionForConditionalGeneration, batch: dict[str, torch.Tensor], how: dict
) -> None:
    one = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    one["pixel_values"] = PIXELS[:1]
    assert answer(model, **one, **how) == answer(model, **one)


def test_what_is_looked_up_in_the_prompt_is_never_the_placeholder(
    model: CompactVisionForConditionalGeneration,
) -> None:
    for row in ([1, 8, 9, *[IMAGE] * 4, 8, 9], [*[IMAGE] * 4, 8]):  # what ends the prompt is before the image too
        asked = {"input_ids": torch.tensor([row]), "pixel_values": PIXELS[:1]}
        assert answer(model, **asked, prompt_lookup_num_tokens=3) == answer(model, **asked)


def test_embeddings_with_the_vision_tokens_in_them_answer_as_ids_and_pixels_do(
    model: CompactVisionForConditionalGeneration,
) -> None:
    ids = torch.tensor([ROWS[0]])
    places = (ids == IMAGE)[..., None]
    embeds = model.get_input_embeddings()(ids.masked_fill(ids == IMAGE, 0))
    embeds = embeds.masked_scatter(places, model.get_image_features(PIXELS[:1]))
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for how in ({}, {"use_cache": False}):
        said = model.generate(inputs_embeds=embeds, **settings, **how)
        assert said.tolist() == answer(model, input_ids=ids, pixel_values=PIXELS[:1])
    for image in ({"pixel_values": PIXELS[:1]}, {"columns": model.encode_images(PIXELS[:1])}):
        with pytest.raises(ValueError, match="inputs_embeds came with an image"):
            model.generate(inputs_embeds=embeds, **settings, **image)


class Packed(torch.nn.Module):
    """A linear layer as quantisers leave it: its weight in bytes, a floating bias, its input in the bias's dtype."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = float(layer.weight.detach().abs().max()) / 127
        self.weight = torch.nn.Parameter((layer.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("kind", ["int8 of torch", "bytes with a bias", "adapters in another dtype"])
def test_a_connector_computes_in_the_dtype_of_its_whole_weights_however_they_are_kept(
    model: CompactVisionForConditionalGeneration, kind: str
) -> None:
    plain = model(torch.tensor([ROWS[0]]), pixel_values=PIXELS[:1]).logits
    if kind == "int8 of torch":  # which leaves no parameter at all
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    elif kind == "bytes with a bias":
        for name, layer in list(model.connector.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                model.connector.set_submodule(name, Packed(layer))
    else:
        model.connector.bfloat16()
        model.connector.register_module("adapter", torch.nn.Linear(2, 2))  # in float32
        model.connector._modules = dict(reversed(model.connector._modules.items()))  # and first
    found = model(torch.tensor([ROWS[0]]), pixel_values=PIXELS[:1]).logits
    assert (found - plain).norm() < 0.2 * plain.norm()  # 8 bits everywhere


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "num_return_sequences": 2},
    ],
)
def test_the_placeholder_is_never_said(
    model: CompactVisionForConditionalGeneration, batch: dict[str, torch.Tensor], how: dict
) -> None:
    torch.manual_seed(0)
    said = answer(model, **batch, **how)
    assert len(said) == 3 * how.get("num_return_sequences", 1)
    assert all(0 <= token < IMAGE for row in said for token in row)


def test_parts_are_taken_as_they_are(make_model) -> None:
    model = make_model()
    assert not any(p.is_meta for p in model.parameters())
    assert model.config.image_token_id == 736
    assert model.config.image_tokens == model.connector.tokens == 4
    assert model.get_input_embeddings() is model.llm.model.embed_tokens
    assert model.get_output_embeddings() is model.llm.lm_head


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_it_is_the_same_model(make_model, tmp_path: Path, tied: bool, batch: dict) -> None:
    model = make_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = CompactVisionForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.llm.lm_head.weight is loaded.llm.model.embed_tokens.weight) is tied
    for name in ("connector", "image_token_id", "image_tokens", "aspect", "tie_word_embeddings"):
        assert getattr(loaded.config, name) == getattr(model.config, name)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = CompactVisionForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_loaded_in_bf16_on_a_device_map_with_either_attention(make_model, tmp_path: Path, batch: dict) -> None:
    make_model().save_pretrained(tmp_path)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    logits = {}
    for attention in ("sdpa", "eager"):
        loaded = CompactVisionForConditionalGeneration.from_pretrained(
            tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"}, attn_implementation=attention
        )
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        assert loaded.llm.config._attn_implementation == attention
        assert loaded.vision_tower.config._attn_implementation == attention
        logits[attention] = loaded(**batch).logits[:, -1].float()
    torch.testing.assert_close(logits["sdpa"], logits["eager"], rtol=0.1, atol=0.3)


@pytest.mark.parametrize(
    ("where", "room"),
    [
        ("auto", None),
        ("auto", {"cpu": "200KB"}),  # too little: weights stay on disk until they are needed
        ({"vision_tower": "cpu", "connector": "cpu", "llm": "disk"}, None),
    ],
)
def test_a_device_map_changes_no_answer(
    model: CompactVisionForConditionalGeneration, tmp_path: Path, batch: dict, where: object, room: object
) -> None:
    model.save_pretrained(tmp_path)
    placed = CompactVisionForConditionalGeneration.from_pretrained(
        tmp_path, device_map=where, max_memory=room, offload_folder=tmp_path / "disk"
    )
    assert any(p.is_meta for p in placed.parameters()) is not (where == "auto" and room is None)
    assert torch.equal(placed(**batch).logits, model(**batch).logits)
    assert answer(placed, **batch) == answer(model, **batch)


def test_an_unfinished_checkpoint_gives_the_connector_pytorchs_initial_weights(make_model, tmp_path: Path) -> None:
    model = make_model()
    state = {name: weight for name, weight in model.state_dict().items() if not name.startswith("connector")}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = CompactVisionForConditionalGeneration.from_pretrained(tmp_path)
    weight = loaded.connector.stf.fuse.weight
    bound = weight.shape[1] ** -0.5  # nn.Linear's
    assert 0.9 * bound < weight.abs().max() <= bound


def test_a_configuration_of_nothing_is_the_7b_model_of_the_paper() -> None:
    config = CompactVisionConfig()
    assert config.image_tokens == 144
    assert config.vision_config is None
    assert config.connector["blocks"] == (3, 6, 9, 12, 15, 18, 21, 24)


def test_two_tokens_per_window_have_two_placeholders_each(make_model, tmp_path: Path) -> None:
    llm = make_model().llm
    shape = connector_config(fused_tokens=2, grid=4, vision_width=32, llm_width=64, blocks=(1, 2))
    model = CompactVisionForConditionalGeneration.from_parts(llm, build_connector(shape))
    model.save_pretrained(tmp_path)
    assert CompactVisionConfig.from_pretrained(tmp_path).image_tokens == 8


def test_a_connector_of_another_width_is_refused(make_model) -> None:
    model = make_model()
    connector = build_connector(connector_config(grid=4, vision_width=32, llm_width=32, blocks=(1,)))
    with pytest.raises(ValueError, match=r"connector.llm_width is 32, the language model's 64"):
        CompactVisionForConditionalGeneration.from_parts(model.llm, connector)
    connector = build_connector(connector_config(grid=6, vision_width=32, llm_width=64, blocks=(1,)))
    with pytest.raises(ValueError, match=r"makes 4 x 4 tokens of width 32; the connector expects 6 x 6 of width 32"):
        CompactVisionForConditionalGeneration.from_parts(model.llm, connector, model.vision_tower)
    connector = build_connector(connector_config(grid=4, vision_width=32, llm_width=64, blocks=(1, 6)))
    with pytest.raises(ValueError, match="needs block 6; the vision tower has 5"):
        CompactVisionForConditionalGeneration.from_parts(model.llm, connector, model.vision_tower)


def test_auto_config_needs_no_trust_once_the_class_is_known(make_model, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    write_code(model, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).model_type == "compact_vision"
