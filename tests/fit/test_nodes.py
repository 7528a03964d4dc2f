"""Two nodes without a common disk: all ranks end alike where only one of them has a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.hostile import mark_again

Become = Callable[[int, int, int, Path], None]
STEPS = 2


def node(become_rank: Become, rank: int, port: int, output: Path, settings: dict[str, Any]) -> None:
    from training.config import TrainConfig
    from training.fit import stage

    become_rank(rank, 2, port, output)
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": str(rank)}
    torch.set_num_threads(1)
    stage.train(TrainConfig.model_validate(settings))


@pytest.mark.parametrize("holder", [0, 1])
def test_a_last_checkpoint_on_one_node_is_no_new_start_and_no_deadlock(
    holder: int,
    settings: Callable[..., Any],
    fork: ForkServerContext,
    free_port: Callable[[], int],
    become_rank: Become,
    ended: Callable[..., list[int]],
    tmp_path: Path,
) -> None:
    checkpoint = tmp_path / f"run-{holder}" / "checkpoints" / f"ba{STEPS:08d}"
    checkpoint.mkdir(parents=True)
    torch.save({}, checkpoint / "composer.pt")
    mark_again(checkpoint, "ddp", ranks=2)
    port = free_port()
    outputs = [tmp_path / f"output-{rank}" for rank in range(2)]
    runs = [settings(tmp_path / f"run-{rank}", 1, {"steps": STEPS}) for rank in range(2)]
    ranks = [fork.Process(target=node, args=(become_rank, rank, port, outputs[rank], runs[rank])) for rank in range(2)]
    for rank in ranks:
        rank.start()
    codes = ended(ranks, expected=1)
    for output in outputs:
        said = output.read_text()
        assert "is sound on every node" in said and "Traceback" not in said, said[-3000:]
    assert codes == [1, 1]
    assert (checkpoint / "composer.pt").is_file()
