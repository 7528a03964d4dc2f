"""Two ranks, one of which sees no image: neither waits for the other, and both step by the mean of their gradients."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from training.model.model import CompactVisionForConditionalGeneration

PROMPT = [1, 5, *[736] * 4, 8, 9]


def _batch(rank: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(3)
    columns = {f"block{b:02d}": torch.randn(1 - rank, 16, 32, generator=generator) for b in (1, 2, 4)}
    ids = torch.tensor([PROMPT if rank == 0 else [1, 5, 6, 7, 8, 9, 10, 11]])
    labels = ids.masked_fill(ids == 736, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "columns": columns}


def _train(rank: int, folder: str, rendezvous: str, stage: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model = CompactVisionForConditionalGeneration.from_pretrained(folder).train()
    model.llm.requires_grad_(stage == 2)
    wrapped = DistributedDataParallel(model)
    wrapped(**_batch(rank)).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save(gradients, f"{rendezvous}.{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_rank_without_images_does_not_stop_the_others(
    make_model: Callable[..., CompactVisionForConditionalGeneration], tmp_path: Path, stage: int
) -> None:
    model = make_model(tower=False)
    model.save_pretrained(tmp_path / "model")
    rendezvous = str(tmp_path / "rendezvous")
    mp.spawn(_train, args=(str(tmp_path / "model"), rendezvous, stage), nprocs=2)
    seen = [torch.load(f"{rendezvous}.{rank}", weights_only=True) for rank in range(2)]
    model.train()
    model.llm.requires_grad_(stage == 2)
    sum(model(**_batch(rank)).loss / 2 for rank in range(2)).backward()
    for name, parameter in model.named_parameters():
        assert (name in seen[0]) is (parameter.grad is not None)
        if parameter.grad is not None:
            torch.testing.assert_close(seen[0][name], parameter.grad, rtol=1e-4, atol=1e-6)
            assert torch.equal(seen[0][name], seen[1][name])
