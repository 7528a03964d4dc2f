"""Held-out examples: what is measured is right, leaves no trace in training, and says which step is the best."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from pydantic import ValidationError
from safetensors.torch import load_file

from fixtures.s3 import KEYS
from pipeline.codec import from_payload
from pipeline.manifest import read_store
from pipeline.storage import Storage
from training.checkpoints.history import History, Measured
from training.checkpoints.mark import checkpoint_folders
from training.checkpoints.safe import only_data
from training.config import TrainConfig
from training.engines import engine_class
from training.fit.evaluation import Plan, refuse_unlearnable
from training.fit.parts import open_parts
from training.fit.trained import best_checkpoint, export_run
from training.model.exported import exported_model
from training.model.markers import IGNORE
from training.release.card import stage_before, trained
from training.release.records import HeldOut, Summary, read_as, read_config

pytestmark = pytest.mark.minutes(1)
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
HELD = {"data.validation": {"share": 0.2, "interval": "3ba"}, "steps": 8, "checkpoint.interval": "2ba"}
DROPOUT = {"model.lora": {"rank": 4, "alpha": 8, "dropout": 0.3}, "train": ["connector", "llm"]}
SELDOM = {"data.validation": {"share": 0.2, "interval": "999ba"}}
# Sixteen examples, over and over, at a high rate: what is not among them is soon told worse than before.
HEART = {
    "data.limit": 16, "data.validation": {"share": 0.2, "interval": "2ba"}, "steps": 40, "optimizer.lr": 0.02,
    "checkpoint.interval": "10ba", "checkpoint.keep": 1, "checkpoint.keep_best": True,
}  # fmt: skip
PATIENT = {"share": 0.2, "interval": "2ba", "patience": 3}
MEASURED = ("heldout_loss", "heldout_accuracy", "heldout_s")
PLACES = {"step_s", "samples_per_s", "tokens_per_s", "data_wait", "eta_s", "memory_gb"}  # what no two runs share

# name: (stage, ranks, settings, what happens one after another, before it comes to its end)
RUNS: dict[str, tuple[int, int, dict[str, Any], list[dict[str, Any]]]] = {
    **{f"{engine}-often": (2, 2, {**DROPOUT, "parallelism": engine}, []) for engine in ENGINES},
    **{f"{engine}-seldom": (2, 2, {**DROPOUT, "parallelism": engine, **SELDOM}, []) for engine in ENGINES},
    **{  # in the evaluation after step 6, of three batches each: the process that goes on from step 4 begins with it
        f"{engine}-ended": (
            2,
            2,
            {**DROPOUT, "parallelism": engine},
            [{"in_evaluation": [5, signal.SIGKILL]}, {"in_evaluation": [2, signal.SIGTERM]}],
        )
        for engine in ENGINES
    },
    **{f"{ranks}-ranks": (2, ranks, {"steps": 1, "optimizer.lr": 1e-9}, []) for ranks in (1, 2, 4)},
    "learned-by-heart": (1, 1, HEART, []),
    "patient": (1, 1, {**HEART, "data.validation": PATIENT}, []),
    "patient-killed": (1, 1, {**HEART, "data.validation": PATIENT}, [{"killed_writing": "connector.json"}]),
    "patient-stopped": (
        1,
        1,
        {**HEART, "data.validation": PATIENT},
        [{"in_evaluation": [23, signal.SIGTERM]}],
    ),  # the 8th, of 3 batches
    "ddp-ended-at-the-end": (2, 2, {**DROPOUT}, [{"in_evaluation": [8, signal.SIGTERM]}]),
}


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    settings: Callable[..., Any],
    run_jobs: Callable[..., Any],
    needed: list[str],
) -> Path:
    """A folder for each of RUNS that is needed; what happens to one ends it, and it is started again."""
    folder = tmp_path_factory.mktemp("heldout")
    jobs = []
    for name in needed:
        stage, ranks, changes, happens = RUNS[name]
        job = {"config": settings(folder / name, stage, {**HELD, **changes}), "ranks": ranks}
        jobs += [{**job, **event} for event in happens] + [job]
    codes = run_jobs(folder, jobs)
    for job, code in zip(jobs, codes, strict=True):
        said = Path(job["config"]["run"], "output").read_text()[-4000:]
        if not {"in_evaluation", "killed_writing"} & job.keys():
            assert code == [0] * job["ranks"], said
        elif job.get("in_evaluation", [0, 0])[1] == signal.SIGTERM:
            assert code == [128 + signal.SIGTERM] * job["ranks"], said
        else:
            assert -signal.SIGKILL in code, said
    return folder


def comparable(log: list[dict[str, float]], *without: str) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in PLACES.union(without)} for line in log]


def needs(*names: str, quick: bool = False) -> list[pytest.MarkDecorator]:
    return [pytest.mark.needs(*names), *([] if quick else [pytest.mark.slow])]


@pytest.mark.parametrize(
    "engine", [pytest.param(e, marks=needs(f"{e}-often", f"{e}-seldom", quick=e == "ddp")) for e in ENGINES]
)
def test_training_has_the_same_numbers_however_often_it_is_measured(
    runs: Path, read_log: Callable[..., Any], engine: str
) -> None:
    often, seldom = (read_log(runs / f"{engine}-{name}") for name in ("often", "seldom"))
    assert [line["step"] for line in often if "heldout_loss" in line] == [3, 6, 8]
    assert [line["step"] for line in seldom if "heldout_loss" in line] == [8]
    assert comparable(often, *MEASURED) == comparable(seldom, *MEASURED)  # to the last bit
    weights, same = (load_file(runs / f"{engine}-{name}" / "all.safetensors") for name in ("often", "seldom"))
    assert all(weights[name].equal(weight) for name, weight in same.items())


@pytest.mark.parametrize(
    ("engine", "end"),
    [
        pytest.param(e, end, marks=needs(f"{e}-often", f"{e}-{end}"))
        for e in ENGINES
        for end in ("ended", *(["ended-at-the-end"] if e == "ddp" else []))
    ],
)
def test_a_run_that_ends_within_an_evaluation_goes_on_as_if_it_had_not(
    runs: Path, read_log: Callable[..., Any], engine: str, end: str
) -> None:
    whole, run = (read_log(runs / f"{engine}-{name}") for name in ("often", end))
    assert comparable(run, "heldout_s") == comparable(whole, "heldout_s")
    assert [("heldout_s" in line) for line in run] == [("heldout_s" in line) for line in whole]
    heldout = [read_as(Summary, runs / f"{engine}-{name}" / "summary.json").heldout for name in ("often", end)]
    assert heldout[0] == heldout[1] is not None


def heldout(log: list[dict[str, float]]) -> dict[int, float]:
    return {int(line["step"]): line["heldout_loss"] for line in log if "heldout_loss" in line}


def history(losses: dict[int, float], until: int) -> History:
    found = History()
    found.measured = [Measured(step, loss, 0.0) for step, loss in losses.items() if step <= until]
    return found


@pytest.mark.needs("1-ranks")
def test_the_loss_is_the_mean_over_all_tokens_of_all_examples(
    runs: Path, settings: Callable[..., Any], read_log: Callable[..., Any]
) -> None:
    """Computed with transformers' own loss of one example at a time, from the model that the run exported."""
    config = TrainConfig.model_validate(settings(runs / "1-ranks", 2, HELD))
    parts = open_parts(config, 0, 1)
    assert parts.held_out is not None
    assert len(parts.held_out.examples) % 8  # the last batch is filled up
    model, seen, entropy, right, tokens = exported_model(runs / "1-ranks" / "model"), set(), 0.0, 0, 0
    for batch in parts.held_out:
        columns = {
            c.name: from_payload(batch["columns"][c.name], c, parts.store.codec, torch.float32)
            for c in parts.store.columns
            if c.name in batch["columns"]
        }
        for row, key in enumerate(batch["keys"]):
            if key in seen:
                continue
            seen.add(key)
            images = batch["image_rows"] == row
            length = int(batch["attention_mask"][row].sum())
            labels = batch["labels"][row, 1:length]
            with torch.no_grad():
                logits = model(
                    input_ids=batch["input_ids"][row : row + 1, :length],
                    columns={name: values[images] for name, values in columns.items()} if images.any() else None,
                ).logits[0, :-1]
            entropy += float(torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))
            right += int(((logits.argmax(-1) == labels) & (labels != IGNORE)).sum())
            tokens += int((labels != IGNORE).sum())
    assert len(seen) == len(parts.held_out.examples)
    (line,) = read_log(runs / "1-ranks")
    assert line["heldout_loss"] == pytest.approx(entropy / tokens, rel=1e-6)
    assert line["heldout_accuracy"] == right / tokens


@pytest.mark.parametrize(
    "ranks", [pytest.param(ranks, marks=needs("1-ranks", f"{ranks}-ranks", quick=ranks == 2)) for ranks in (2, 4)]
)
def test_the_loss_is_the_same_on_any_number_of_ranks(runs: Path, read_log: Callable[..., Any], ranks: int) -> None:
    (one,), (line,) = (read_log(runs / f"{number}-ranks") for number in (1, ranks))
    for name in ("heldout_loss", "heldout_accuracy"):
        assert line[name] == pytest.approx(one[name], rel=1e-6)


@pytest.mark.needs("learned-by-heart")
def test_where_it_learns_by_heart_the_best_is_kept_and_exported(runs: Path, read_log: Callable[..., Any]) -> None:
    run, losses = runs / "learned-by-heart", heldout(read_log(runs / "learned-by-heart"))
    best = min(losses, key=losses.__getitem__)
    assert 2 < best < 40
    assert losses[best] < losses[2] and losses[best] < losses[40]
    assert [path.name for path in checkpoint_folders(run / "checkpoints")] == [f"ba{best:08d}", "ba00000040"]
    summary = read_as(Summary, run / "summary.json")
    assert summary.heldout == HeldOut(
        first=losses[2], best=losses[best], best_step=best, last=losses[40],
        accuracy_last=read_log(run)[-1]["heldout_accuracy"],
    )  # fmt: skip
    said = (run / "output").read_text()
    assert f"best      step {best}: python training/export.py {run} --best" in said
    assert best_checkpoint(run).name == f"ba{best:08d}"
    export_run(run, run / "best", best_checkpoint(run))
    found, last = load_file(run / "best" / "model.safetensors"), load_file(run / "connector" / "connector.safetensors")
    with only_data("ddp"):
        saved = engine_class("ddp").saved_weights(run / "checkpoints" / f"ba{best:08d}", "composer.pt")
    assert all(found[name].equal(weight) for name, weight in saved.items())
    assert not all(found[f"connector.{name}"].equal(weight) for name, weight in last.items())
    assert f"after step {best}." in (run / "best" / "README.md").read_text()
    stage_2 = load_file(run / "best" / "connector" / "connector.safetensors")
    assert all(found[f"connector.{name}"].equal(weight) for name, weight in stage_2.items())
    shutil.copytree(run / "best" / "connector", run.parent / "moved")
    for place in (run / "best" / "connector", run.parent / "moved"):  # the card of stage 2 has the figures of stage 1
        model = read_config(run).model.model_copy(update={"connector_from": str(place)})
        (text,) = trained(stage_before(read_config(run).model_copy(update={"model": model})))
        assert f"\n\n{best} steps in " in text and f"after step {best}." in text


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(f"patient{end}", marks=needs("learned-by-heart", f"patient{end}", quick=not end))
        for end in ("", "-killed", "-stopped")
    ],
)
def test_a_run_whose_held_out_loss_does_not_fall_ends_early_and_whole(
    runs: Path, read_log: Callable[..., Any], name: str
) -> None:
    """Also where it was killed in its export, or stopped in the evaluation that ends it."""
    log, run = read_log(runs / "learned-by-heart"), runs / name
    losses = heldout(log)
    last = next(step for step in losses if history(losses, step).over(3))
    assert last < 40
    assert comparable(read_log(run), "heldout_s") == comparable(log[:last], "heldout_s")  # rates of the full length
    assert read_as(Summary, run / "summary.json").steps == last
    assert checkpoint_folders(run / "checkpoints")[-1].name == f"ba{last:08d}"
    assert load_file(run / "connector" / "connector.safetensors").keys()
    said = (run / "output").read_text()
    assert said.count(f"step {last}/40") == 1
    assert f"step {last + 1} is next" not in said
    assert ("what is left is to export" in said) is (name == "patient-killed")


def test_held_out_examples_that_teach_nothing_are_refused_at_the_start(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    changes = {"data.validation": {"share": 0.2}, "data.max_length": 9}
    parts = open_parts(TrainConfig.model_validate(settings(tmp_path / "run", 2, changes)), 0, 1)
    assert parts.held_out is not None
    with pytest.raises(ValueError, match=r"held-out examples teaches anything.*its image lies beyond"):
        refuse_unlearnable(parts.held_out)


def test_the_best_checkpoint_wants_held_out_examples(settings: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"set data\.validation\.share"):
        TrainConfig.model_validate(settings(tmp_path, 1, {"checkpoint.keep_best": True}))


@pytest.mark.parametrize(("every", "steps", "due"), [(3, 8, [3, 6, 8]), (4, 8, [4, 8]), (9, 8, [8]), (1, 2, [1, 2])])
def test_it_is_measured_every_so_many_steps_and_once_at_the_end(every: int, steps: int, due: list[int]) -> None:
    plan = Plan(every, steps)
    assert [step for step in range(steps + 1) if plan.due(step)] == due
    assert [plan.left(step) for step in range(steps + 1)] == [sum(d > step for d in due) for step in range(steps + 1)]


@contextmanager
def bucket_from(event: Path, port: int) -> Iterator[dict[str, str]]:
    """The environment that leads to a server, which begins to answer when that file is there."""
    server, ended = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False), threading.Event()

    def open_it() -> None:
        while not event.exists() and not ended.wait(0.01):
            pass
        server.start()
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket="heldout")

    waiting = threading.Thread(target=open_it)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        waiting.start()
        try:
            yield {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        finally:
            ended.set()
            waiting.join()
            server.stop()


@pytest.mark.slow
@pytest.mark.needs("learned-by-heart")
def test_a_bucket_gets_the_best_though_newer_ones_overtook_it_and_an_empty_disk_knows_which_it_is(
    settings: Callable[..., Any], run_jobs: Callable[..., Any], free_port: Callable[[], int], runs: Path, tmp_path: Path
) -> None:
    usual = read_as(Summary, runs / "learned-by-heart" / "summary.json").heldout
    assert usual is not None and usual.best_step is not None and usual.best_step < 20
    best = f"ba{usual.best_step:08d}"
    run = tmp_path / "run"
    remote = {**HEART, "checkpoint.remote": "s3://heldout/run"}
    first = {"config": settings(run, 1, {**remote, "checkpoint.autoresume": False}), "ranks": 1}
    with bucket_from(run / "checkpoints" / "ba00000020" / "complete.json", free_port()) as environment:
        client = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"])

        def there() -> set[str]:
            return {entry["Key"].split("/")[1] for entry in client.list_objects_v2(Bucket="heldout")["Contents"]}

        codes = run_jobs(tmp_path / "first", [{**first, "signal": signal.SIGTERM, "at": 25}], environment)
        assert codes == [[128 + signal.SIGTERM]], (run / "output").read_text()[-3000:]
        assert best in there() and len(there()) == 2
        run.rename(tmp_path / "lost")
        codes = run_jobs(tmp_path / "again", [{"config": settings(run, 1, remote), "ranks": 1}], environment)
        assert codes == [[0]], (run / "output").read_text()[-3000:]
        assert there() == {best, "ba00000040"}
    assert read_as(Summary, run / "summary.json").heldout == usual
    with pytest.raises(ValueError, match=f"the best of .* is step {usual.best_step}, .* fetch it from s3://heldout"):
        best_checkpoint(run)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2"])
def test_a_run_that_held_nothing_out_goes_on_with_a_store_to_measure_on_and_without(
    settings: Callable[..., Any],
    run_jobs: Callable[..., Any],
    read_log: Callable[..., Any],
    new_store: Callable[..., Path],
    run_store: Path,
    tmp_path: Path,
    engine: str,
) -> None:
    spec = read_store(Storage(str(run_store)))
    other = new_store(tmp_path / "other", spec.encoder, (1, 2, 4), 32)
    without = {"parallelism": engine, "steps": 12, "checkpoint.interval": "3ba"}
    held_out = {**without, "data.validation": {"store": str(other), "interval": "3ba"}}
    stop = {"signal": signal.SIGTERM, "at": 4}
    jobs = [
        {"config": settings(tmp_path / name, 1, changes), "ranks": 2, **more}
        for name, changes, more in [
            ("whole", without, {}),
            ("run", without, stop),
            ("run", held_out, {**stop, "at": 8}),
            ("run", without, {}),
        ]
    ]
    codes = run_jobs(tmp_path, jobs)
    said = (tmp_path / "run" / "output").read_text()
    assert codes == [[0, 0], [143, 143], [143, 143], [0, 0]], said[-3000:]
    whole, run = read_log(tmp_path / "whole"), read_log(tmp_path / "run")
    assert [line["loss"] for line in run] == [line["loss"] for line in whole]
    assert next(line["step"] for line in run if "heldout_loss" in line) == 6
    assert "of these images are learned from too: '0.jpg'" in said
