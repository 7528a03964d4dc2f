"""Two ranks, one of which sees no image: neither waits for the other, and both step by the mean of their gradients."""

from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fixtures.models import make_connector, make_llm
from training.model.model import CompactVisionForConditionalGeneration

STAGES = (1, 2)
PROMPT = [1, 5, *[736] * 4, 8, 9]


def _batch(rank: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(3)
    columns = {f"block{b:02d}": torch.randn(1 - rank, 16, 32, generator=generator) for b in (1, 2, 4)}
    ids = torch.tensor([PROMPT if rank == 0 else [1, 5, 6, 7, 8, 9, 10, 11]])
    labels = ids.masked_fill(ids == 736, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "columns": columns}


def _train(rank: int, folder: Path, port: int, become_rank: Callable[..., None]) -> None:
    """Both stages in turn; the gradients of each go to a file."""
    become_rank(rank, 2, port, folder / "output")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for stage in STAGES:
        model = CompactVisionForConditionalGeneration.from_pretrained(folder / "model").train()
        model.llm.requires_grad_(stage == 2)
        wrapped = DistributedDataParallel(model)
        wrapped(**_batch(rank)).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch.save(gradients, folder / f"gradients-{stage}-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    fork: ForkServerContext,
    free_port: Callable[[], int],
    become_rank: Callable[..., None],
    ended: Callable[..., list[int]],
) -> Path:
    """A folder with the model, and what two ranks made of it."""
    folder = tmp_path_factory.mktemp("ddp")
    CompactVisionForConditionalGeneration.from_parts(make_llm(), make_connector(), None).save_pretrained(
        folder / "model"
    )
    port = free_port()
    ranks = [fork.Process(target=_train, args=(rank, folder, port, become_rank)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    assert ended(ranks) == [0, 0], (folder / "output").read_text()
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_without_images_does_not_stop_the_others(trained: Path, stage: int) -> None:
    seen = [torch.load(trained / f"gradients-{stage}-{rank}", weights_only=True) for rank in range(2)]
    model = CompactVisionForConditionalGeneration.from_pretrained(trained / "model").train()
    model.llm.requires_grad_(stage == 2)
    sum(model(**_batch(rank)).loss / 2 for rank in range(2)).backward()
    for name, parameter in model.named_parameters():
        assert (name in seen[0]) is (parameter.grad is not None)
        if parameter.grad is not None:
            torch.testing.assert_close(seen[0][name], parameter.grad, rtol=1e-4, atol=1e-6)
            assert torch.equal(seen[0][name], seen[1][name])
