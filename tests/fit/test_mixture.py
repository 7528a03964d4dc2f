"""Runs on several stores: equal losses on any ranks and after a kill, the loss of each store, what was really seen."""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures.runs import BLOCKS
from pipeline.encoder import describe_encoder
from training.config import TrainConfig
from training.fit.identity import refuse_another
from training.fit.parts import STORE, open_parts
from training.model.markers import IGNORE

pytestmark = pytest.mark.minutes(1)
STEPS = 14
# name: (stage, ranks, settings)
RUNS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one": (2, 1, {"microbatch_size": 3}),
    "two": (2, 2, {}),
    "killed": (2, 2, {"checkpoint.interval": "4ba"}),
    "chunks": (2, 1, {"model.loss_chunks": 3, "model.activation_checkpointing": True}),
    "fsdp": (2, 2, {"parallelism": "fsdp"}),
    "zero3": (2, 2, {"parallelism": "zero3"}),
    "grouped": (1, 2, {"data.groups": 2, "data.group_by_length": True}),
}
SLOW = ("chunks", "fsdp", "zero3", "grouped")


@pytest.fixture(scope="module")
def second_store(new_store: Callable[..., Path], parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 samples in 3 shards."""
    return new_store(
        tmp_path_factory.mktemp("second") / "store", describe_encoder(str(parts / "clip"), None), BLOCKS, 96
    )


@pytest.fixture(scope="module")
def mixture(settings: Callable[..., Any], run_store: Path, second_store: Path) -> Callable[..., dict[str, Any]]:
    """mixture(run, stage, changes): as `settings`, of two stores, one of them three times as often as the other."""

    def make(run: Path, stage: int, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        stores = [{"store": str(run_store), "weight": 3}, {"store": str(second_store), "weight": 1}]
        return settings(run, stage, {"steps": STEPS, "data.store": None, "data.stores": stores, **(changes or {})})

    return make


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    mixture: Callable[..., dict[str, Any]],
    run_jobs: Callable[..., Any],
    needed: list[str],
) -> Path:
    """A folder for each of RUNS that is needed; "killed" ended in the midst, and went on."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = []
    for name in needed:
        stage, ranks, changes = RUNS[name]
        config = mixture(folder / name, stage, {"checkpoint.interval": "100ba", **changes})
        if name == "killed":
            jobs.append({"config": config, "ranks": ranks, "signal": signal.SIGKILL, "at": 6})
        jobs.append({"config": config, "ranks": ranks, **({"waits": True} if name == "two" else {})})
    for job, codes in zip(jobs, run_jobs(folder, jobs), strict=True):
        run = Path(job["config"]["run"])
        assert any(codes) is ("signal" in job), (run / "output").read_text()[-4000:]
    return folder


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.needs("one", name), *([pytest.mark.slow] if name in SLOW else [])])
        for name in RUNS
        if name not in ("one", "grouped")
    ],
)
def test_losses_of_all_and_of_each_store_are_those_of_one_rank(
    runs: Path, read_log: Callable[[Path], list[dict[str, float]]], name: str
) -> None:
    usual, lines = read_log(runs / "one"), read_log(runs / name)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    keys = ("loss", "loss_store0", "loss_store1")
    for mine, other in zip(lines, usual, strict=True):
        expected = {key: other[key] for key in keys if key in other}  # a step may have no token of a store
        assert {key: mine[key] for key in keys if key in mine} == pytest.approx(expected, rel=2e-5)
        assert [mine.get(f"tokens_store{i}") for i in (0, 1)] == [other.get(f"tokens_store{i}") for i in (0, 1)]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.needs(name), *([pytest.mark.slow] if name in SLOW else [])])
        for name in RUNS
    ],
)
def test_the_losses_of_the_stores_make_up_that_of_the_step(
    runs: Path, read_log: Callable[[Path], list[dict[str, float]]], name: str
) -> None:
    for line in read_log(runs / name):
        tokens = {i: line.get(f"tokens_store{i}", 0) for i in (0, 1)}
        total = sum(line[f"loss_store{i}"] * count for i, count in tokens.items() if count)
        assert total / sum(tokens.values()) == pytest.approx(line["loss"], rel=1e-6)


@pytest.mark.needs("two", "killed")
def test_a_killed_run_has_seen_what_one_that_nobody_killed_has(
    runs: Path, read_log: Callable[[Path], list[dict[str, float]]]
) -> None:
    measured = ("loss", "loss_store0", "loss_store1", "tokens_store0", "tokens_store1")
    lines = [[{key: line.get(key) for key in measured} for line in read_log(runs / name)] for name in ("two", "killed")]
    assert lines[0] == lines[1]
    seen = [json.loads((runs / name / "summary.json").read_text())["stores"] for name in ("two", "killed")]
    assert seen[0] == seen[1]


@pytest.mark.needs("two")
def test_what_was_seen_of_each_store_is_counted(runs: Path, mixture: Callable[..., dict[str, Any]]) -> None:
    config = TrainConfig.model_validate(mixture(runs / "two", 2))
    stream = open_parts(config, 0, 1).stream
    examples, tokens = Counter[int](), Counter[int]()
    for _, batch in zip(range(STEPS), stream, strict=False):
        for store, labels in zip(batch["stores"].tolist(), batch["labels"], strict=True):
            examples[store] += 1
            tokens[store] += int((labels[1:] != IGNORE).sum())
    stores = json.loads((runs / "two" / "summary.json").read_text())["stores"]
    assert [(entry["examples"], entry["tokens"]) for entry in stores] == [(examples[i], tokens[i]) for i in (0, 1)]
    assert sum(examples.values()) == STEPS * 8
    output = (runs / "two" / "output").read_text()
    assert f"seen      store0 {stores[0]['store']}: {examples[0]} examples" in output
    assert "store0    " in output
    assert "(1.31 times each, 75.0% of the epoch), template v1" in output


@pytest.mark.needs("two")
def test_the_losses_of_the_stores_are_read_with_the_others_in_one_wait(runs: Path) -> None:
    for rank in (0, 1):
        waits = json.loads((runs / "two" / f"waits-{rank}.json").read_text())
        assert not [entry for entry in waits if entry[0] == "ours" and entry[2] == "microbatch"]
        ours = {place: times // STEPS for owner, place, _, times in waits if owner == "ours"}
        assert sum(ours.values()) == 2, ours  # the losses; and the ranks agree on when to stop


@pytest.mark.needs("two")
def test_a_run_belongs_to_its_mixture(
    runs: Path, mixture: Callable[..., dict[str, Any]], run_store: Path, second_store: Path, tmp_path: Path
) -> None:
    def with_stores(stores: list[dict[str, Any]]) -> TrainConfig:
        changes = {"checkpoint.interval": "1ba", "data.stores": stores}
        return TrainConfig.model_validate(mixture(runs / "two", 2, changes))

    first, second = {"store": str(run_store), "weight": 3}, {"store": str(second_store), "weight": 1}
    assert len((runs / "two" / STORE).read_text().split()) == 2
    refuse_another(with_stores([first, second]))
    moved = shutil.copytree(second_store, tmp_path / "moved")
    refuse_another(with_stores([first, {**second, "store": str(moved)}]))
    for other, words in (
        ([second, first], "data.stores.0.store: .* which holds another store"),
        ([first, {**second, "weight": 2}], r"data.stores.1.weight: 1.0 -> 2.0"),
        ([first], r"data.stores: .*, .* -> "),
    ):
        with pytest.raises(ValueError, match=words):
            refuse_another(with_stores(other))
    single = {"data.stores": [], "data.store": str(run_store)}
    with pytest.raises(ValueError, match=r"data.stores: "):
        refuse_another(TrainConfig.model_validate(mixture(runs / "two", 2, single)))


def test_templates_are_those_of_the_stores(
    mixture: Callable[..., dict[str, Any]], run_store: Path, second_store: Path, tmp_path: Path
) -> None:
    stores = [{"store": str(run_store)}, {"store": str(second_store), "template": "plain"}]
    config = TrainConfig.model_validate(mixture(tmp_path / "run", 1, {"data.stores": stores}))
    collator = open_parts(config, 0, 1).stream._reader.collate
    assert collator.by_store == ("v1", "plain")
    again = TrainConfig.model_validate(mixture(tmp_path / "run", 1, {"data.stores": [stores[1]]}))
    assert open_parts(again, 0, 1).stream._reader.collate.by_store == ("plain",)
