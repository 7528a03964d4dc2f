"""One pass of the model: where vision tokens go, what is computed, the loss and its gradients."""

import copy

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from training.model.model import CompactVisionForConditionalGeneration

IMAGE = 736  # just outside the vocabulary
TOKENS = 4
PROMPT = [1, 5, *[IMAGE] * TOKENS, 8, 9]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two conversations with an image, one without, padded on the right."""
    rows = [[*PROMPT, 20, 21, 2], [*PROMPT[:6], 30, 2, 0, 0, 0], [1, 7, 8, 9, 40, 41, 42, 2, 0, 0, 0]]
    input_ids = torch.tensor(rows)
    labels = torch.full_like(input_ids, -100)
    labels[0, 8:], labels[1, 6:8], labels[2, 4:8] = input_ids[0, 8:], input_ids[1, 6:8], input_ids[2, 4:8]
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1:, 8:] = 0
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask, "pixel_values": pixels}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_vision_tokens_stand_where_their_placeholders_were(model: CompactVisionForConditionalGeneration) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    vision = model.get_image_features(pixels)
    words = model.llm.get_input_embeddings()
    embeds = torch.cat([words(torch.tensor([[1, 5]])), vision, words(torch.tensor([[8, 9]]))], dim=1)
    expected = model.llm(inputs_embeds=embeds).logits
    output = model(torch.tensor([PROMPT]), pixel_values=pixels)
    assert torch.equal(output.logits, expected)
    assert torch.equal(output.image_hidden_states, vision)


def test_columns_are_clips_hidden_states_without_cls(model: CompactVisionForConditionalGeneration) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    hidden = model.vision_tower(pixels, output_hidden_states=True).hidden_states
    columns = model.encode_images(pixels)
    assert list(columns) == ["block01", "block02", "block04"]
    for name, column in columns.items():
        assert torch.equal(column, hidden[int(name[-2:])][:, 1:])


def test_no_clip_block_above_the_deepest_needed_one_runs(model: CompactVisionForConditionalGeneration) -> None:
    ran: list[int] = []
    for number, layer in enumerate(model.vision_tower.encoder.layers, 1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    model.encode_images(torch.randn(1, 3, 32, 32))
    assert ran == [1, 2, 3, 4]


def test_cached_columns_and_pixels_give_the_same_logits(
    model: CompactVisionForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> None:
    columns = model.encode_images(batch["pixel_values"])
    live = model(**batch)
    cached = model(**{**batch, "pixel_values": None, "columns": columns})
    assert torch.equal(live.logits, cached.logits)
    assert torch.equal(live.loss, cached.loss)


def test_the_loss_and_its_gradients_are_those_of_all_logits(
    model: CompactVisionForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> None:
    columns = model.encode_images(batch.pop("pixel_values"))
    labels = batch.pop("labels")
    logits = model(**batch, columns=columns).logits
    expected = ForCausalLMLoss(logits, labels, vocab_size=736)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    output = model.train()(**batch, columns=columns, labels=labels)
    assert output.logits is None  # only those at supervised positions were computed
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)
    assert gradients(model).keys() == wanted.keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_training_computes_logits_of_supervised_positions_alone(
    model: CompactVisionForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> None:
    rows: list[int] = []
    model.llm.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    model.train()(**batch)
    assert rows == [int((batch["labels"][:, 1:] != -100).sum())] == [9]


def test_without_supervised_tokens_the_loss_is_zero_and_every_parameter_has_a_gradient(
    model: CompactVisionForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> None:
    batch["labels"][:] = -100
    loss = model.train()(**batch).loss
    loss.backward()
    assert loss.item() == 0
    learning = {n for n, _ in model.named_parameters() if not n.startswith("vision_tower")}
    assert gradients(model).keys() == learning
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_batch_without_images_gives_the_connector_gradients_of_zero(
    model: CompactVisionForConditionalGeneration, batch: dict[str, torch.Tensor], stage: int
) -> None:
    model.llm.requires_grad_(stage == 2)
    columns = {name: column[:0] for name, column in model.encode_images(batch.pop("pixel_values")).items()}
    text = {name: tensor[2:] for name, tensor in batch.items()}
    loss = model.train()(**text, columns=columns).loss
    loss.backward()
    assert loss.item() > 0
    assert all(p.grad is not None and not p.grad.any() for p in model.connector.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.llm.parameters()) is (stage == 2)


def test_a_frozen_language_model_gets_no_gradient_and_the_connector_the_same(
    model: CompactVisionForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> None:
    model.train()(**batch).loss.backward()
    wanted = {n: g.clone() for n, g in gradients(model).items() if n.startswith("connector")}
    model.zero_grad()
    model.llm.requires_grad_(False)
    model(**batch).loss.backward()
    assert gradients(model).keys() == wanted.keys()
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients(model).items())


def test_activation_checkpointing_changes_no_gradient(
    model: CompactVisionForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> None:
    other = copy.deepcopy(model)
    for which in (model, other):
        which.llm.requires_grad_(False)
    other.gradient_checkpointing_enable({"use_reentrant": False})
    assert other.llm.model.layers[0].gradient_checkpointing
    for which in (model, other):
        which.train()(**batch).loss.backward()
    assert gradients(model).keys() == gradients(other).keys()
    assert all(torch.equal(gradient, gradients(other)[name]) for name, gradient in gradients(model).items())


def test_padding_changes_neither_loss_nor_gradients(
    model: CompactVisionForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> None:
    one = {name: tensor[1:2] for name, tensor in batch.items()}
    short = {**{name: tensor[:, :8] for name, tensor in one.items()}, "pixel_values": one["pixel_values"]}
    losses = []
    for part in (one, short):
        model.zero_grad()
        loss = model.train()(**part).loss
        loss.backward()
        losses.append((loss.detach(), gradients(model)["connector.stf.fuse.weight"].clone()))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-7)


def test_autocast_trains_fp32_weights_around_a_bf16_language_model(
    model: CompactVisionForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> None:
    columns = model.encode_images(batch.pop("pixel_values"))
    exact = model.train()(**batch, columns=columns).loss
    model.llm.to(torch.bfloat16).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, columns={name: column.bfloat16() for name, column in columns.items()}).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.connector.parameters())
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("ids", "images", "said"),
    [
        ([PROMPT[:-3]], 1, r"hold 3 image placeholders \(id 736\), but 1 image\(s\) of 4 vision tokens .* 4 in all"),
        ([PROMPT], 2, r"hold 4 image placeholders .* but 2 image\(s\) of 4 vision tokens were given, 8 in all"),
        ([PROMPT], 0, r"hold 4 image placeholders .* but 0 image\(s\) of 4 vision tokens were given, 0 in all"),
        ([[1, 5, 8]], 1, r"hold 0 image placeholders .* but 1 image"),
    ],
)
def test_placeholders_and_images_that_differ_in_number_are_refused(
    model: CompactVisionForConditionalGeneration, ids: list[list[int]], images: int, said: str
) -> None:
    pixels = torch.randn(images, 3, 32, 32) if images else None
    if ids == [PROMPT[:-3]]:
        ids = [[1, 5, IMAGE, IMAGE, IMAGE]]
    with pytest.raises(ValueError, match=said):
        model(torch.tensor(ids), pixel_values=pixels)


def test_ids_and_embeddings_together_or_neither_are_refused(model: CompactVisionForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_pixels_for_a_model_without_a_vision_tower_are_refused(make_model) -> None:
    with pytest.raises(ValueError, match="no vision tower; give it columns"):
        make_model(tower=False)(torch.tensor([PROMPT]), pixel_values=torch.randn(1, 3, 32, 32))
