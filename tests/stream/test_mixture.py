"""Several stores as one: the same global batches on any ranks, exact resumption, each example with its own store."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
import torch
from pydantic import ValidationError

from fixtures.batches import joined
from pipeline.config import ConfigError, load_config
from training.config import DataSettings, TrainConfig, ValidationSettings
from training.stream.order import Order
from training.stream.reader import Collate, Reading
from training.stream.source import EVERY, Side, Source
from training.stream.split import Split
from training.stream.stream import Stream
from training.text.collate import Example

FIRST = 500  # the number of the second store's first sample
ORDERS = [
    {"epochs": (1.5, 0.5)},
    {"weights": (1.0, 4.0)},
    {"weights": (2.0, 1.0), "group_by_length": True},
    {"epochs": (2.0, 1.0), "together": True, "last_batch": "pad"},
    {"groups": 2},
    {"groups": 3, "weights": (1.0, 1.0), "group_by_length": True, "last_batch": "pad"},
    {"groups": 4, "epochs": (0.7, 2.0), "together": True},
    {"weights": (1.0, 3.0), "shuffle": False, "limit": 25},
]


@pytest.fixture(scope="module")
def stores(make_store: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two: of 39 and of 60 samples, every fifth of which has no image."""
    folder = tmp_path_factory.mktemp("stores")
    return [
        make_store(folder / "a", [9, 4, 9, 7, 1, 9], text_every=5),
        make_store(folder / "b", [12] * 5, text_every=5, first=FIRST),
    ]


def open_mixture(
    stores: list[Path] | list[str],
    rank: int = 0,
    ranks: int = 1,
    collate: Collate = lambda examples: {},
    side: Side = EVERY,
    **order: object,
) -> Stream:
    settings = Order(**{"global_batch_size": 24, "window_shards": 3, **order})
    sources = [Source(str(store)) for store in stores]
    return Stream(sources, ("block03",), settings, Reading(rank=rank, world_size=ranks, threads=2), collate, side)


def keys_of(stream: Stream) -> list[list[str]]:
    return [batch["keys"] for batch in stream]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_resuming_at_every_batch_is_exact_on_any_number_of_ranks(stores: list[Path], order: dict) -> None:
    whole = open_mixture(stores, **order)
    expected = [keys_of(whole) for _ in range(3)]
    assert {len(epoch) for epoch in expected} == {len(whole)}
    saved = open_mixture(stores, 1, 2, **order)
    list(saved)
    for ranks in (1, 2, 3, 4, 8):
        streams = [open_mixture(stores, rank, ranks, **order) for rank in range(ranks)]
        for done in range(len(whole) + 1):
            state = json.loads(json.dumps(saved.state_dict(done * 24, True) | {"epoch": 1}))
            for stream in streams:
                stream.load_state_dict(state)
            parts = [[keys_of(stream) for stream in streams] for _ in range(2)]
            assert [joined(part, streams[0]) for part in parts] == [expected[1][done:], expected[2]]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_example_lies_beside_its_own_features(
    stores: list[Path], features: Callable[[str, str], bytes], order: dict
) -> None:
    seen: dict[str, Example] = {}

    def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
        seen.update((example.key, example) for example in examples)
        return {}

    for batch in open_mixture(stores, collate=collate, **order):
        assert batch["stores"].tolist() == [int(key[5]) for key in batch["keys"]]
        keys = [batch["keys"][row].partition(":")[2].partition("#")[0] for row in batch["image_rows"]]
        assert [bytes(row.numpy()) for row in batch["columns"]["block03"]] == [features("block03", key) for key in keys]
    for key, example in seen.items():
        store, _, sample = key.partition(":")
        assert store == f"store{example.store}"
        assert example.conversation.id == sample.replace("#", "-")
        assert (int(sample[:9]) >= FIRST) == (example.store == 1)


def test_one_store_has_keys_and_batches_as_ever(stores: list[Path]) -> None:
    batch = next(iter(open_mixture(stores[:1])))
    assert "stores" not in batch
    assert not batch["keys"][0].startswith("store")


def test_each_store_comes_as_often_as_its_weight_says(stores: list[Path]) -> None:
    stream = open_mixture(stores, weights=(1.0, 3.0))
    (there, due), (others, more) = stream.due()
    assert there + others == len(stream.examples)
    assert (due, more) == (round((there + others) / 4), round((there + others) * 3 / 4))
    seen = Counter(key[:6] for _ in range(12) for keys in keys_of(stream) for key in keys)
    assert seen["store0"] / seen.total() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_no_held_out_image_is_learned_from(stores: list[Path], order: dict) -> None:
    split = Split.of(ValidationSettings(share=0.3))
    held = open_mixture(stores, side=Side(split, held_out=True), shuffle=False, last_batch="pad")
    learned = open_mixture(stores, side=Side(split), **order)
    out = {key.partition("#")[0] for keys in keys_of(held) for key in keys}
    seen = {key.partition("#")[0] for _ in range(3) for keys in keys_of(learned) for key in keys}
    assert out
    assert not out & seen
    assert not held.images() & learned.images()


def test_an_image_of_two_stores_falls_on_one_side(
    make_store: Callable[..., Path], stores: list[Path], tmp_path: Path
) -> None:
    twin = make_store(tmp_path, [20, 19, 8], text_every=4)  # the images of the first, in another order of shards
    split = Split.of(ValidationSettings(share=0.4, seed=1))
    held, learned = (open_mixture([stores[0], twin], side=Side(split, out)) for out in (True, False))
    assert held.images()
    assert not held.images() & learned.images()


def test_a_list_may_name_images_of_any_store(stores: list[Path], tmp_path: Path) -> None:
    (tmp_path / "names").write_text(f"3.jpg\n{FIRST + 1}.jpg\n")
    split = Split.of(ValidationSettings(names=str(tmp_path / "names")))
    assert open_mixture(stores, side=Side(split, True), last_batch="pad").images() == {"3.jpg", f"{FIRST + 1}.jpg"}
    with pytest.raises(ValueError, match="1 of 2 names"):
        open_mixture(stores[:1], side=Side(split, True))


def test_a_position_belongs_to_its_mixture(stores: list[Path]) -> None:
    kinds = [{}, {"weights": (1.0, 2.0)}, {"weights": (1.0, 3.0)}, {"epochs": (1.0, 2.0)}, {"groups": 2}]
    states = [open_mixture(stores, **kind).state_dict(24, True) for kind in kinds]
    for theirs, state in zip(kinds, states, strict=True):
        for mine in kinds:
            stream = open_mixture(stores, **mine)
            if mine == theirs:
                stream.load_state_dict(state)
            else:
                with pytest.raises(ValueError, match=r"weights|epochs|groups"):
                    stream.load_state_dict(state)
    assert not {"weights", "epochs", "groups", "held_out"} & states[0].keys()
    with pytest.raises(ValueError, match="fingerprint"):  # the stores' order is part of the order
        open_mixture(stores[::-1]).load_state_dict(states[0])
    moved = [Path(shutil.copytree(store, store.parent.parent / f"moved-{store.name}")) for store in stores]
    open_mixture(moved, **kinds[1]).load_state_dict(states[1])


def test_a_run_keeps_the_shards_of_each_store_that_it_began_with(
    stores: list[Path], grown: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    before, after = grown(stores[1], tmp_path)
    first = open_mixture([stores[0], before])
    order = Order(global_batch_size=24, window_shards=3)
    sources = [Source(str(stores[0])), Source(str(after), 4)]
    resumed = Stream(sources, ("block03",), order, Reading(), lambda examples: {})
    assert resumed.fingerprints == first.fingerprints
    assert keys_of(resumed) == keys_of(first)


def test_the_same_store_twice_is_refused_whatever_its_path(stores: list[Path], tmp_path: Path) -> None:
    copy = shutil.copytree(stores[0], tmp_path / "copy")
    with pytest.raises(ValueError, match=f"{stores[0]} and {copy} are the same store; give it once"):
        open_mixture([stores[0], stores[1], Path(copy)])


def test_stores_of_other_features_are_refused(stores: list[Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(stores[1], tmp_path / "other"))
    spec = json.loads((other / "store.json").read_text())
    (other / "store.json").write_text(json.dumps({**spec, "codec": "fp16"}))
    with pytest.raises(ValueError, match=f"{stores[0]} and {other} do not go together: codec: bf16 and fp16"):
        open_mixture([stores[0], other])


def test_a_store_that_gives_nothing_is_refused(stores: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.stores.1: an epoch has none of the \d+ examples of .*; raise its"):
        open_mixture(stores, weights=(1.0, 1e-6))
    (tmp_path / "names").write_text("".join(f"{i}.jpg\n" if i % 5 else f"{i:09d}-0\n" for i in range(39)))
    split = Split.of(ValidationSettings(names=str(tmp_path / "names")))
    with pytest.raises(ValueError, match=f"all examples of {stores[0]} are held out"):
        open_mixture(stores, side=Side(split))


def test_a_store_that_is_smaller_than_the_groups_is_refused(
    make_store: Callable[..., Path], stores: list[Path], tmp_path: Path
) -> None:
    tiny = make_store(tmp_path, [1], first=900)
    with pytest.raises(ValueError, match=f"data.groups: {tiny} has 1 examples to learn from, fewer than 2 groups"):
        open_mixture([stores[0], tiny], groups=2)


def test_a_text_only_store_is_a_source_like_others(
    make_store: Callable[..., Path], stores: list[Path], tmp_path: Path
) -> None:
    text = make_store(tmp_path, [6, 6], text_every=1, first=900)
    stream = open_mixture([stores[0], text], weights=(1.0, 1.0))
    for batch in stream:
        assert not {int(row) for row in batch["image_rows"]} & {i for i, s in enumerate(batch["stores"]) if s == 1}
    assert keys_of(open_mixture([text], last_batch="pad"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, r"store\n.*required, but not given"),
        ({"store": "a", "stores": [{"store": "b"}]}, r"store\n.*data.stores names 1 already"),
        ({"stores": [{"store": "a", "weight": 0}]}, r"stores.0.weight\n.*greater than 0"),
        ({"stores": [{"store": "a", "weight": -1}]}, r"stores.0.weight\n.*greater than 0"),
        ({"stores": [{"store": "a", "weight": 1e308}]}, r"stores.0.weight\n.*less than or equal to 1000000000000000"),
        ({"stores": [{"store": "a", "epochs": 0}]}, r"stores.0.epochs\n.*greater than 0"),
        ({"stores": [{"store": "a", "epochs": 1e9}]}, r"stores.0.epochs\n.*less than or equal to 1000"),
        ({"stores": [{"store": "a", "weight": 1}, {"store": "b", "epochs": 1}]}, "a has a weight and b has epochs"),
        ({"stores": [{"store": "a"}, {"store": "b", "weight": 1}]}, "b has a weight and a has none; give all"),
        ({"stores": [{"store": "a", "weight": 1, "epochs": 1}]}, "a has a weight and a has epochs"),
        ({"stores": [{"store": "a"}, {"store": "b"}, {"store": "a/"}]}, "a is given twice"),
        ({"stores": [{"store": "a", "template": "v2"}]}, r"stores.0.template\n.*no such template; known here"),
        ({"stores": [{"store": "a", "wieght": 1}]}, r"stores.0.wieght\n.*not permitted"),
        ({"stores": "a"}, r"expected a list such as \[\{store: first"),
        ({"stores": ["a", "b"]}, r"expected a list such as \[\{store: first"),
        ({"store": "a", "validation": {"shere": 0.1}}, r"validation.shere\n.*not permitted"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DataSettings.model_validate({"template": "v1", **settings})


def test_stores_have_the_template_of_all_or_their_own() -> None:
    stores = [{"store": "a", "template": "plain"}, {"store": "b"}]
    mixture = DataSettings.model_validate({"template": "v1", "stores": stores}).mixture
    assert [(entry.store, entry.template) for entry in mixture] == [("a", "plain"), ("b", "v1")]
    assert DataSettings(template="v1", store="c").mixture[0].template == "v1"


@pytest.fixture(scope="module")
def remote(stores: list[Path], s3: dict[str, str]) -> list[str]:
    client = boto3.client("s3")
    client.create_bucket(Bucket="mixture")
    for store in stores:
        for path in store.rglob("*"):
            if path.is_file():
                key = f"{store.name}/{path.relative_to(store)}"
                client.put_object(Bucket="mixture", Key=key, Body=path.read_bytes())
    return [f"s3://mixture/{store.name}" for store in stores]


@pytest.mark.parametrize("order", [{"epochs": (2.0, 1.0)}, {"groups": 2, "weights": (1.0, 2.0)}], ids=str)
def test_remote_stores_share_a_cache_and_give_the_same_batches(
    stores: list[Path], remote: list[str], tmp_path: Path, order: dict
) -> None:
    local = open_mixture(stores, **order)
    sources = [Source(remote[0]), Source(remote[1])]
    reading = Reading(cache_dir=str(tmp_path), cache_gb=1, threads=2)
    stream = Stream(sources, ("block03",), local.order, reading, lambda examples: {})
    assert keys_of(stream) == keys_of(local)
    assert {path.parent.parent.name for path in tmp_path.glob("*/*/*.tar")} == {one[:16] for one in local.fingerprints}
    beside = [Source(str(stores[0])), Source(remote[1])]  # one on the disk, one remote
    assert keys_of(Stream(beside, ("block03",), local.order, reading, lambda examples: {})) == keys_of(
        open_mixture(stores, **order)
    )


def test_a_list_of_names_may_lie_in_a_bucket(stores: list[Path], remote: list[str]) -> None:
    boto3.client("s3").put_object(Bucket="mixture", Key="lists/names.txt", Body=b"\xef\xbb\xbf3.jpg\r\n000000005-0\r\n")
    split = Split.of(ValidationSettings(names="s3://mixture/lists/names.txt"))
    for places in (stores, remote):
        stream = open_mixture(places, side=Side(split, True), last_batch="pad")
        assert sorted({key.partition("#")[0] for keys in keys_of(stream) for key in keys}) == [
            "store0:000000003",
            "store0:000000005",
        ]


def test_a_node_whose_ranks_hold_whole_groups_fetches_only_their_shards(
    stores: list[Path], remote: list[str], tmp_path: Path
) -> None:
    order = Order(global_batch_size=24, window_shards=3, groups=2)
    fetched = []
    for rank in range(2):
        reading = Reading(rank=rank, world_size=2, cache_dir=str(tmp_path / str(rank)), cache_gb=1, threads=2)
        list(Stream([Source(url) for url in remote], (), order, reading, lambda examples: {}))
        fetched.append({str(path.relative_to(tmp_path / str(rank))) for path in (tmp_path / str(rank)).rglob("*.tar")})
    assert len(fetched[0] | fetched[1]) == 6 + 5
    assert len(fetched[0] & fetched[1]) <= 2  # those at the cut of each store


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("data.stores=[{store: a, wieght: 1}]", "data.stores.0.wieght: .* did you mean 'weight'"),
        ("data.validation.shere=0.1", "data.validation.shere: .* did you mean 'share'"),
        ("data.stores=[{store: a}]", "data.store: data.stores names 1 already; add data.store=null"),
        ("data.stores=[{weight: 2}]", "data.stores.0.store: required, but not given; add store to entry 0 of the list"),
        ("data.store.weight=2", "data.store holds '.*', which has no settings below it; set data.store=... itself"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_with_what_was_meant(argument: str, words: str) -> None:
    stage = Path(__file__).resolve().parents[2] / "training" / "pretrain.yaml"
    with pytest.raises(ConfigError, match=words):
        load_config(TrainConfig, stage, [argument])
