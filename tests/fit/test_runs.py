"""Options of a stage: which parts learn, LoRA, rates, ranks and microbatches, precision, what stops a run."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import ConfigError, load_config
from training.checkpoints.safe import only_data
from training.config import TrainConfig
from training.engines import engine_class
from training.fit.trained import export_run
from training.model.model import CompactVisionForConditionalGeneration

pytestmark = pytest.mark.minutes(2)
LORA = {"model.lora": {"rank": 8, "alpha": 16, "dropout": 0.0}, "optimizer.llm_lr": 4e-3}
MEMORY = {"model.loss_chunks": 3, "model.activation_checkpointing": True}
TIED = {"model.llm": "tied", "steps": 3}
NAN = {"optimizer.lr": 1e25, "optimizer.warmup_ratio": 0.0, "stop_on_spike": None, "checkpoint.interval": "1ba"}
BF16 = {"precision": "amp_bf16", "model.frozen_dtype": "bfloat16"}

# name: (stage, ranks, settings)
RUNS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "plain": (2, 2, {"boards": ["tensorboard", "wandb", "mlflow"]}),
    "one-rank": (2, 1, {"microbatch_size": "auto", "parallelism": "fsdp"}),
    "odd-parts": (2, 2, {"microbatch_size": 3}),
    "chunks-zero3": (2, 2, {**MEMORY, "parallelism": "zero3"}),
    "chunks-fsdp": (2, 2, {**MEMORY, "parallelism": "fsdp"}),
    "compiled": (2, 1, {"model.compile": ["connector", "llm"], "model.activation_checkpointing": True}),
    "llm-only": (2, 2, {"train": ["llm"], "parallelism": "fsdp"}),
    "lora-ddp": (2, 2, LORA),
    "lora-fsdp": (2, 2, {**LORA, "parallelism": "fsdp"}),
    "lora-zero3": (2, 2, {**LORA, "parallelism": "zero3"}),
    "fp32": (1, 2, {}),
    "bf16-zero2": (1, 2, {**BF16, "parallelism": "zero2"}),
    "bf16-zero3": (1, 2, {**BF16, "parallelism": "zero3"}),
    "tied-ddp": (2, 2, TIED),
    "tied-fsdp": (2, 2, {**TIED, "parallelism": "fsdp"}),
    "tied-zero2": (2, 2, {**TIED, "parallelism": "zero2"}),
    "tied-zero3": (2, 2, {**TIED, "parallelism": "zero3"}),
    "tied-lora-ddp": (2, 1, {**TIED, **LORA}),
    "tied-lora-zero3": (2, 1, {**TIED, **LORA, "parallelism": "zero3"}),
    "tied-frozen": (1, 1, {**TIED, "parallelism": "zero1"}),
    "spike": (2, 2, {"stop_on_spike": 1.002, "optimizer.lr": 1e-9}),
    **{f"nan-{engine}": (2, 1, {**NAN, "parallelism": engine}) for engine in ("ddp", "zero2")},
}
STOPPED = ("spike", "nan-ddp", "nan-zero2")  # they end with an error


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Path:
    """The language model of the other runs, its head being its embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tied")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(parts / "llm", tie_word_embeddings=True)).save_pretrained(folder)
    shutil.copy(parts / "llm" / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    settings: Callable[..., Any],
    run_jobs: Callable[..., Any],
    needed: list[str],
    tied: Path,
) -> Path:
    """A folder for each of RUNS that is needed, 16 steps long."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = []
    for name in needed:
        stage, ranks, changes = RUNS[name]
        if changes.get("model.llm") == "tied":
            changes = {**changes, "model.llm": str(tied)}
        config = settings(folder / name, stage, {"steps": 16, "checkpoint.interval": "100ba", **changes})
        jobs.append({"config": config, "ranks": ranks})
    boards = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    codes = dict(zip(needed, run_jobs(folder, jobs, boards), strict=True))
    for name, code in codes.items():
        assert (name in STOPPED) is any(code), f"{name}: {code}\n{(folder / name / 'output').read_text()[-4000:]}"
    return folder


@pytest.fixture(scope="module")
def losses(runs: Path, read_log: Callable[..., Any]) -> Callable[[str], list[float]]:
    return lambda name: [line["loss"] for line in read_log(runs / name)]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.needs("plain", name), *([] if name == "one-rank" else [pytest.mark.slow])]
        )
        for name in ("one-rank", "odd-parts", "chunks-zero3", "chunks-fsdp", "compiled")
    ],
)
def test_the_loss_depends_neither_on_ranks_nor_on_microbatches_nor_on_what_saves_memory_or_time(
    losses: Callable[[str], list[float]], name: str
) -> None:
    assert losses(name) == pytest.approx(losses("plain"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.needs("llm-only")
def test_the_llm_may_learn_alone(runs: Path, losses: Callable[[str], list[float]], settings: Any) -> None:
    from pipeline.manifest import read_store
    from pipeline.storage import Storage
    from training.fit.build import build_model

    assert losses("llm-only")[-1] < losses("llm-only")[0]
    config = TrainConfig.model_validate(settings(runs / "llm-only", 2))
    before = build_model(config, read_store(Storage(config.data.store))).connector.state_dict()
    after = load_file(runs / "llm-only" / "connector" / "connector.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.slow
@pytest.mark.needs("lora-ddp", "lora-fsdp", "lora-zero3")
def test_lora_learns_alike_on_every_engine_and_is_merged_at_the_end(
    runs: Path, parts: Path, losses: Callable[[str], list[float]]
) -> None:
    assert losses("lora-ddp")[-1] < losses("lora-ddp")[0]
    exported = {name: load_file(runs / name / "model" / "model.safetensors") for name in RUNS if "lora" in name}
    for engine in ("fsdp", "zero3"):
        assert losses(f"lora-{engine}") == pytest.approx(losses("lora-ddp"), rel=1e-5)
        for name, weight in exported["lora-ddp"].items():
            torch.testing.assert_close(exported[f"lora-{engine}"][name], weight, rtol=0, atol=1e-4)
    trained = load_file(runs / "lora-ddp" / "all.safetensors")
    base = load_file(parts / "llm" / "model.safetensors")
    layer = "model.layers.1.mlp.up_proj"
    a, b = (trained[f"llm.{layer}.lora_{kind}.default.weight"] for kind in "AB")
    assert float(b.abs().max()) > 0
    torch.testing.assert_close(exported["lora-ddp"][f"llm.{layer}.weight"], base[f"{layer}.weight"] + 16 / 8 * b @ a)
    assert torch.equal(trained[f"llm.{layer}.base_layer.weight"], base[f"{layer}.weight"])  # frozen
    assert torch.equal(exported["lora-ddp"]["llm.lm_head.weight"], base["lm_head.weight"])
    assert not any("lora" in name for name in exported["lora-ddp"])


@pytest.mark.slow
@pytest.mark.needs(*(name for name in RUNS if name.startswith("tied")))
def test_a_head_that_is_the_embeddings_learns_ends_and_comes_out_alike_on_every_engine(
    runs: Path, losses: Callable[[str], list[float]]
) -> None:
    for usual, others in (
        ("tied-ddp", ("tied-fsdp", "tied-zero2", "tied-zero3")),
        ("tied-lora-ddp", ("tied-lora-zero3",)),
    ):
        expected = load_file(runs / usual / "model" / "model.safetensors")
        for name in others:
            assert losses(name) == pytest.approx(losses(usual), rel=1e-5)
            found = load_file(runs / name / "model" / "model.safetensors")
            assert found.keys() == expected.keys()
            for key, weight in expected.items():
                torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-4, msg=f"{name} {key}")
    for name in (name for name in RUNS if name.startswith("tied-") and name != "tied-frozen"):
        model = CompactVisionForConditionalGeneration.from_pretrained(runs / name / "model")
        assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
        for checkpoint in (None, max((runs / name / "checkpoints").glob("ba*"))):
            export_run(runs / name, runs / name / "again", checkpoint)
            again = load_file(runs / name / "again" / "model.safetensors")
            assert all(torch.equal(again[key], weight) for key, weight in model.state_dict().items() if key in again)
    assert (runs / "tied-frozen" / "connector").is_dir()
    export_run(runs / "tied-frozen", runs / "tied-frozen" / "model")


@pytest.mark.needs("lora-ddp", "plain")
def test_each_part_has_its_own_rate(runs: Path, read_log: Callable[..., Any]) -> None:
    first, *moving = read_log(runs / "lora-ddp")
    assert first["lr"] == 0  # where both are the same
    for line in moving:
        assert line["lr_llm"] == pytest.approx(2 * line["lr"])
    assert "lr_llm" not in read_log(runs / "plain")[-1]


@pytest.mark.slow
@pytest.mark.needs("bf16-zero2", "bf16-zero3", "fp32")
def test_bf16_has_the_losses_of_fp32_up_to_its_rounding(losses: Callable[[str], list[float]]) -> None:
    """Under ZeRO, that is: Composer does not train in bf16 on a CPU."""
    for engine in ("zero2", "zero3"):
        assert losses(f"bf16-{engine}") == pytest.approx(losses("fp32"), rel=5e-3)


@pytest.mark.needs("plain")
def test_every_step_says_what_it_did(runs: Path, read_log: Callable[..., Any]) -> None:
    lines = read_log(runs / "plain")
    names = {"loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s", "data_wait", "step_s", "eta_s", "memory_gb"}
    assert all(line.keys() == names | {"step", "padding"} for line in lines)
    assert all(0 < line["padding"] < 0.5 for line in lines)  # microbatches of unequal texts, cut to the longest


def on_tensorboard(runs: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = []
    for events in (runs / "plain" / "tensorboard").rglob("*tfevents*"):  # Composer begins a new one at each flush
        board = EventAccumulator(str(events)).Reload()
        seen += board.Scalars("step/loss") if "step/loss" in board.Tags()["scalars"] else []
    return [event.value for event in sorted(seen, key=lambda event: event.wall_time)]


def on_wandb(runs: Path) -> list[float]:
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    (path,) = (runs / "plain").rglob("run-*.wandb")
    store, seen = DataStore(), []
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        items = Record.FromString(data).history.item
        seen += [json.loads(i.value_json) for i in items if "step/loss" in (i.key, *i.nested_key)]
    return seen


def on_mlflow(runs: Path) -> list[float]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return [metric.value for metric in client.get_metric_history(run.info.run_id, "step/loss")]


@pytest.mark.needs("plain")
@pytest.mark.parametrize("board", [on_tensorboard, on_wandb, on_mlflow])
def test_a_board_has_the_losses_of_the_log(
    runs: Path, losses: Callable[[str], list[float]], board: Callable[[Path], list[float]]
) -> None:
    assert board(runs) == pytest.approx(losses("plain"))


@pytest.mark.needs("spike")
def test_a_jump_of_the_loss_stops_the_run_and_names_the_batch(runs: Path) -> None:
    said = (runs / "spike" / "output").read_text()
    assert "FloatingPointError: loss" in said
    assert "is more than 1.002 times the usual" in said
    message = said[said.index("is more than") :].split("The last checkpoint")[0]
    assert message.count("#0") == 8  # the keys of the global batch


@pytest.mark.parametrize(
    "name", [pytest.param(f"nan-{e}", marks=pytest.mark.needs(f"nan-{e}")) for e in ("ddp", "zero2")]
)
def test_a_loss_that_is_no_number_stops_the_run_before_it_reaches_the_weights(
    runs: Path, losses: Callable[[str], list[float]], name: str
) -> None:
    said = (runs / name / "output").read_text()
    found = re.search(
        r"FloatingPointError: loss is (nan|inf) at step (\d+); the microbatch held the examples (.*)\.", said
    )
    assert found is not None, said[-2000:]
    steps = int(found[2])
    assert steps == len(losses(name)) > 0  # those before it
    assert all(map(math.isfinite, losses(name)))
    assert found[3].count("#0") == 2  # of the microbatch
    last, engine = runs / name / "checkpoints" / f"ba{steps:08d}", name.removeprefix("nan-")
    with only_data(engine):
        weights = engine_class(engine).saved_weights(last, "composer.pt")
    assert len(weights) > 30
    assert all(bool(weight.isfinite().all()) for weight in weights.values())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["optimizer.llm_lr=1e-5"], "optimizer.llm_lr has no effect"),
        (["model.lora={}"], "model.lora adapts the llm"),
        (["train=[connector,llm]", "data.template=v1", "model.lora={}", "parallelism=fsdp"], "FSDP shards the weights"),
        (["model.compile=[connector]", "parallelism=zero3"], "ZeRO-3 gathers weights in Python hooks"),
        (["parallelism=zero4"], "'zero3'"),
        (["checkpoint.remote=bucket"], "checkpoint.remote"),
        (["boards=[tensorbord]"], "boards"),
        (["run=s3://bucket/run"], "run: a run lies in a local folder"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(changes: list[str], reason: str) -> None:
    yaml = Path(__file__).resolve().parents[2] / "training" / "pretrain.yaml"
    with pytest.raises(ConfigError, match=reason):
        load_config(TrainConfig, yaml, changes)


def test_a_board_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.fit.callbacks import boards

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'compact-vision-tokens\[wandb\]'"):
        boards(("wandb",), tmp_path, "project")


def test_composer_algorithms_are_refused_under_zero(settings: Callable[..., Any], tmp_path: Path) -> None:
    from composer.algorithms import GradientClipping

    from training.engines import engine_of

    engine = engine_of(TrainConfig.model_validate(settings(tmp_path, 1, {"parallelism": "zero2"})), 1)
    with pytest.raises(ValueError, match=r"\(GradientClipping\) .* DeepSpeed keeps its own"):
        engine.trainer([], {"algorithms": [GradientClipping("norm", 1.0)]})


@pytest.mark.vectors("learning_rates*.json")
def test_the_schedule_is_the_reference_trainers(case: dict[str, Any]) -> None:
    """Step by step: test_engines.py shows that a run's steps take the rates of this curve."""
    from training.fit.optimizer import build_schedule

    assert math.ceil(case["total_steps"] * 0.03) == case["warmup_steps"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=case["base_lr"])
    schedule = build_schedule(optimizer, case["total_steps"], 0.03)
    for step in range(case["total_steps"]):
        if str(step) in case["lr"]:
            assert optimizer.param_groups[0]["lr"] == pytest.approx(case["lr"][str(step)], rel=1e-9, abs=1e-18)
        optimizer.step()
        schedule.step()
