"""What a run is reckoned to take, and what `train.py --check` shows of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from transformers import LlamaForCausalLM

from training.config import TrainConfig
from training.cost.memory import ModelShape, activations
from training.engines import engine_of

SHAPE = ModelShape(learning=1000, frozen=500, layer=100, layers=10, hidden=8, mlp=16, vocabulary=100)


def lines(output: str, check: str) -> list[str]:
    return [line for line in output.splitlines() if line[6:].startswith(check)]


def config_of(good: list[str], **changes: object) -> TrainConfig:
    settings = yaml.safe_load(Path(good[0]).read_text()) | changes
    return TrainConfig.model_validate(settings)


def test_the_estimate_of_ddp_is_what_adam_allocates(good: list[str], llm: Path) -> None:
    import torch

    model = LlamaForCausalLM.from_pretrained(llm, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones((1, 4), dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    weights = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.grad.nbytes for p in model.parameters())
    moments = sum(s[name].nbytes for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    shape = ModelShape(**{**SHAPE.__dict__, "learning": model.num_parameters(), "frozen": 0})
    found = engine_of(config_of(good), ranks=1).memory(shape)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, moments)


@pytest.mark.parametrize(
    ("engine", "expected"),  # bytes of weights, gradients, optimizer; 1000 weights learn, 500 bf16 ones are frozen
    [
        ("ddp", (4000 + 2000 + 1000, 8000, 8000)),
        ("fsdp", ((4000 + 1000) / 4 + 400, 1000, 2000)),
        ("zero1", (3000, 2000, 3000)),
        ("zero2", (3000, 500, 3000)),
        ("zero3", (3000 / 4 + 400, 500, 3000)),
    ],
)
def test_each_engine_shards_its_part(good: list[str], engine: str, expected: tuple[float, ...]) -> None:
    config = config_of(good, precision="amp_bf16").model_copy(update={"parallelism": engine})
    found = engine_of(config, ranks=4).memory(SHAPE)
    assert (found.weights, found.gradients, found.optimizer) == expected


def test_one_rank_shards_with_nobody_under_fsdp(good: list[str]) -> None:
    ddp, fsdp = (engine_of(config_of(good, parallelism=name), ranks=1) for name in ("ddp", "fsdp"))
    assert fsdp.name == "ddp"
    assert fsdp.memory(SHAPE) == ddp.memory(SHAPE)


def test_activation_checkpointing_needs_less(good: list[str]) -> None:
    whole = config_of(good)
    saved = whole.model_copy(update={"model": whole.model.model_copy(update={"activation_checkpointing": True})})
    more, less = (activations(c, SHAPE, 4, 10) for c in (whole, saved))
    assert less < more / 2


def test_check_shows_groups_and_an_example_with_its_labels(
    good: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from training.train import main

    monkeypatch.setattr(sys, "argv", ["train.py", *good, "--check"])
    main()
    output = capsys.readouterr().out
    assert "global_batch_size: 8" in output
    assert "GB (ddp, 1 rank(s), 4 example(s) of 512 tokens) of" in lines(output, "memory")[0]
    assert lines(output, "disk")[0].startswith("ok")
    assert "lr 1.00e-03  weight decay 0" in output
    assert "tensors of connector.mbtf, connector.stf" in output
    assert "USER: [1 vision tokens]" in output
    assert "ASSISTANT:⟦a b</s>⟧" in output
    assert not Path(config_of(good).run).exists()
    assert "not on this machine" not in output
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["train.py", *good, "--check", "precision=amp_bf16"])
    main()
    assert "precision amp_bf16: Composer takes it only on GPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.stor=x", "did you mean 'store'?"),
        ("data.seed=-1", "data.seed: Input should be greater than or equal to 0"),
        ("seed=4294967295", "seed: Input should be less than 4294967295"),
        ("data.store=/nowhere", "is not a feature store"),
        ("model.connector.blocks=[3,6]", "needs block06"),
        ("global_batch_size=512", "fewer than one global batch of 512"),
        ("data.max_length=4096", "more than the 2048 positions"),
    ],
)
def test_check_names_what_is_wrong(good: list[str], monkeypatch: pytest.MonkeyPatch, setting: str, words: str) -> None:
    from training.train import main

    monkeypatch.setattr(sys, "argv", ["train.py", *good, "--check", setting])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert str(stopped.value.code).startswith("error: ")
    assert words in str(stopped.value.code)
