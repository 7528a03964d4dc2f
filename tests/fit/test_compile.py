"""What torch.compile makes of the model: a number of graphs that no batch changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from training.config import TrainConfig
from training.engines import engine_of
from training.fit.composer_model import TrainableModel, microbatches
from training.fit.parts import open_parts

LORA = {"model.lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}


@pytest.mark.parametrize(
    ("stage", "changes", "made"),
    [
        (1, {}, 3),
        (2, {}, 3),
        (2, {"model.activation_checkpointing": True}, 3),
        (2, {"model.loss_chunks": 3, "precision": "amp_bf16"}, 3),
        (2, {**LORA, "model.activation_checkpointing": True}, 3),
        (2, {**LORA, "train": ["llm"]}, 5),  # no gradient goes through the first layer's input, unlike the others'
    ],
)
def test_the_graphs_are_as_many_whatever_the_batches_hold(
    settings: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    changes: dict[str, Any],
    made: int,
) -> None:
    """One of the connector; one of all layers for a row, and one for more rows: to torch.compile, 1 is a constant."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    changes = {"global_batch_size": 16, "model.compile": ["connector", "llm"], **changes}
    config = TrainConfig.model_validate(settings(tmp_path / "run", stage, changes))
    store, _, model, stream, _ = open_parts(config, 0, 1)
    engine_of(config, 1).place(model)
    columns = tuple(next(c for c in store.columns if c.name == name) for name in model.connector.columns)
    trained = TrainableModel(model, columns, store.codec, torch.float32)
    batch = next(iter(stream))
    parts = [
        part for size in (1, 2, 3, 5, 16) for part in microbatches(batch, size, model.config.image_token_id, False)
    ]
    images = {len(part["image_rows"]) for part in parts}
    assert {0, 1} < images and len({part["input_ids"].shape for part in parts}) > len(images)

    def losses() -> list[float]:
        found = []
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "amp_bf16"):
                loss = trained(part).loss
            loss.backward()
            found.append(loss.item())
        return found

    with torch.compiler.set_stance("force_eager"):
        usual = losses()
    assert not graphs
    assert losses() == pytest.approx(usual, rel=1e-5)
    assert len(graphs) == made
