"""What a run and its end need, asked before the first step: memory, room, encoder; and what --check shows."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaForCausalLM

from training.config import TrainConfig
from training.cost.memory import ModelShape, activations
from training.engines import engine_of


def lines(output: str, check: str) -> list[str]:
    return [line for line in output.splitlines() if line[6:].startswith(check)]


def test_what_only_an_export_reads_is_looked_at(
    good: list[str], seen: str, examine: Callable, llm: Path, clip_folder: Path
) -> None:
    code, output = examine(*good, "train=[connector,llm]", seen)
    assert code == 0, output
    assert f"reads {clip_folder} at" in lines(output, "export")[0]
    assert f"{llm}/tokenizer.model" in lines(output, "export")[0]


def another_encoder(spec: dict[str, Any], folder: Path) -> str:
    spec["encoder"]["revision"] = "0123456789abcdef"
    return "is another one by now"


def no_encoder(spec: dict[str, Any], folder: Path) -> str:
    spec["encoder"]["id"] = str(folder / "gone" / "clip" / "of another machine")
    return "cannot be read here"


def no_weights(spec: dict[str, Any], folder: Path) -> str:
    folder = Path(shutil.copytree(spec["encoder"]["id"], folder / "clip"))
    (folder / "model.safetensors").unlink()
    spec["encoder"]["id"] = str(folder)
    return "is another one by now"


@pytest.mark.parametrize("lose", [another_encoder, no_encoder, no_weights])
def test_an_encoder_that_the_end_would_miss_is_named_before_a_run_begins(
    good: list[str],
    seen: str,
    examine: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lose: Callable[[dict[str, Any], Path], str],
) -> None:
    store = Path(shutil.copytree(seen.partition("=")[2], tmp_path / "store"))
    spec = json.loads((store / "store.json").read_text())
    words = lose(spec, tmp_path)
    (store / "store.json").write_text(json.dumps(spec))
    arguments = [*good, "train=[connector,llm]", f"data.store={store}"]
    code, output = examine(*arguments)
    assert code == 1
    assert words in lines(output, "export")[0]
    from training.train import main

    for look in (["--check"], []):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, *look])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert str(stopped.value.code).startswith("error: this run could not come to its end: ")
        assert words in str(stopped.value.code)
    assert not (tmp_path / "run").exists()


def test_a_damaged_stage_1_is_named_before_stage_2_begins(good: list[str], seen: str, tmp_path: Path) -> None:
    from pipeline.manifest import read_store
    from pipeline.storage import Storage
    from training.fit.finding import run_check
    from training.fit.needs import export

    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.json").write_text('{"train": [')
    settings = yaml.safe_load(Path(good[0]).read_text()) | {"train": ["connector", "llm"]}
    settings["model"]["connector_from"] = str(tmp_path / "first" / "connector")
    settings["data"]["store"] = seen.partition("=")[2]
    config = TrainConfig.model_validate(settings)
    (found,) = run_check("export", lambda: export(config, read_store(Storage(config.data.store))))
    assert (found.level, "first/config.json is damaged" in found.text) == ("fail", True)


def test_room_for_every_checkpoint_that_is_kept_is_looked_for(good: list[str], examine: Callable) -> None:
    kept = {"checkpoint.keep=2": 3, "checkpoint.keep=-1": 4, "checkpoint.keep=0": 2}  # three epochs, one each
    for setting, count in kept.items():
        _, output = examine(*good, "checkpoint.interval=1ep", setting)
        assert f"GB, {count} of them" in lines(output, "disk")[0]


def test_the_run_that_a_folder_holds_is_named(good: list[str], examine: Callable, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    config = config_of(good)
    (tmp_path / "run" / "config.json").write_text(config.model_dump_json())
    code, output = examine(*good)
    assert code == 0, output
    assert "holds this run, which goes on" in lines(output, "run")[0]
    code, output = examine(*good, "optimizer.lr=1")
    assert code == 1
    assert "optimizer.lr: 0.001 -> 1.0" in output
    (tmp_path / "run" / "config.json").write_text("{")
    assert "config.json is damaged" in examine(*good)[1]


SHAPE = ModelShape(learning=1000, frozen=500, layer=100, layers=10, hidden=8, mlp=16, vocabulary=100)


def config_of(good: list[str], **changes: object) -> TrainConfig:
    settings = yaml.safe_load(Path(good[0]).read_text()) | changes
    return TrainConfig.model_validate(settings)


def test_the_estimate_of_ddp_is_what_adam_allocates(good: list[str], llm: Path) -> None:
    import torch

    model = LlamaForCausalLM.from_pretrained(llm, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones((1, 4), dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    weights = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.grad.nbytes for p in model.parameters())
    moments = sum(s[name].nbytes for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    shape = ModelShape(**{**SHAPE.__dict__, "learning": model.num_parameters(), "frozen": 0})
    found = engine_of(config_of(good), ranks=1).memory(shape)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, moments)


@pytest.mark.parametrize(
    ("engine", "expected"),  # bytes of weights, gradients, optimizer; 1000 weights learn, 500 bf16 ones are frozen
    [
        ("ddp", (4000 + 2000 + 1000, 8000, 8000)),
        ("fsdp", ((4000 + 1000) / 4 + 400, 1000, 2000)),
        ("zero1", (3000, 2000, 3000)),
        ("zero2", (3000, 500, 3000)),
        ("zero3", (3000 / 4 + 400, 500, 3000)),
    ],
)
def test_each_engine_shards_its_part(good: list[str], engine: str, expected: tuple[float, ...]) -> None:
    config = config_of(good, precision="amp_bf16").model_copy(update={"parallelism": engine})
    found = engine_of(config, ranks=4).memory(SHAPE)
    assert (found.weights, found.gradients, found.optimizer) == expected


def test_one_rank_shards_with_nobody_under_fsdp(good: list[str]) -> None:
    ddp, fsdp = (engine_of(config_of(good, parallelism=name), ranks=1) for name in ("ddp", "fsdp"))
    assert fsdp.name == "ddp"
    assert fsdp.memory(SHAPE) == ddp.memory(SHAPE)


def test_activation_checkpointing_needs_less(good: list[str]) -> None:
    whole = config_of(good)
    saved = whole.model_copy(update={"model": whole.model.model_copy(update={"activation_checkpointing": True})})
    more, less = (activations(c, SHAPE, 4, 10) for c in (whole, saved))
    assert less < more / 2


def test_check_shows_groups_and_an_example_with_its_labels(
    good: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from training.train import main

    monkeypatch.setattr(sys, "argv", ["train.py", *good, "--check"])
    main()
    output = capsys.readouterr().out
    assert "global_batch_size: 8" in output
    assert "GB (ddp, 1 rank(s), 4 example(s) of 512 tokens) of" in lines(output, "memory")[0]
    assert lines(output, "disk")[0].startswith("ok")
    assert "lr 1.00e-03  weight decay 0" in output
    assert "tensors of connector.mbtf, connector.stf" in output
    assert "USER: [1 vision tokens]" in output
    assert "ASSISTANT:⟦a b</s>⟧" in output
    assert not Path(config_of(good).run).exists()
    assert "not on this machine" not in output
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["train.py", *good, "--check", "precision=amp_bf16"])
    main()
    assert "precision amp_bf16: Composer takes it only on GPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.stor=x", "did you mean 'store'?"),
        ("data.store=/nowhere", "is not a feature store"),
        ("model.connector.blocks=[3,6]", "needs block06"),
        ("global_batch_size=512", "fewer than one global batch of 512"),
        ("data.max_length=4096", "more than the 2048 positions"),
    ],
)
def test_check_names_what_is_wrong(good: list[str], monkeypatch: pytest.MonkeyPatch, setting: str, words: str) -> None:
    from training.train import main

    monkeypatch.setattr(sys, "argv", ["train.py", *good, "--check", setting])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert str(stopped.value.code).startswith("error: ")
    assert words in str(stopped.value.code)
