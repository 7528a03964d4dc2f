"""The stream: the same global batches whatever the ranks and threads, exact resumption, and what a batch holds."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fixtures.batches import joined
from pipeline.manifest import shards_of
from pipeline.storage import Storage
from training.stream.batch import Batch, split
from training.stream.order import Order
from training.stream.reader import Collate, Reading
from training.stream.source import Source
from training.stream.stream import Stream
from training.text.collate import Example

COLUMNS = ("block03", "cls23")


def lengths(examples: list[Example]) -> dict[str, torch.Tensor]:
    """A stand-in for the text side that keeps its shapes: as many tokens as words, padded on the right."""
    counts = torch.tensor([sum(len(t.value.split()) for t in e.conversation.turns) for e in examples])
    mask = (torch.arange(int(counts.max()))[None] < counts[:, None]).long()
    return {"input_ids": mask * counts[:, None], "labels": mask * counts[:, None], "attention_mask": mask}


def open_stream(
    store: Path, columns: tuple[str, ...] = COLUMNS, collate: Collate = lengths, **settings: object
) -> Stream:
    """A stream whose settings are those of its order and of its reading."""
    order = {"global_batch_size": 8, "window_shards": 3, **settings}
    order = {name: value for name, value in order.items() if name in Order.model_fields}
    reading = {name: value for name, value in settings.items() if name in Reading.model_fields}
    assert order.keys() | reading.keys() >= settings.keys()
    return Stream([Source(str(store))], columns, Order(**order), Reading(**reading), collate)


def epoch_keys(stream: Stream) -> list[list[str]]:
    return [batch["keys"] for batch in stream]


def global_batches(store: Path, ranks: int, **settings: object) -> list[list[str]]:
    streams = [open_stream(store, rank=rank, world_size=ranks, **settings) for rank in range(ranks)]
    return joined([epoch_keys(stream) for stream in streams], streams[0])


ORDERS = [{}, {"together": True}, {"group_by_length": True}, {"shuffle": False}, {"last_batch": "pad"}, {"limit": 30}]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_any_number_of_ranks_sees_the_same_global_batches(store: Path, ranks: int, order: dict) -> None:
    assert global_batches(store, ranks, **order) == global_batches(store, 1, **order)


def test_three_ranks_see_the_same_global_batches(store: Path) -> None:
    assert global_batches(store, 3, global_batch_size=6) == global_batches(store, 1, global_batch_size=6)


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (2, 3), (3, 1), (4, 2)])
def test_threads_and_prefetch_change_nothing(store: Path, threads: int, prefetch: int) -> None:
    def read(**settings: int) -> list[Batch]:
        return [clone(batch) for batch in open_stream(store, **settings)]

    for mine, other in zip(read(threads=threads, prefetch=prefetch), read(), strict=True):
        assert mine["keys"] == other["keys"]
        assert torch.equal(mine["labels"], other["labels"])
        assert all(torch.equal(mine["columns"][name], other["columns"][name]) for name in COLUMNS)


def clone(batch: Batch) -> Batch:
    copied = Batch(batch)
    copied["columns"] = {name: tensor.clone() for name, tensor in batch["columns"].items()}
    return copied


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_image_lies_beside_its_own_example(
    store: Path, features: Callable[[str, str], bytes], order: dict
) -> None:
    for batch in open_stream(store, **order):
        keys = [batch["keys"][row].split("#")[0] for row in batch["image_rows"]]
        assert keys == [key for key in (k.split("#")[0] for k in batch["keys"]) if int(key) % 5]
        for name in COLUMNS:
            assert [bytes(row.numpy()) for row in batch["columns"][name]] == [features(name, key) for key in keys]


def test_examples_are_the_conversations_of_the_records(store: Path) -> None:
    seen: dict[str, Example] = {}

    def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
        seen.update((example.key, example) for example in examples)
        return {}

    list(open_stream(store, collate=collate, last_batch="pad"))
    assert len(seen) == len(open_stream(store).examples)
    for key, example in seen.items():
        sample, number = key.split("#")
        assert example.conversation.id == f"{sample}-{number}"
        assert example.has_image == bool(int(sample) % 5)


def test_an_epoch_visits_each_example_once_and_drops_less_than_a_batch(store: Path) -> None:
    stream = open_stream(store)
    keys = [key for batch in stream for key in batch["keys"]]
    assert len(set(keys)) == len(keys) == len(stream) * 8
    assert 0 < len(stream.examples) - len(keys) < 8


def test_a_padded_epoch_visits_every_example_and_repeats_less_than_a_batch(store: Path) -> None:
    stream = open_stream(store, last_batch="pad")
    keys = [key for batch in stream for key in batch["keys"]]
    assert len(set(keys)) == len(stream.examples)
    assert 0 < len(keys) - len(set(keys)) < 8


def test_epochs_differ_and_seeds_differ(store: Path) -> None:
    stream = open_stream(store)
    first, second = epoch_keys(stream), epoch_keys(stream)
    assert first != second
    assert first != epoch_keys(open_stream(store, seed=1))
    assert first == epoch_keys(open_stream(store))


@pytest.mark.parametrize(
    ("order", "ranks"),
    [
        *product([{}, {"group_by_length": True}, {"last_batch": "pad"}], [1, 2, 4, 8]),
        ({"global_batch_size": 12}, 3),
    ],
    ids=str,
)
def test_resuming_at_every_batch_is_exact_on_any_number_of_ranks(store: Path, ranks: int, order: dict) -> None:
    whole = open_stream(store, **order)
    expected = [epoch_keys(whole) for _ in range(2)]
    saved = open_stream(store, rank=0, world_size=2, **order)
    states = [saved.state_dict(0, True)]
    states += [saved.state_dict((i + 1) * whole.global_batch_size, True) for i, _ in enumerate(saved)]
    for done, state in enumerate(states):
        streams = [open_stream(store, rank=rank, world_size=ranks, **order) for rank in range(ranks)]
        for stream in streams:
            stream.load_state_dict(state)
        parts = [[epoch_keys(stream) for stream in streams] for _ in range(2)]
        rest = [joined(part, streams[0]) for part in parts]
        assert rest == [expected[0][done:], expected[1]]


def test_a_resumed_run_reads_nothing_that_was_consumed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_stream(store)
    stream.load_state_dict(stream.state_dict(3 * 8, True))
    read: list[int] = []
    (tars,) = stream._reader.tars
    reader = tars.read_into
    monkeypatch.setattr(tars, "read_into", lambda *a: (read.append(a[1]), reader(*a))[1])
    list(stream)
    rest = stream.examples.sample[stream.epoch_batches(0)[3:]]
    records = sum(len(set(row)) for row in rest.tolist())
    images = sum(len({s for s in row if s % 5}) for row in rest.tolist())
    assert len(read) == records + images * len(COLUMNS)


def test_a_state_between_epochs_begins_the_next_one(store: Path) -> None:
    stream = open_stream(store)
    epoch_keys(stream)
    state = stream.state_dict(0, True)
    assert (state["epoch"], state["samples"]) == (1, 0)
    other = open_stream(store)
    other.load_state_dict(state)
    assert epoch_keys(other) == epoch_keys(stream)


def test_positions_count_from_the_last_resume_if_asked(store: Path) -> None:
    stream = open_stream(store)
    stream.load_state_dict(stream.state_dict(16, True))
    next(iter(stream))
    assert stream.state_dict(8, False)["samples"] == stream.state_dict(24, True)["samples"] == 24


@pytest.mark.parametrize(
    ("setting", "value"),
    [("seed", 3), ("global_batch_size", 4), ("window_shards", 2), ("together", True), ("limit", 20)],
)
def test_a_state_of_another_order_is_refused_by_name(store: Path, setting: str, value: object) -> None:
    state = open_stream(store).state_dict(8, True)
    with pytest.raises(ValueError, match=setting):
        open_stream(store, **{setting: value}).load_state_dict(state)


def test_a_position_holds_the_keys_that_checkpoints_of_before_hold(store: Path) -> None:
    stream = open_stream(store, limit=30, last_batch="pad")
    before = {
        "epoch": 1,
        "samples": 16,
        "fingerprint": stream.fingerprint,
        "global_batch_size": 8,
        "seed": 0,
        "shuffle": True,
        "window_shards": 3,
        "group_by_length": False,
        "together": False,
        "last_batch": "pad",
        "limit": 30,
    }
    stream.load_state_dict(before)
    assert stream.state_dict(0, False) == before


def test_a_state_of_another_store_is_refused(store: Path, make_store: Callable[..., Path], tmp_path: Path) -> None:
    other = make_store(tmp_path, [9, 9])
    with pytest.raises(ValueError, match="fingerprint"):
        open_stream(other).load_state_dict(open_stream(store).state_dict(8, True))


def test_only_wanted_columns_are_opened(store: Path, tmp_path: Path) -> None:
    for name in ("store.json", "manifest.parquet", "samples", "cls23", "commits"):
        (tmp_path / name).symlink_to(store / name)  # no block03 at all
    for batch in open_stream(tmp_path, columns=("cls23",)):
        assert list(batch["columns"]) == ["cls23"]


def test_together_reads_an_image_once_for_its_conversations(store: Path) -> None:
    stream = open_stream(store, together=True, last_batch="pad")
    order = stream.examples.sample[stream.epoch_batches(0).ravel()][: len(stream.examples) // 8 * 8]
    changes = 1 + int((np.diff(order) != 0).sum())
    assert changes == len(set(order.tolist()))


def test_batches_grouped_by_length_hold_one_modality_but_for_the_last(store: Path) -> None:
    stream = open_stream(store, group_by_length=True, global_batch_size=4)
    mixed = [len({bool(int(key.split("#")[0]) % 5) for key in keys}) > 1 for keys in epoch_keys(stream)]
    assert not any(mixed[:-2])


def test_microbatches_hold_their_own_images_and_no_needless_padding(store: Path) -> None:
    whole = next(iter(open_stream(store)))
    parts = split(whole, 3)
    assert [key for part in parts for key in part["keys"]] == whole["keys"]
    assert [len(part["keys"]) for part in parts] == [3, 3, 2]
    rows = torch.cat([part["image_rows"] + 3 * i for i, part in enumerate(parts)])
    assert torch.equal(rows, whole["image_rows"])
    for name in COLUMNS:
        assert torch.equal(torch.cat([part["columns"][name] for part in parts]), whole["columns"][name])
    for i, part in enumerate(parts):
        width = part["attention_mask"].shape[1]
        assert part["attention_mask"].any(dim=0).all()
        assert torch.equal(part["labels"], whole["labels"][3 * i : 3 * i + 3, :width])


def test_a_batch_is_deep_copied_without_copying_features(store: Path) -> None:
    batch = next(iter(open_stream(store)))
    copied = copy.deepcopy(batch)
    assert isinstance(copied, Batch)
    assert copied["columns"]["block03"].data_ptr() == batch["columns"]["block03"].data_ptr()
    copied["labels"] = None
    assert batch["labels"] is not None


def test_it_works_in_a_dataloader_and_on_composers_device_map(store: Path) -> None:
    from composer.devices import DeviceCPU

    stream = open_stream(store)
    loader = DataLoader(stream, batch_size=None, num_workers=0, collate_fn=lambda batch: batch)
    assert len(loader) == len(stream)
    for batch in loader:
        moved = DeviceCPU().batch_to_device(batch)
        assert moved["keys"] == batch["keys"]
        assert torch.equal(moved["columns"]["cls23"], batch["columns"]["cls23"])


def test_features_stay_valid_until_the_next_batch_is_asked_for(store: Path) -> None:
    for batch in open_stream(store, prefetch=1, threads=2):
        before = batch["columns"]["block03"].clone()
        torch.arange(200_000).sum()  # the reader goes on meanwhile
        assert torch.equal(batch["columns"]["block03"], before)


def test_a_broken_off_iteration_leaves_the_stream_usable(store: Path) -> None:
    stream = open_stream(store)
    next(iter(stream))
    assert epoch_keys(stream) == [
        [f"{stream._index.keys[stream.examples.sample[i]]}#{stream.examples.conversation[i]}" for i in row]
        for row in stream.epoch_batches(1)
    ]


def test_memory_is_bounded_by_prefetch_not_by_the_window(store: Path) -> None:
    for window in (1, 6):
        stream = open_stream(store, window_shards=window, prefetch=2)
        list(stream)
        assert len(stream._reader._free) == 3


def test_batches_ahead_that_no_memory_holds_are_refused_before_it_is_taken(store: Path) -> None:
    with pytest.raises(ValueError, match=r"no memory for 1000000001 batches of .* GB \(prefetch 1000000000, "):
        open_stream(store, prefetch=10**9)


def test_threads_beyond_the_samples_of_a_batch_cost_nothing(store: Path) -> None:
    assert epoch_keys(open_stream(store, threads=10**9)) == epoch_keys(open_stream(store, threads=1))


def test_a_truncated_tar_is_named(make_store: Callable[..., Path], tmp_path: Path) -> None:
    store = make_store(tmp_path, [9, 9])
    path = store / "block03" / "00001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=f"block03/00001.tar of {store} ends at byte"):
        list(open_stream(store))


def test_a_missing_tar_is_named(make_store: Callable[..., Path], tmp_path: Path) -> None:
    store = make_store(tmp_path, [9, 9])
    (store / "cls23" / "00000.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"cls23/00000.tar"):
        list(open_stream(store))


def test_an_error_of_the_text_side_reaches_the_consumer(store: Path) -> None:
    def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
        raise RuntimeError("no such template")

    with pytest.raises(RuntimeError, match="no such template"):
        list(open_stream(store, collate=collate))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"columns": ("block09",)}, "no columns block09; it has block03, cls23"),
        ({"world_size": 3}, "no equal share"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"threads": 0}, r"threads\n  Input should be greater than 0"),
        ({"window_shards": 0}, r"window_shards\n  Input should be greater than 0"),
        ({"together": True, "group_by_length": True}, "choose one"),
        ({"last_batch": "keep"}, r"last_batch\n  Input should be 'drop' or 'pad'"),
    ],
)
def test_impossible_settings_are_refused(store: Path, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_stream(store, **settings)


def test_the_wait_for_data_is_measured(store: Path) -> None:
    stream = open_stream(store)
    before = time.perf_counter()
    for _ in stream:
        assert 0 <= stream.data_wait <= time.perf_counter() - before
        before = time.perf_counter()


def test_a_run_keeps_the_shards_that_it_began_with(
    store: Path, grown: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """`build_shards.py --retry-failed` adds shards at the end; the run's order, fingerprint and position stay."""
    before, after = grown(store, tmp_path)
    first = open_stream(before)
    known = shards_of(Storage(after), first.fingerprint)
    assert known == 5
    order = Order(global_batch_size=8, window_shards=3)
    resumed = Stream([Source(str(after), known)], COLUMNS, order, Reading(), lengths)
    assert resumed.fingerprint == first.fingerprint
    assert epoch_keys(resumed) == epoch_keys(first)
    resumed.load_state_dict(first.state_dict(8, True))
    assert len(open_stream(after).examples) > len(first.examples)
    with pytest.raises(ValueError, match="fingerprint"):
        open_stream(after).load_state_dict(first.state_dict(8, True))
