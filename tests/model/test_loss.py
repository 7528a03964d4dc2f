"""The loss of the supervised tokens, and by groups of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from training.model.loss import Loss
from training.model.markers import IGNORE
from training.model.placeholders import Places

VOCABULARY, WIDTH = 11, 5


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("supervised", [0, 1, 9])
def test_the_sums_of_groups_are_those_of_their_tokens_and_change_no_gradient(chunks: int, supervised: int) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCABULARY)
    hidden = torch.randn(2, 6, WIDTH, requires_grad=True)
    labels = torch.full((2, 6), IGNORE)
    learned = torch.tensor([1, 2, 3, 5, 7, 8, 9, 10, 11])[:supervised]
    labels.view(-1)[learned] = torch.randint(VOCABULARY, (supervised,))
    of_target = learned // 6  # each row is of another group; a third has none
    groups = one_hot(of_target, 3).float()
    empty = torch.zeros(0, dtype=torch.int64)
    loss = Loss(head, chunks, training=True)
    plain, nothing = loss(hidden, labels, None, Places(empty, empty, learned))
    assert nothing is None
    (usual,) = torch.autograd.grad(plain, hidden)
    found, sums = loss(hidden, labels, None, Places(empty, empty, learned, groups))
    assert torch.allclose(found, plain)
    assert torch.allclose(torch.autograd.grad(found, hidden)[0], usual)
    each = cross_entropy(head(hidden.flatten(0, 1)[learned - 1]), labels.view(-1)[learned], reduction="none")
    assert sums is not None
    assert not sums.requires_grad
    assert torch.allclose(sums, torch.stack([each[of_target == group].sum() for group in range(3)]))


def test_evaluation_counts_right_tokens_and_no_groups() -> None:
    head = torch.nn.Linear(WIDTH, VOCABULARY)
    hidden, labels = torch.randn(1, 4, WIDTH), torch.tensor([[1, 2, 3, 4]])
    learned = torch.tensor([1, 2, 3])
    groups, empty = torch.ones(3, 1), torch.zeros(0, dtype=torch.int64)
    _, right = Loss(head, 1, training=False)(hidden, labels, None, Places(empty, empty, learned, groups))
    assert right == (head(hidden[0, :3]).argmax(dim=1) == labels[0, 1:]).sum()
