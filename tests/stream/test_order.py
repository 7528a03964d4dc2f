"""The order of an epoch: every example once, a pure function of its settings, well mixed, local, the same for ever."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.stream.order import (
    Examples,
    Order,
    epoch_batches,
    padding_share,
    same_shard_pairs,
    shards_in_use,
    use_of_shards,
)


def make_examples(shards: list[int], conversations: int = 2, text_share: float = 0.2) -> Examples:
    random = np.random.default_rng(0)
    samples = sum(shards)
    counts = random.integers(1, conversations + 1, samples)
    sample = np.repeat(np.arange(samples), counts)
    return Examples(
        sample=sample,
        conversation=np.arange(len(sample)) - (np.cumsum(counts) - counts)[sample],
        shard=np.repeat(np.arange(len(shards)), shards)[sample],
        words=random.integers(3, 400, len(sample)),
        has_image=(random.random(samples) >= text_share)[sample],
    )


def changed(order: Order, **settings: object) -> Order:
    return order.model_copy(update=settings)


orders = st.builds(
    Order,
    global_batch_size=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
    window_shards=st.integers(1, 9),
    group_by_length=st.booleans(),
    last_batch=st.sampled_from(["drop", "pad"]),
) | st.builds(Order, global_batch_size=st.integers(1, 12), together=st.just(True))
shard_lists = st.lists(st.integers(1, 20), min_size=1, max_size=8)


@given(shard_lists, orders, st.integers(0, 1000))
@settings(max_examples=150)
def test_an_epoch_holds_every_example_once_but_for_its_last_batch(shards, order, epoch):
    examples = make_examples(shards)
    batches = epoch_batches(examples, order, epoch)
    assert batches.shape == (order.batches(len(examples)), order.global_batch_size)
    seen = np.bincount(batches.ravel(), minlength=len(examples))
    if order.last_batch == "drop":
        assert seen.max(initial=0) <= 1
        assert len(examples) - seen.sum() < order.global_batch_size
    else:
        assert seen.min() >= 1
        assert seen.sum() - len(examples) < order.global_batch_size


@given(shard_lists, orders)
@settings(max_examples=30)
def test_equal_settings_give_equal_orders(shards, order):
    examples = make_examples(shards)
    assert np.array_equal(epoch_batches(examples, order, 3), epoch_batches(examples, order, 3))


def test_the_order_stays_what_it_was_when_this_test_was_written():
    """A checkpoint names a position in the order: a change of this digest would break every run under way."""
    number = np.arange(150)
    examples = Examples(number // 2, number % 2, number // 40, number * 37 % 101, number // 2 % 5 > 0)
    order = Order(global_batch_size=8, seed=5, window_shards=3)
    digests = [
        hashlib.sha256(epoch_batches(examples, o, 2).astype("<i8").tobytes()).hexdigest()[:12]
        for o in (order, changed(order, group_by_length=True), changed(order, together=True))
    ]
    assert digests == ["8526010b5ca0", "a51b3f2724fd", "fe7856740c30"]


def test_epochs_and_seeds_give_other_orders():
    examples = make_examples([30] * 6)
    order = Order(global_batch_size=16, window_shards=3)
    first = epoch_batches(examples, order, 0)
    for other in (epoch_batches(examples, order, 1), epoch_batches(examples, changed(order, seed=1), 0)):
        assert (first[: len(other)] == other).mean() < 0.1


def test_a_window_of_all_shards_is_a_full_shuffle():
    examples = make_examples([100] * 20, conversations=1)
    batches = epoch_batches(examples, Order(global_batch_size=50, window_shards=20), 0)
    assert same_shard_pairs(batches, examples) == pytest.approx(1.0, abs=0.1)
    place = np.empty(len(examples))
    place[batches.ravel()] = np.arange(len(examples))
    assert np.abs(place - np.arange(len(examples))).mean() / len(examples) == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize("window", [1, 4, 16])
def test_a_window_mixes_its_shards_and_no_more_than_one_and_a_half_windows_are_in_use(window):
    examples = make_examples([50] * 100, conversations=1, text_share=0)
    batches = epoch_batches(examples, Order(global_batch_size=10, window_shards=window), 0)
    assert shards_in_use(batches, examples) <= 1.5 * window + 1
    assert same_shard_pairs(batches, examples) == pytest.approx(100 / window, rel=0.3)


def test_a_shard_is_fetched_and_finished_in_one_stretch_of_the_epoch():
    examples = make_examples([50] * 64, conversations=1, text_share=0)
    batches = epoch_batches(examples, Order(global_batch_size=16, window_shards=8), 0)
    first, last = use_of_shards(batches, examples, images=True)
    assert (last - first + 1).max() <= 1.2 * 8 * 50 / 16


def test_conversations_come_apart_or_together():
    examples = make_examples([40] * 4, conversations=3)
    order = Order(global_batch_size=1, window_shards=4)
    jumps = {
        together: int(
            (np.diff(examples.sample[epoch_batches(examples, changed(order, together=together), 0)[:, 0]]) != 0).sum()
        )
        for together in (True, False)
    }
    assert jumps[True] == len(np.unique(examples.sample)) - 1
    assert jumps[False] > 0.9 * (len(examples) - 1)


def test_grouping_by_length_keeps_modalities_apart_and_saves_most_of_the_padding():
    examples = make_examples([64] * 40)
    order = Order(global_batch_size=32)
    plain, grouped = (epoch_batches(examples, changed(order, group_by_length=g), 0) for g in (False, True))
    mixed = [len(set(examples.has_image[row].tolist())) > 1 for row in grouped]
    assert not any(mixed[:-2])
    waste = [
        padding_share(batches, examples.words, changed(order, group_by_length=g), ranks=2, rows=4)
        for g, batches in enumerate((plain, grouped))
    ]
    assert waste[1] < 0.2 * waste[0]


def test_padding_is_counted_by_hand():
    lengths = np.array([1, 2, 3, 4, 5, 6, 7])
    batches = np.array([[0, 1, 2, 3, 4, 5]])
    order = Order(global_batch_size=6)
    assert padding_share(batches, lengths, order) == pytest.approx(1 - 21 / 36)
    assert padding_share(batches, lengths, order, ranks=2) == pytest.approx(1 - 21 / (3 * 3 + 3 * 6))
    assert padding_share(batches, lengths, order, rows=4) == pytest.approx(1 - 21 / (4 * 4 + 2 * 6))
    dealt = changed(order, group_by_length=True)  # 1, 3, 5 and 2, 4, 6
    assert padding_share(batches, lengths, dealt, ranks=2) == pytest.approx(1 - 21 / (3 * 5 + 3 * 6))
    assert padding_share(batches, lengths, dealt, ranks=2, rows=2) == pytest.approx(1 - 21 / (2 * 3 + 5 + 2 * 4 + 6))


def test_batches_of_a_group_do_not_come_in_order_of_length():
    examples = make_examples([64] * 40, text_share=0)
    batches = epoch_batches(examples, Order(global_batch_size=32, group_by_length=True), 0)
    mean = examples.words[batches].mean(axis=1)
    assert abs(np.corrcoef(mean, np.arange(len(mean)))[0, 1]) < 0.4
    assert 0.3 < (np.diff(mean) > 0).mean() < 0.7


def test_no_rank_gets_the_long_examples_of_a_batch():
    examples = make_examples([64] * 40, text_share=0)
    order = Order(global_batch_size=32, group_by_length=True)
    batches = epoch_batches(examples, order, 0)
    words = [examples.words[batches[:, order.share(rank, 4)]] for rank in range(4)]
    assert words[0].mean() == pytest.approx(words[3].mean(), rel=0.02)
    for part in words:
        assert (np.diff(part[:-2], axis=1) <= 0).all()  # the longest first


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
def test_the_ranks_shares_are_the_whole_batch(ranks, grouped):
    order = Order(global_batch_size=12, group_by_length=grouped)
    parts = [np.arange(12)[order.share(rank, ranks)] for rank in range(ranks)]
    assert {len(part) for part in parts} == {12 // ranks}
    assert sorted(np.concatenate(parts)) == list(range(12))


def test_the_store_order_is_kept_without_shuffling():
    examples = make_examples([9, 9])
    batches = epoch_batches(examples, Order(global_batch_size=3, shuffle=False), 7)
    assert batches.ravel().tolist() == list(range(batches.size))


def test_fewer_examples_than_a_batch_are_dropped_or_repeated():
    examples = make_examples([3], conversations=1)
    assert epoch_batches(examples, Order(global_batch_size=8), 0).shape == (0, 8)
    padded = epoch_batches(examples, Order(global_batch_size=8, last_batch="pad"), 0)
    assert sorted(np.bincount(padded[0]).tolist()) == [2, 3, 3]
