"""The order of an epoch: every example once, a pure function of its settings, well mixed, local, the same for ever."""

from __future__ import annotations

import hashlib
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from training.config import DataSettings
from training.stream.measures import padding_share, same_shard_pairs, shards_in_use, use_of_shards
from training.stream.order import (
    Examples,
    Order,
    assigned,
    batches_per_epoch,
    due_of,
    epoch_batches,
    epoch_of,
    filtered,
    grouped,
    one_after_another,
    shuffled,
    weighed,
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
        store=np.zeros_like(sample),
    )


def mixed(*stores: list[int]) -> Examples:
    """The examples of several stores, each with these shards."""
    parts = [make_examples(shards) for shards in stores]
    samples = np.cumsum([0, *(sum(shards) for shards in stores)])
    first = np.cumsum([0, *(len(shards) for shards in stores)])
    return one_after_another(parts, samples, first)


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
    assert batches.shape == (batches_per_epoch(examples, order), order.global_batch_size)
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
    examples = Examples(number // 2, number % 2, number // 40, number * 37 % 101, number // 2 % 5 > 0, 0 * number)
    order = Order(global_batch_size=8, seed=5, window_shards=3)
    digests = [
        hashlib.sha256(epoch_batches(examples, o, 2).astype("<i8").tobytes()).hexdigest()[:12]
        for o in (order, changed(order, group_by_length=True), changed(order, together=True))
    ]
    assert digests == ["8526010b5ca0", "a51b3f2724fd", "fe7856740c30"]


def test_all_orders_without_mixture_and_groups_stay_what_they_were():
    number = np.arange(150)
    examples = Examples(number // 2, number % 2, number // 40, number * 37 % 101, number // 2 % 5 > 0, 0 * number)
    digest = hashlib.sha256()
    kinds = ({}, {"group_by_length": True}, {"together": True})
    for seed, window, size, kind, last, shuffle, epoch in product(
        (0, 7, 2**40), (1, 3, 16), (1, 8, 200), kinds, ("drop", "pad"), (True, False), (0, 3)
    ):
        settings = {"seed": seed, "window_shards": window, "last_batch": last, "shuffle": shuffle, **kind}
        order = Order(global_batch_size=size, **settings)
        digest.update(epoch_batches(examples, order, epoch).astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "0f619ac51ccd4ee8"


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


# Filter, assign, weigh, shuffle, group: each step by itself, and together in a mixture.

mixtures = st.builds(
    lambda order, shares, kind: changed(order, **{kind: tuple(shares)}),
    st.builds(
        lambda order, groups, parts: changed(order, groups=groups, global_batch_size=groups * parts),
        orders,
        st.integers(1, 3),
        st.integers(1, 4),
    ),
    st.lists(st.floats(0.05, 3), min_size=2, max_size=2),
    st.sampled_from(["weights", "epochs"]),
)


def test_a_limit_keeps_the_first_examples_of_each_store():
    examples = mixed([5, 6], [7])
    found = filtered(examples, 9)
    assert np.bincount(found.store).tolist() == [9, 9]
    for store in (0, 1):
        assert found.sample[found.store == store].tolist() == examples.sample[examples.store == store][:9].tolist()
    assert filtered(examples, None) is examples


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
def test_groups_are_equal_parts_of_each_store_and_share_only_the_shards_at_a_cut(groups):
    examples = mixed([9, 20, 3, 14, 8, 8, 9, 20], [30] * 8)
    order = Order(global_batch_size=24, groups=groups, seed=3)
    parts = assigned(examples, order)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(examples)))
    for store in (0, 1):
        counts = [int((examples.store[part] == store).sum()) for part in parts]
        assert max(counts) - min(counts) <= 1
    shards = [set(examples.shard[part].tolist()) for part in parts]
    assert sum(map(len, shards)) <= 16 + 2 * (groups - 1)
    for part, again in zip(parts, assigned(examples, order), strict=True):
        assert part.tolist() == again.tolist()
    if groups > 1:
        assert any(
            part.tolist() != other.tolist()
            for part, other in zip(parts, assigned(examples, changed(order, seed=4)), strict=True)
        )


@given(st.lists(shard_lists, min_size=2, max_size=2), mixtures)
@settings(max_examples=60)
def test_each_example_has_come_as_often_as_it_is_due_after_every_epoch(stores, order):
    examples = mixed(*stores)
    seen = np.zeros(len(examples), dtype=int)
    members = np.arange(len(examples))
    for epoch in range(5):
        seen += np.bincount(weighed(examples, members, order, epoch)[0], minlength=len(examples))
        for store, (there, due) in enumerate(due_of(examples, order)):
            of_it = seen[examples.store == store]
            assert of_it.sum() == (epoch + 1) * due
            assert of_it.min() == (epoch + 1) * due // there
            assert of_it.max() == -(-(epoch + 1) * due // there)


@given(st.lists(shard_lists, min_size=2, max_size=2), mixtures, st.integers(0, 50))
@settings(max_examples=60)
def test_an_epoch_of_a_mixture_holds_what_is_due_but_for_its_last_batch(stores, order, epoch):
    examples = mixed(*stores)
    found = epoch_of(examples, order, epoch)
    assert found.batches.shape == (batches_per_epoch(examples, order), order.global_batch_size)
    seen = np.bincount(found.rows.ravel(), minlength=len(found.examples))
    # Each group may have one example more of each store, as often as it comes, and fills or drops parts by itself.
    due = due_of(examples, order)
    assume(min(there for there, _ in due) >= order.groups)  # else refused
    more = sum(-(-chosen // there) + 1 for there, chosen in due)
    slack = order.groups * (order.part + more)
    if order.last_batch == "drop" or not len(found.rows):
        assert seen.max(initial=0) <= 1
        assert len(found.rows) == 0 or len(seen) - seen.sum() <= slack
    else:
        assert seen.min() >= 1
        assert seen.sum() - len(seen) <= slack


@given(st.lists(shard_lists, min_size=2, max_size=2), mixtures)
@settings(max_examples=40)
def test_each_part_of_a_batch_comes_from_its_own_group_in_every_epoch(stores, order):
    examples = mixed(*stores)
    group = np.empty(len(examples), dtype=int)
    for number, members in enumerate(assigned(examples, order)):
        group[members] = number
    for epoch in range(3):
        batches = epoch_batches(examples, order, epoch)
        assert (group[batches] == np.repeat(np.arange(order.groups), order.part)).all()


def test_weights_are_shares_of_an_epoch_and_epochs_are_repetitions():
    examples = mixed([30] * 4, [30] * 12)
    n = len(examples)
    order = Order(global_batch_size=8)
    (_, first), (_, second) = due_of(examples, changed(order, weights=(3.0, 1.0)))
    assert (first, second) == (round(n * 0.75), round(n * 0.25))
    assert changed(order, weights=(0.75, 0.25)).weights != (3.0, 1.0)
    assert (
        epoch_batches(examples, changed(order, weights=(0.75, 0.25)), 2).tolist()
        == epoch_batches(examples, changed(order, weights=(3.0, 1.0)), 2).tolist()
    )
    found = epoch_of(examples, changed(order, epochs=(2.0, 0.5), last_batch="pad"), 1)
    counts = np.bincount(found.index, minlength=n)
    assert (counts[examples.store == 0] == 2).all()
    assert set(counts[examples.store == 1].tolist()) == {0, 1}


def test_a_small_weight_touches_few_shards_and_a_shard_that_comes_twice_is_two():
    examples = mixed([30] * 20, [30] * 20)
    order = Order(global_batch_size=8, epochs=(0.1, 2.0))
    index, shard = weighed(examples, np.arange(len(examples)), order, 3)
    assert len(set(examples.shard[index][examples.store[index] == 0].tolist())) <= 3
    assert len(set(shard[examples.store[index] == 1].tolist())) == 40
    found = epoch_of(examples, changed(order, window_shards=4), 3)
    assert shards_in_use(found.rows, found.examples) <= 1.5 * 4 + 1


def test_a_store_that_comes_very_often_needs_no_more_memory_than_its_examples():
    examples = mixed([30] * 8, [1])
    order = Order(global_batch_size=8, weights=(1e-9, 1.0), seed=1)
    found = epoch_of(examples, order, 2)
    assert set(found.examples.store.tolist()) == {1}
    assert found.examples.shard.max() < len(examples)


def test_each_store_once_is_the_order_of_all_their_examples():
    examples = mixed([9, 7], [12])
    once = {"stores": [{"store": "a"}, {"store": "b"}], "template": "v1"}
    plain = Order.of(DataSettings.model_validate(once), 8)
    assert plain == Order(global_batch_size=8)
    assert plain.identity() == Order(global_batch_size=8).model_dump(exclude={"groups", "weights", "epochs"})
    forced = changed(plain, epochs=(1.0, 1.0))
    assert epoch_batches(examples, forced, 4).tolist() == epoch_batches(examples, plain, 4).tolist()


def test_shuffling_and_grouping_put_what_is_due_in_order_and_change_nothing_else():
    examples = mixed([9, 7], [12])
    order = Order(global_batch_size=4, group_by_length=True)

    def draw(purpose: int, count: int) -> np.ndarray:
        return np.random.default_rng(purpose).random(count)

    sequence = shuffled(examples, order, draw)
    assert sorted(sequence.tolist()) == list(range(len(examples)))
    assert sorted(grouped(sequence, examples, 4, draw).tolist()) == list(range(len(examples)))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 12])
def test_ranks_that_hold_whole_groups_need_no_other(ranks, groups, grouped):
    order = Order(global_batch_size=24, groups=groups, group_by_length=grouped)
    parts = [np.arange(24)[order.share(rank, ranks)] for rank in range(ranks)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(24))
    assert {len(part) for part in parts} == {24 // ranks}
    if ranks % groups == 0 or groups % ranks == 0:
        touched = [set((part // order.part).tolist()) for part in parts]
        assert {len(some) for some in touched} == {max(1, groups // ranks)}


def test_groups_that_do_not_divide_a_batch_are_refused():
    with pytest.raises(ValueError, match="3 groups have no equal part of 8 examples"):
        Order(global_batch_size=8, groups=3)
