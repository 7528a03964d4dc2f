"""What a step keeps for its backward pass, and what it computes: counted, not estimated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fixtures.kept import kept_bytes
from pipeline.manifest import read_store
from pipeline.storage import Storage
from training.config import TrainConfig
from training.cost.mfu import StepFlops
from training.fit.build import build_model
from training.model.model import CompactVisionForConditionalGeneration

IMAGES, LENGTH, WIDTH = 4, 100, 32


@pytest.fixture
def make(settings: Callable[..., Any], tmp_path: Path) -> Callable[..., CompactVisionForConditionalGeneration]:
    def build(stage: int, **model: Any) -> CompactVisionForConditionalGeneration:
        changes = {f"model.{name}": value for name, value in model.items()}
        config = TrainConfig.model_validate(settings(tmp_path, stage, changes))
        return build_model(config, read_store(Storage(config.data.store)))

    return build


def batch(model: CompactVisionForConditionalGeneration) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    columns = {name: torch.randn(IMAGES, 16, WIDTH, generator=generator) for name in model.connector.columns}
    ids = torch.randint(10, 400, (IMAGES, LENGTH), generator=generator)
    ids[:, 1:5] = model.config.image_token_id
    labels = ids.masked_fill(torch.arange(LENGTH) < 20, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "columns": columns}


def step(model: CompactVisionForConditionalGeneration, inputs: dict[str, Any]) -> tuple[int, float]:
    """(bytes that the forward pass keeps beside the weights and its inputs, the loss)."""
    known = (*model.parameters(), *inputs["columns"].values())
    kept, loss = kept_bytes(lambda: model(**inputs).loss, known)
    loss.backward()
    return kept, float(loss)


def test_a_frozen_llm_keeps_no_input_of_its_matrices(make: Callable[..., Any]) -> None:
    """Their gradient is not wanted; queries, keys, values and gates are, for the gradient of the vision tokens."""
    frozen, learning = (step(make(stage), batch(make(stage)))[0] for stage in (1, 2))
    llm = make(1).config.text_config
    tokens, layers = IMAGES * LENGTH * 4, llm.num_hidden_layers  # bytes of a number per token
    inputs = layers * (2 * llm.hidden_size + llm.hidden_size + llm.intermediate_size) * tokens
    assert learning - frozen >= 0.9 * inputs
    checkpointed, _ = step(make(1, activation_checkpointing=True), batch(make(1)))
    assert checkpointed < 0.5 * frozen


def test_logits_in_parts_are_not_kept_and_change_nothing(make: Callable[..., Any]) -> None:
    for stage in (1, 2):
        at_once, in_parts = make(stage), make(stage, loss_chunks=5)
        (much, expected), (little, loss) = (step(model, batch(model)) for model in (at_once, in_parts))
        assert loss == pytest.approx(expected, rel=1e-6)
        supervised = IMAGES * (LENGTH - 20)
        assert much - little >= 0.9 * 4 * supervised * at_once.config.text_config.vocab_size
        for (name, p), q in zip(at_once.named_parameters(), in_parts.parameters(), strict=True):
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_no_logits_are_computed_where_nothing_is_predicted(make: Callable[..., Any]) -> None:
    model = make(2)
    seen = []
    model.llm.lm_head.register_forward_hook(lambda _module, _inputs, out: seen.append(out.shape[0]))
    model(**batch(model))
    assert seen == [IMAGES * (LENGTH - 20)]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_flops_of_a_step_are_those_that_pytorch_counts(make: Callable[..., Any], stage: int) -> None:
    model = make(stage)
    model.llm.set_attn_implementation("eager")  # whose products PyTorch counts one by one
    inputs = batch(model)
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    expected = StepFlops(model, ["connector"] if stage == 1 else ["connector", "llm"])(
        [LENGTH] * IMAGES, IMAGES, IMAGES * (LENGTH - 20)
    )
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)
