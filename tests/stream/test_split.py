"""What is held out: a function of the seed and of names, the same in every store, on one side only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.manifest import read_store
from pipeline.schema import StoreSpec
from pipeline.shard import members
from pipeline.storage import Storage
from training.config import ValidationSettings
from training.stream.order import Order
from training.stream.reader import Reading
from training.stream.source import Side, Source, refuse_unlike
from training.stream.split import Split, draws
from training.stream.stream import Stream

Names = Callable[..., Path]


def split(**settings: object) -> Split:
    found = Split.of(ValidationSettings(**settings))
    assert found is not None
    return found


@pytest.fixture
def names(tmp_path: Path) -> Names:
    """names("a.jpg", ...): a file that lists them."""

    def write(*lines: str) -> Path:
        (tmp_path / "names.txt").write_text("\n".join(lines), encoding="utf-8")
        return tmp_path / "names.txt"

    return write


def open_side(store: Path, chosen: Split | None, held_out: bool = False, limit: int | None = None) -> Stream:
    order = Order(global_batch_size=4, shuffle=False, last_batch="pad")
    side = Side(chosen, held_out, limit)
    return Stream([Source(str(store))], ("block03",), order, Reading(), lambda _: {}, side)


def seen(stream: Stream) -> set[str]:
    """The keys of the samples, which tell an image from text: every fifth is text."""
    return {key.partition("#")[0] for batch in stream for key in batch["keys"]}


def test_the_draw_of_a_name_stays_what_it_was_when_this_test_was_written():
    assert draws(["coco/1.jpg", "größe.png", None], 3).round(12).tolist() == [0.243374105179, 0.597435094291, 1.0]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_each_image_and_each_text_is_on_one_side(store: Path, share: float) -> None:
    chosen = split(share=share)
    kept, out = (seen(open_side(store, chosen, held_out)) for held_out in (False, True))
    assert not kept & out
    assert kept | out == seen(open_side(store, None))
    drawn = {key: draws([f"{key}-0" if int(key) % 5 == 0 else f"{int(key)}.jpg"], 0)[0] for key in kept | out}
    assert out == {key for key, number in drawn.items() if number < share}


def test_the_same_image_falls_on_the_same_side_in_another_store(
    store: Path, make_store: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_store(tmp_path, [20, 30])
    there, here = (open_side(folder, split(share=0.4, seed=2), True).images() for folder in (other, store))
    common = open_side(store, None).images()
    assert there & common == here


def test_a_larger_share_holds_out_more_and_another_seed_others(store: Path) -> None:
    few, more, others = (
        open_side(store, split(share=share, seed=seed), True).images() for share, seed in ((0.3, 0), (0.6, 0), (0.3, 1))
    )
    assert few < more
    assert few != others


def test_a_list_holds_out_images_and_text_by_name(store: Path, names: Names) -> None:
    chosen = split(names=str(names("  3.jpg", "", "000000005-0", "7.jpg")))
    assert seen(open_side(store, chosen, True)) == {"000000003", "000000005", "000000007"}
    assert open_side(store, chosen).images() == open_side(store, None).images() - {"3.jpg", "7.jpg"}


def test_records_are_read_only_where_their_ids_are_needed(store: Path, names: Names, tmp_path: Path) -> None:
    for name in ("store.json", "manifest.parquet"):
        (tmp_path / name).symlink_to(store / name)
    assert open_side(tmp_path, split(names=str(names("3.jpg"))), True).images() == {"3.jpg"}
    with pytest.raises(FileNotFoundError):
        open_side(tmp_path, split(share=0.5))


def test_a_limit_takes_always_the_same_examples_whole_images_first(store: Path) -> None:
    whole = open_side(store, split(share=0.5), True)
    limited = {n: [k for b in open_side(store, split(share=0.5), True, n) for k in b["keys"]] for n in (4, 8, 10**6)}
    assert len(limited[4]) == 4
    assert set(limited[4]) < set(limited[8]) < set(limited[10**6])
    assert len(set(limited[10**6])) == len(whole.examples)
    assert len(open_side(store, Split.whole(0), True, 5).examples) == 5


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_that_only_fill_the_last_batch_are_told(store: Path, limit: int, ranks: int) -> None:
    order = Order(global_batch_size=4, shuffle=False, last_batch="pad")
    side = Side(split(share=0.5), True, limit)
    counted: list[str] = []
    for rank in range(ranks):
        stream = Stream([Source(str(store))], (), order, Reading(rank=rank, world_size=ranks), lambda _: {}, side)
        batches = [batch["keys"] for batch in stream]
        batches[-1] = [key for key, fill in zip(batches[-1], stream.filling(), strict=True) if not fill]
        counted += [key for batch in batches for key in batch]
    assert len(counted) == len(set(counted)) == limit


def test_a_position_belongs_to_its_split(store: Path, names: Names, tmp_path: Path) -> None:
    plain = open_side(store, None)
    assert "held_out" not in plain.state_dict(4, True)
    kinds = [None, split(share=0.5), split(share=0.5, seed=1), split(share=0.4), split(names=str(names("3.jpg")))]
    for theirs in kinds:
        state = open_side(store, theirs).state_dict(4, True)
        for mine in kinds:
            if mine == theirs:
                open_side(store, mine).load_state_dict(state)
            else:
                with pytest.raises(ValueError, match="held_out"):
                    open_side(store, mine).load_state_dict(state)
    moved = (tmp_path / "names.txt").rename(tmp_path / "moved.txt")
    assert split(names=str(moved)).identity == kinds[-1].identity


def test_what_cannot_be_split_is_said(store: Path, names: Names, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"share=1e-09 leaves nothing held out: 0 of \d+ examples \(0 of 39 ima"):
        open_side(store, split(share=1e-9))
    with pytest.raises(ValueError, match=r"leaves nothing left to learn from: (\d+) of \1 examples"):
        open_side(store, split(share=1 - 1e-9))
    unknown = names("3.jpg", "b.jpg", "a.jpg", "c.jpg", "d.jpg")
    with pytest.raises(ValueError, match=r"4 of 5 names in .*names.txt are .*: 'a.jpg', 'b.jpg', 'c.jpg', ...; write"):
        open_side(store, split(names=str(unknown)))
    with pytest.raises(ValueError, match=r"names.txt names nothing"):
        split(names=str(names("", " ")))
    with pytest.raises(ValueError, match=r"none.txt does not exist; give"):
        split(names=str(tmp_path / "none.txt"))
    for other in (str(tmp_path), "/", "", "http://host/names"):
        with pytest.raises(ValueError, match=r"data.validation.names: .* is no file that can be read .*; give a text"):
            split(names=other)
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"names.txt is not UTF-8"):
        split(names=str(tmp_path / "names.txt"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "give one of share, names and store; none of them is there"),
        ({"share": 0.1, "store": "x"}, "share and store is there"),
        ({"share": 0}, "greater than 0"),
        ({"share": 1}, "less than 1"),
        ({"share": 0.1, "interval": "0ba"}, "interval"),
        ({"share": 0.1, "patience": 0}, "patience"),
        ({"share": 0.1, "questions": "q.json"}, "questions is given and images is not; give both"),
        ({"share": 0.1, "images": "q"}, "images is given and questions is not; give both"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ValidationSettings(**settings)


def test_a_damaged_record_is_named(make_store: Callable[..., Path], tmp_path: Path) -> None:
    store = make_store(tmp_path, [9], text_every=5)
    path = store / "samples" / "00000.tar"
    with path.open("rb") as file:
        places = {name: (start, size) for name, start, size in members(file)}
    data = bytearray(path.read_bytes())
    start, size = places["000000005.json"]
    data[start : start + size] = b"x" * size
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"000000005.json in samples/00000.tar of .*: not a sample's record"):
        open_side(store, split(share=0.5))


def told(store: Path) -> tuple[str, StoreSpec]:
    """The place of a store, and what it says of itself."""
    return str(store), read_store(Storage(store))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codec": "fp16"}, "codec: bf16 and fp16"),
        ({"aspect": "square"}, "aspect: pad and square"),
        ({"encoder": {"revision": "1"}}, "encoder: clip 0 and clip 1"),
        ({"columns": []}, "column block03: 4 x 8 and missing"),
    ],
)
def test_a_store_of_other_features_is_refused_with_both_values(
    make_store: Callable[..., Path], tmp_path: Path, change: dict, words: str
) -> None:
    first, other = make_store(tmp_path / "a", [2]), make_store(tmp_path / "b", [2])
    refuse_unlike(told(first), told(other), ("block03",))
    spec = json.loads((other / "store.json").read_text())
    change = {name: {**spec[name], **v} if isinstance(v, dict) else v for name, v in change.items()}
    (other / "store.json").write_text(json.dumps(spec | change))
    with pytest.raises(ValueError, match=f"{first} and {other} do not go together: {words}; build one"):
        refuse_unlike(told(first), told(other), ("block03",))


def test_draws_are_even() -> None:
    numbers = draws([f"{i}.jpg" for i in range(4000)], 0)
    assert np.abs(np.histogram(numbers, 10, (0, 1))[0] / 4000 - 0.1).max() < 0.02
