"""infra/SCALING.md says what its formulas give, and its constants are those of the real parts."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pipeline.codec import to_payload
from training.model.reducers import build_connector, connector_config

INFRA = Path(__file__).resolve().parents[2] / "infra"


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", INFRA / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_holds_the_tables_of_today(scaling: ModuleType) -> None:
    page = (INFRA / "SCALING.md").read_text(encoding="utf-8")
    for title, table in scaling.TABLES.items():
        assert "\n".join(table()) in page, f"{title}: put in what `python infra/scaling.py` prints"


@pytest.mark.parametrize("size", ["7B", "13B"])
def test_the_connectors_weights_are_counted_right(scaling: ModuleType, size: str) -> None:
    _, width = scaling.LLAMA[size]
    with torch.device("meta"):
        connector = build_connector(connector_config(grid=24, vision_width=1024, llm_width=width))
    counted = dict.fromkeys(("mbtf", "stf"), 0)
    for name, weight in connector.named_parameters():
        counted[name.split(".")[0]] += weight.numel()
    assert tuple(counted.values()) == scaling.CONNECTOR[size]


def test_the_language_models_weights_are_counted_right(scaling: ModuleType) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    inner = {"7B": 11008, "13B": 13824}
    for size, (layers, width) in scaling.LLAMA.items():
        few = []
        for number in (1, 2):
            shape = {"num_hidden_layers": number, "hidden_size": width, "num_attention_heads": width // 128}
            with torch.device("meta"):
                model = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=inner[size], vocab_size=32_000))
            few.append(sum(weight.numel() for weight in model.parameters()))
        assert few[0] + (layers - 1) * (few[1] - few[0]) == scaling.WEIGHTS[size]


def test_an_image_has_the_bytes_that_the_codec_writes(scaling: ModuleType) -> None:
    features = torch.zeros(len(scaling.BLOCKS), 576, 1024)
    assert to_payload(features, "bf16").numel() == scaling.IMAGE


def test_at_the_break_even_bandwidth_both_ways_take_as_long(scaling: ModuleType) -> None:
    batch, step, rate = 32, 0.356, 400.0
    bandwidth = scaling.break_even(batch, scaling.IMAGE, step, rate)
    assert batch * scaling.IMAGE / bandwidth == pytest.approx(step + batch / rate)
    assert bandwidth < scaling.read_rate(batch, scaling.IMAGE, step)
