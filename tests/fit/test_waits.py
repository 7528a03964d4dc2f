"""What the host asks of the device in a step of training: nothing for a microbatch, twice for a step."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.waits import Waits
from training.config import TrainConfig
from training.engines import engine_of
from training.fit.composer_model import TrainableModel, microbatches, token_counts
from training.fit.parts import open_parts
from training.stream.batch import Batch

pytestmark = pytest.mark.minutes(1)
STEPS = 6
LORA = {"model.lora": {"rank": 8, "alpha": 16, "dropout": 0.0}, "optimizer.llm_lr": 4e-3}
# name: (stage, ranks, settings). Microbatches of one example: some have an image, some only text.
RUNS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "ddp-1": (1, 2, {}),
    "lora": (2, 1, {**LORA, "microbatch_size": 1, "model.loss_chunks": 2, "model.activation_checkpointing": True}),
    "zero2": (2, 1, {"parallelism": "zero2"}),
    "fsdp": (2, 2, {"parallelism": "fsdp"}),
    "zero3": (1, 2, {"parallelism": "zero3"}),
    "lora-zero3": (2, 2, {**LORA, "parallelism": "zero3", "microbatch_size": 3}),
}
SLOW = ("fsdp", "zero3", "lora-zero3")


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    settings: Callable[..., Any],
    run_jobs: Callable[..., Any],
    needed: list[str],
) -> Path:
    """A folder for each of RUNS that is needed."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = []
    for name in needed:
        stage, ranks, changes = RUNS[name]
        config = settings(folder / name, stage, {"steps": STEPS, "checkpoint.interval": "100ba", **changes})
        jobs.append({"config": config, "ranks": ranks, "waits": True})
    for name, codes in zip(needed, run_jobs(folder, jobs), strict=True):
        assert not any(codes), (folder / name / "output").read_text()[-4000:]
    return folder


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.needs(name), *([pytest.mark.slow] if name in SLOW else [])])
        for name in RUNS
    ],
)
def test_the_host_asks_for_nothing_in_a_microbatch_and_twice_in_a_step(runs: Path, name: str) -> None:
    """Composer and DeepSpeed ask for more. What comes once, with the checkpoint at the end, does not count."""
    _, ranks, changes = RUNS[name]
    # DeepSpeed measures the gradient within its step, after the losses are read; several ranks agree on when to stop.
    most = 1 + (ranks > 1) + changes.get("parallelism", "ddp").startswith("zero")
    for rank in range(ranks):
        found: Counter[tuple[str, str]] = Counter()
        for owner, place, per, times in json.loads((runs / name / f"waits-{rank}.json").read_text()):
            assert per == "step" or owner in ("composer", "deepspeed"), (owner, place)
            found[owner, place] += times
        assert {owner for owner, _ in found} <= {"ours", "composer", "deepspeed"}
        assert found["composer", "composer/trainer/trainer.py:<lambda>, aten._local_scalar_dense.default"] == STEPS
        ours = {place: times // STEPS for (owner, place), times in found.items() if owner == "ours"}
        assert sum(ours.values()) == most, ours


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 1).unique(),
        lambda x: torch.equal(x, x),
    ],
)
def test_whatever_needs_the_data_is_counted(ask: Callable[[torch.Tensor], Any]) -> None:
    values = torch.ones(3)

    def _train_microbatch() -> None:  # named as Composer's
        ask(values)
        values.index_select(0, torch.tensor([1])).add_(values[torch.tensor([0])])  # that needs no data

    with Waits() as waits:
        _train_microbatch()
    assert [(owner, per) for (owner, _, per), _ in waits.found.items()] == [("ours", "microbatch")]


@pytest.fixture
def parted(settings: Callable[..., Any], tmp_path: Path) -> Callable[[str], tuple[TrainableModel, list[Batch]]]:
    """parted(device): the model there, and the microbatches of its first batch, on the host."""

    def make(device: str) -> tuple[TrainableModel, list[Batch]]:
        config = TrainConfig.model_validate(settings(tmp_path / "run", 2))
        store, _, model, stream, _ = open_parts(config, 0, 1)
        engine_of(config, 1).place(model)
        columns = tuple(next(c for c in store.columns if c.name == name) for name in model.connector.columns)
        parts = microbatches(next(iter(stream)), 3, model.config.image_token_id, pin=device == "cuda")
        return TrainableModel(model, columns, store.codec, torch.float32).to(device), parts

    return make


def test_a_microbatch_carries_what_its_tensors_hold(
    parted: Callable[[str], tuple[TrainableModel, list[Batch]]],
) -> None:
    model, parts = parted("cpu")
    assert [len(part["keys"]) for part in parts] == [3, 3, 2]
    for part in parts:
        ids, labels = part["input_ids"], part["labels"]
        assert torch.equal(part["vision"], (ids == model.model.config.image_token_id).flatten().nonzero().squeeze(1))
        at = part["learned"]
        assert torch.equal(labels.flatten()[at], labels[:, 1:][labels[:, 1:] != -100])
        assert part["tokens"] == token_counts({name: part[name] for name in ("labels", "attention_mask")})
        assert part["tokens"]["predicted"] == len(at)
        assert part["tokens"]["lengths"] == part["attention_mask"].sum(dim=1).tolist()


def test_what_the_host_knows_changes_no_bit_of_losses_and_gradients(
    parted: Callable[[str], tuple[TrainableModel, list[Batch]]],
) -> None:
    model, parts = parted("cpu")
    assert any((part["attention_mask"] == 0).any() for part in parts)
    seen = {}
    for implementation, known in (
        ("sdpa", False),
        ("sdpa", True),
        ("unmasked_sdpa", True),
        ("eager", False),
        ("eager", True),
    ):
        model.model.llm.set_attn_implementation(implementation)
        losses, gradients = [], []
        for part in parts:
            given = Batch(part) if known else Batch({k: v for k, v in part.items() if k != "learned"})
            loss = model(given).loss
            losses.append(loss.detach())
            loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        seen[implementation, known] = [*losses, *gradients]
    for (implementation, known), values in seen.items():
        usual = seen["eager" if implementation == "eager" else "sdpa", False]
        assert len(values) == len(usual) > 30
        assert all(torch.equal(a, b) for a, b in zip(values, usual, strict=True)), (implementation, known)


def test_composer_copies_no_features_of_a_microbatch_that_is_on_its_device(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    from composer.devices import DeviceCPU

    from training.fit.trainer import _data

    parts = open_parts(TrainConfig.model_validate(settings(tmp_path / "run", 2)), 0, 1)
    spec = _data(parts)
    part = spec.split_batch(next(iter(parts.stream)), 3)[0]
    moved = spec.microbatch_transforms(DeviceCPU().batch_to_device(part))  # as Composer's trainer does
    assert deepcopy(moved)["columns"] is moved["columns"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: nothing to wait for")
def test_on_a_gpu_no_microbatch_makes_the_host_wait(
    parted: Callable[[str], tuple[TrainableModel, list[Batch]]],
) -> None:
    from composer.devices import DeviceGPU

    model, parts = parted("cuda")
    device = DeviceGPU()
    for mode in ("default", "error"):  # the first pass makes what later ones use again
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for part in parts:
                model(Batch(device.batch_to_device(part))).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
