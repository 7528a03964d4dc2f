"""The files of a language model: every weight as transformers loads it, and one clear message where they are wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from training.config import LoraSettings, ModelSettings, TrainConfig
from training.engines.weights import LlmWeights, empty_llm, fill_whole
from training.fit import needs
from training.fit.build import whole_model
from training.fit.lora import add_lora
from training.fit.stage import train
from training.model.model import CompactVisionForConditionalGeneration
from training.model.reducers import build_connector
from training.release import shards

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tied and untied, in fp16: split safetensors, and `-bin` with every name, as PyTorch saves them."""
    folder = tmp_path_factory.mktemp("llms")
    torch.manual_seed(0)
    for name in ("tied", "untied"):
        llm = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=name == "tied", **SHAPE)).half()
        llm.save_pretrained(folder / name, max_shard_size="6KB")
        assert len(list((folder / name).glob("*.safetensors"))) > 1
        llm.config.save_pretrained(folder / f"{name}-bin")
        torch.save(llm.state_dict(), folder / f"{name}-bin" / "pytorch_model.bin")
        llm.config.save_pretrained(folder / f"{name}-old-bin")  # of PyTorch before 1.6, which cannot be mapped
        old = folder / f"{name}-old-bin" / "pytorch_model.bin"
        torch.save(llm.state_dict(), old, _use_new_zipfile_serialization=False)
    return folder


def settings_of(folder: Path) -> ModelSettings:
    return ModelSettings(llm=str(folder))


@pytest.mark.parametrize("kind", ["", "-bin", "-old-bin"])
@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
def test_every_weight_is_the_one_that_transformers_loads(
    folders: Path, name: str, kind: str, dtype: torch.dtype, lora: bool
) -> None:
    settings = settings_of(folders / f"{name}{kind}")
    both = []
    for load in (
        lambda: AutoModelForCausalLM.from_pretrained(settings.llm, dtype=dtype),
        lambda: empty_llm(settings, dtype),
    ):
        torch.manual_seed(1)
        llm = load()
        if lora:
            add_lora(llm, LoraSettings(rank=2))
        both.append((llm, torch.get_rng_state()))
    (usual, drawn), (llm, also_drawn) = both
    assert torch.equal(drawn, also_drawn)
    empty = {name for name, weight in llm.named_parameters() if weight.is_meta}
    assert empty == {name for name, _ in llm.named_parameters() if "lora_" not in name}
    before = {name: id(weight) for name, weight in llm.named_parameters()}
    weights = LlmWeights(settings, llm)
    for each, weight in llm.named_parameters():
        if weight.is_meta:
            weights.fill(f"llm.{each}", weight, torch.device("cpu"))
    assert before == {name: id(weight) for name, weight in llm.named_parameters()}  # an optimizer may hold them
    for found, expected in (
        (dict(llm.named_parameters()), dict(usual.named_parameters())),
        (dict(llm.named_buffers()), dict(usual.named_buffers())),  # rotary frequencies, which no file holds
        (llm.state_dict(), usual.state_dict()),
    ):
        assert found.keys() == expected.keys()
        for each, tensor in expected.items():
            assert torch.equal(found[each], tensor) and found[each].dtype == tensor.dtype, each
    assert (llm.lm_head.weight is llm.model.embed_tokens.weight) == (name == "tied")


def spoil(folder: Path, how: str) -> None:
    """Make the files wrong."""
    weights = {name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}
    if how == "no file":
        sorted(folder.glob("*.safetensors"))[1].unlink()
        return
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    change = {
        "fewer": lambda: weights.pop(UP),
        "no head": lambda: weights.pop("lm_head.weight"),
        "shape": lambda: weights.update({UP: weights[UP][:10].clone()}),
        "dtype": lambda: weights.update({UP: weights[UP].to(torch.int8)}),
        "cut": lambda: None,
    }
    change[how]()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if how == "cut":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-100])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no file", r"llm lacks a file that its index names \(.*model-00002-of-.*; put it there"),
        ("fewer", rf"the files of .*llm lack {UP}; fetch again"),
        ("no head", r"the files of .*llm lack lm_head\.weight; fetch again"),
        ("shape", rf"hold {UP} with shape \(10, 16\) instead of \(24, 16\); fetch again"),
        ("dtype", rf"model\.safetensors holds {UP} as I8, not as one of BF16, .*quantized"),
        ("cut", r"a file of weights of .*llm cannot be opened: .*; fetch it again"),
    ],
)
def test_wrong_files_are_refused_before_anything_is_loaded(folders: Path, tmp_path: Path, how: str, said: str) -> None:
    folder = Path(shutil.copytree(folders / "untied", tmp_path / "llm"))
    spoil(folder, how)
    with pytest.raises(ValueError, match=said):
        empty_llm(settings_of(folder), torch.float32)


@pytest.mark.parametrize(
    ("check_only", "changes", "free", "said"),
    [
        (False, {}, 500, r"1\.0 GB per rank.* of 0\.5 GB.* for 1 rank.*; start fewer ranks"),
        (True, {}, 500, r"1\.0 GB per rank.* of 0\.5 GB.* for 1 rank.*; start fewer ranks"),
        (True, {"data.prefetch": 10**4}, 1_200, r"0\.2 of 10001 batches that are read .*lower data\.prefetch"),
    ],
)
def test_a_run_without_memory_on_its_host_does_not_begin(
    settings: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    check_only: bool,
    changes: dict[str, Any],
    free: int,
    said: str,
) -> None:
    monkeypatch.setattr(needs, "free_host_memory", lambda: free * 10**6)
    config = TrainConfig.model_validate(settings(tmp_path / "run", 1, changes))
    with pytest.raises(SystemExit, match=f"host memory: .*{said}"):
        train(config, check_only)
    assert not (tmp_path / "run").exists()
    assert ("fail  host" in capsys.readouterr().out) == check_only


def test_an_export_in_several_files_is_that_of_one(
    model: CompactVisionForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("one", 10**9), ("several", 20_000)):
        monkeypatch.setattr(shards, "SHARD_BYTES", size)
        (tmp_path / name).mkdir()
        backwards = reversed(list(model.state_dict().items()))  # weights may come in any order
        shards.write_weights(model, backwards, tmp_path / name, torch.bfloat16)
    one, several = ({p.name: p for p in (tmp_path / name).glob("*.safetensors")} for name in ("one", "several"))
    assert list(one) == ["model.safetensors"] and len(several) > 2
    found = {name: weight for path in several.values() for name, weight in load_file(path).items()}
    expected = load_file(one["model.safetensors"])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) and weight.dtype == torch.bfloat16 for name, weight in expected.items())
    loaded = CompactVisionForConditionalGeneration.from_pretrained(tmp_path / "several")
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items() if name in expected)


@pytest.mark.parametrize("head", ["equal", "another"])
def test_a_head_that_differs_from_the_embeddings_it_is_said_to_be_is_exported(
    folders: Path, model: CompactVisionForConditionalGeneration, tmp_path: Path, head: str
) -> None:
    llm = LlamaForCausalLM.from_pretrained(folders / "untied", dtype=torch.float32)
    if head == "equal":
        llm.lm_head.weight.data.copy_(llm.model.embed_tokens.weight)
    llm.save_pretrained(tmp_path / "llm")
    LlamaConfig.from_pretrained(tmp_path / "llm", tie_word_embeddings=True).save_pretrained(tmp_path / "llm")
    empty = empty_llm(settings_of(tmp_path / "llm"), torch.float32)
    connector = build_connector(replace(model.connector.config, llm_width=SHAPE["hidden_size"]))
    trained = CompactVisionForConditionalGeneration.from_parts(empty, connector)
    fill_whole(settings_of(tmp_path / "llm"), trained, torch.device("cpu"))
    whole = whole_model(trained, {k: w for k, w in trained.state_dict().items() if k.startswith("connector.")})
    seeing = CompactVisionForConditionalGeneration.from_parts(whole.llm, whole.connector, model.vision_tower)
    weights = {**trained.state_dict(), **{k: w for k, w in model.state_dict().items() if k.startswith("vision_")}}
    shards.write_weights(seeing, weights.items(), tmp_path, None)
    exported = CompactVisionForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(exported.llm.state_dict()[name], weight) for name, weight in llm.state_dict().items())
    assert (exported.llm.lm_head.weight is exported.get_input_embeddings().weight) == (head == "equal")
