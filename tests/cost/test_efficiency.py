"""What an image costs: the paper's printed figures, torch's own count, and times of a real model side by side."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from training.cost.flops import counted, encoder_flops, kv_cache_bytes, paper_rows, prefill_flops
from training.cost.shapes import shape
from training.efficiency import main, render
from training.model.model import CompactVisionForConditionalGeneration
from training.model.reducers import FAMILIES, build_connector, connector_config


@pytest.fixture
def efficiency(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """efficiency(argument, ...): what the command says."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["efficiency.py", *arguments])
        main()
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize(("tokens", "tflops"), [(576, 7.634304), (288, 3.773666), (144, 1.875961)])
def test_prefill_flops_are_the_papers(tokens: int, tflops: float) -> None:
    assert prefill_flops(shape("7b").text_config, tokens) / 1e12 == pytest.approx(tflops, abs=5e-7)


def test_every_arm_costs_what_the_paper_prints_and_torch_counts() -> None:
    rows = paper_rows(shape("7b"), text_tokens=64)  # which refuses to disagree with torch
    printed = [row for row in rows if row["paper"] is not None]
    assert len(printed) == 12
    assert all(f"{row['prefill']:.1f}" == str(row["paper"]) for row in printed)
    assert {row["tokens"] for row in rows} == {576, 288, 144, 64}
    released = next(row for row in rows if "released" in row["arm"])
    assert released["connector"] == pytest.approx(0.0821, abs=5e-5)
    whole = next(row for row in rows if row["arm"].startswith("MBTF+STF (Tables"))
    assert whole["encoder"] == pytest.approx(0.382, abs=5e-4)
    for row in rows:
        assert row["all"] > row["encoder"] + row["connector"] + row["prefill with text"] > row["prefill"]


def test_what_a_quarter_of_the_tokens_keeps_in_memory() -> None:
    text = shape("7b").text_config
    assert kv_cache_bytes(text, 576) == 288 * 2**20
    assert kv_cache_bytes(text, 144) == 72 * 2**20


def test_grouped_keys_cost_what_torch_counts() -> None:
    from transformers import LlamaModel

    settings = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 96}
    config = LlamaConfig(**settings, num_hidden_layers=3, vocab_size=32, attn_implementation="eager")
    with torch.device("meta"):
        llm = LlamaModel(config)
    embeds = torch.zeros(1, 10, 64, device="meta")
    assert counted(lambda: llm(inputs_embeds=embeds)) == prefill_flops(config, 10)


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("arm", FAMILIES)
def test_the_closed_form_of_every_connector_is_torchs_count(arm: str, preset: str) -> None:
    for more in ({}, {"pool": "after"}, {"kernel_size": 4, "fused_tokens": 2 if "stf" in arm else 1}):
        config = connector_config(arm=arm, preset=preset, grid=8, vision_width=16, llm_width=24, **more)
        with torch.device("meta"):
            connector = build_connector(config)
            columns = {name: torch.zeros(1, 64, 16) for name in connector.columns}
        assert counted(lambda: connector(columns)) == config.flops()  # noqa: B023


def test_clip_is_counted_up_to_the_deepest_block_alone(model: CompactVisionForConditionalGeneration) -> None:
    model.to("meta")  # torch does not count the attention kernels of a CPU
    pixels = torch.zeros(1, 3, 32, 32, device="meta")
    assert counted(lambda: model.encode_images(pixels)) == encoder_flops(model.config.vision_config, 4)


def test_a_model_is_measured_side_by_side_with_more_and_fewer_tokens(
    make_model: Callable[..., CompactVisionForConditionalGeneration], tmp_path: Path, efficiency: Callable[..., str]
) -> None:
    make_model().save_pretrained(tmp_path / "model")
    out = tmp_path / "out" / "efficiency.json"
    sizes = ["--text-tokens", "5", "--new-tokens", "3", "--batch-size", "2", "--rounds", "2", "--device", "cpu"]
    output = efficiency(str(tmp_path / "model"), *sizes, "--out", str(out))
    result = json.loads(out.read_text())
    assert [row["tokens"] for row in result["rows"]] == [16, 8, 4]
    assert render(result) in output
    assert [row["arm"] for row in result["rows"]] == ["mlp", "mbtf+stf k=2 E=2", "mbtf+stf k=2 E=1"]
    for row in result["rows"]:
        assert row["kv bytes"] == kv_cache_bytes(LlamaConfig(**_llm(tmp_path)), row["tokens"], 4)
        assert row["first token"] > 0
        assert row["peak bytes"] > 1e7 or math.isnan(row["peak bytes"])
        assert min(row["encode"], row["connector"], row["prefill"], row["per token"], row["tokens/s"], row["x"]) > 0
    assert result["rows"][0]["x"] == 1
    assert result["environment"]["dtype"] == "float32"


def test_random_weights_of_a_shape_are_measured_in_the_dtype_that_is_asked_for(
    make_model: Callable[..., CompactVisionForConditionalGeneration], tmp_path: Path, efficiency: Callable[..., str]
) -> None:
    make_model().config.save_pretrained(tmp_path)
    sizes = ["--text-tokens", "3", "--new-tokens", "2", "--rounds", "1", "--device", "cpu", "--layers", "1"]
    out = tmp_path / "out.json"
    efficiency("--config", str(tmp_path), "--dtype", "bfloat16", *sizes, "--out", str(out))
    result = json.loads(out.read_text())
    assert result["environment"]["dtype"] == "bfloat16"
    text = LlamaConfig(**{**json.loads((tmp_path / "config.json").read_text())["text_config"], "num_hidden_layers": 1})
    assert [row["kv bytes"] for row in result["rows"]] == [kv_cache_bytes(text, n) for n in (16, 8, 4)]


def _llm(folder: Path) -> dict:
    return json.loads((folder / "model" / "config.json").read_text())["text_config"]


def test_what_cannot_be_measured_is_said(
    tmp_path: Path, efficiency: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        ([], "give a MODEL, --config or --flops"),
        (["model", "--flops"], "leave out --config and --flops"),
        (["--config", "70b"], "--config 70b: there is no such folder; use one, or a known shape: 7b, 13b"),
        (["--config", "7b", "--rounds", "0"], "at least 1"),
        ([str(tmp_path), "--out", str(tmp_path / "none.json")], "error: "),
        (["--config", "7b", "--layers", "99"], "--layers 99: the language model has 32"),
    ):
        with pytest.raises(SystemExit) as ended:
            efficiency(*arguments)
        assert said in f"{ended.value}{capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())
