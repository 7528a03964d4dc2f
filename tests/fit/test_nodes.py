"""Two nodes without a common disk: all ranks end alike where only one has a checkpoint, or cannot write."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.hostile import mark_again
from training.fit.identity import SOURCES
from training.release.records import LOG

Become = Callable[[int, int, int, Path], None]
STEPS = 2


def node(become_rank: Become, rank: int, port: int, output: Path, settings: dict[str, Any]) -> None:
    from training.config import TrainConfig
    from training.fit import stage

    become_rank(rank, 2, port, output)
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": str(rank)}
    torch.set_num_threads(1)
    stage.train(TrainConfig.model_validate(settings))


@pytest.fixture
def two_nodes(
    settings: Callable[..., Any],
    fork: ForkServerContext,
    free_port: Callable[[], int],
    become_rank: Become,
    ended: Callable[..., list[int]],
    tmp_path: Path,
) -> Callable[[], list[str]]:
    """two_nodes(): what each of two ranks says that train in `run-0` and `run-1`, and end with 1 by themselves."""

    def train() -> list[str]:
        port = free_port()
        outputs = [tmp_path / f"output-{rank}" for rank in range(2)]
        runs = [settings(tmp_path / f"run-{rank}", 1, {"steps": STEPS}) for rank in range(2)]
        ranks = [
            fork.Process(target=node, args=(become_rank, rank, port, outputs[rank], runs[rank])) for rank in range(2)
        ]
        for rank in ranks:
            rank.start()
        codes, said = ended(ranks, expected=1), [output.read_text() for output in outputs]
        assert codes == [1, 1], said
        assert not any("Traceback" in text for text in said), said
        return said

    return train


@pytest.mark.parametrize("holder", [0, 1])
def test_a_last_checkpoint_on_one_node_is_no_new_start_and_no_deadlock(
    holder: int, two_nodes: Callable[[], list[str]], tmp_path: Path
) -> None:
    checkpoint = tmp_path / f"run-{holder}" / "checkpoints" / f"ba{STEPS:08d}"
    checkpoint.mkdir(parents=True)
    torch.save({}, checkpoint / "composer.pt")
    mark_again(checkpoint, "ddp", ranks=2)
    assert all("is sound on every node" in said for said in two_nodes())
    assert (checkpoint / "composer.pt").is_file()


@pytest.mark.parametrize("name", [SOURCES, LOG])
def test_what_rank_0_cannot_write_before_the_first_step_ends_both_with_the_one_message(
    name: str, two_nodes: Callable[[], list[str]], tmp_path: Path
) -> None:
    (tmp_path / "run-0" / name).mkdir(parents=True)  # no file can take its place, whoever writes
    for said in two_nodes():
        assert re.search(rf"error: .*Is a directory: .*{name}", said), said
        assert "samples/s" not in said
