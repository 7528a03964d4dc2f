"""The files of a language model: every weight as transformers loads it, and one clear message where they are wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline.manifest import read_store
from pipeline.storage import Storage
from training.config import LoraSettings, ModelSettings, TrainConfig
from training.engines.weights import LlmWeights, empty_llm, fill_whole
from training.fit import needs
from training.fit.build import empty_model, whole_model
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
        shutil.copytree(old.parent, folder / f"{name}-old-bins")  # the same, by an index
        old = (folder / f"{name}-old-bins" / old.name).rename(folder / f"{name}-old-bins" / "all.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(llm.state_dict(), old.name)}
        old.with_name("pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def settings_of(folder: Path) -> ModelSettings:
    return ModelSettings(llm=str(folder))


@pytest.mark.parametrize("kind", ["", "-bin", "-old-bin", "-old-bins"])
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


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code of a file was run",)


def spoil(folder: Path, how: str) -> None:
    """Make the files wrong."""
    index, files = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))
    weights = {name: weight for path in files for name, weight in load_file(path).items()}
    by_index = json.loads(index.read_text())
    outside, another = by_index["weight_map"] | {UP: "../b"}, by_index["weight_map"] | {UP: files[0].name}
    indices = {
        "no JSON": '{"weight_map',
        "a list": "[1]",
        "no names": json.dumps({"metadata": {}}),
        "outside": json.dumps(by_index | {"weight_map": outside}),
        "another file": json.dumps(by_index | {"weight_map": another}),
    }
    if how in indices:
        index.write_text(indices[how])
        return
    if how == "no file":
        files[1].unlink()
        return
    if how == "a folder":
        files[1].unlink()
        files[1].mkdir()
        return
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    change: dict[str, Callable[[], Any]] = {
        "fewer": lambda: weights.pop(UP),
        "no head": lambda: weights.pop("lm_head.weight"),
        "shape": lambda: weights.update({UP: weights[UP][:10].clone()}),
        "dtype": lambda: weights.update({UP: weights[UP].to(torch.int8)}),
        "code": lambda: weights.update({"more": Code()}),  # type: ignore[dict-item]
        "cut": lambda: None,
        "empty": lambda: None,
    }
    kind, in_bin = how.removesuffix(" .bin"), how.endswith(" .bin")
    path = folder / ("pytorch_model.bin" if in_bin else "model.safetensors")
    change[kind]()
    if in_bin:
        torch.save(weights, path)
    else:
        save_file(weights, path, metadata={"format": "pt"})
    data = path.read_bytes()
    path.write_bytes(data[:-1000] if kind == "cut" else b"" if kind == "empty" else data)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no file", r"llm lacks a file that its index names \(.*model-00002-of-.*; put it there"),
        ("fewer", rf"the files of .*llm lack {UP}; fetch again"),
        ("no head", r"the files of .*llm lack lm_head\.weight; fetch again"),
        ("shape", rf"hold {UP} with shape \(10, 16\) instead of \(24, 16\); fetch again"),
        ("dtype", rf"model\.safetensors holds {UP} as I8, not as one of BF16, .*quantized"),
        ("no JSON", r"llm/model\.safetensors\.index\.json is not JSON: "),
        ("a list", r"index\.json has no \"metadata\" and \"weight_map\""),
        ("no names", r"index\.json has no \"metadata\" and \"weight_map\""),
        ("outside", rf"index\.json says that {UP} is in '\.\./b', which is no file beside it"),
        ("another file", rf"model-00001-of-.* lacks {UP}, which the index"),
        ("a folder", r"weights, .*model-00002-of-.*, cannot be opened: .*directory"),
        ("dtype .bin", rf"pytorch_model\.bin holds {UP} as torch\.int8, not as one of BF16, .*quantized"),
        ("code .bin", r"pytorch_model\.bin, is damaged or holds code, which is never run"),
        ("empty .bin", r"a file of weights, .*llm, cannot be opened: it ends too soon"),
        ("cut .bin", r"a file of weights, .*llm, cannot be opened: .*Invalid argument"),
        ("empty", r"a file of weights, .*llm/model\.safetensors, cannot be opened: .*header"),
        ("cut", r"a file of weights, .*llm/model.safetensors, cannot be opened: .*; fetch it again"),
    ],
)
def test_wrong_files_are_refused_before_anything_is_loaded(folders: Path, tmp_path: Path, how: str, said: str) -> None:
    folder = Path(shutil.copytree(folders / "untied", tmp_path / "llm"))
    spoil(folder, how)
    with pytest.raises(ValueError, match=said):
        empty_llm(settings_of(folder), torch.float32)


def test_adapters_are_no_model(folders: Path, tmp_path: Path) -> None:
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(folders / "untied"), LoraConfig(target_modules=["q_proj"])
    )
    adapted.save_pretrained(tmp_path)
    shutil.copytree(folders / "untied", tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"holds adapters .*: merge them into their model"):
        empty_llm(settings_of(tmp_path), torch.float32)


@pytest.mark.parametrize("files", [True, False])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"is quantized \(gptq\), and cannot be trained"),
        ({"hidden_size": "wide"}, r"config\.json of .*llm: .*'hidden_size'.*; fetch it again"),
        ({"hidden_act": "wide"}, r"llm cannot be loaded \(KeyError\('wide'\)\): its config\.json"),
    ],
)
def test_a_wrong_config_is_refused(
    settings: Callable[..., Any],
    run_store: Path,
    parts: Path,
    tmp_path: Path,
    wrong: dict[str, Any],
    said: str,
    files: bool,
) -> None:
    folder = Path(shutil.copytree(parts / "llm", tmp_path / "llm"))
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | wrong))
    config = TrainConfig.model_validate(settings(tmp_path / "run", 1, {"model.llm": str(folder)}))
    with pytest.raises(ValueError, match=said):
        empty_model(config, read_store(Storage(str(run_store))), files)


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


GROUP = "0::/slurm/job\n"


@pytest.mark.parametrize(
    ("own", "files", "free"),
    [
        (GROUP, {}, 10_240),
        (GROUP, {"slurm/job": "max 300 10"}, 10_240),
        (GROUP, {"slurm/job": "1000 300 10"}, 710),
        (GROUP, {"slurm/job": "max 300 10", "slurm": "1000 300 10", "": "2000 300 10"}, 710),
        (GROUP, {"": "1000 300 what"}, 700),  # a container that sees itself as the root
        (GROUP, {"slurm/job": "1000 ? 10", "slurm": "? 1 1"}, 10_240),
        (GROUP, {"slurm/job": "1000 3000 10"}, 0),
        ("1:name=systemd:/\n", {"slurm": "1 0 0", "": "1000 300 10"}, 710),
    ],
)
def test_free_memory_is_what_the_groups_of_this_process_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], free: int
) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text(own)
    (tmp_path / "meminfo").write_text("MemTotal:  20 kB\nMemAvailable:  10 kB\n")
    for folder, numbers in files.items():
        (tmp_path / "groups" / folder).mkdir(parents=True, exist_ok=True)
        for name, number in zip(("memory.max", "memory.current", "memory.stat"), numbers.split(), strict=True):
            (tmp_path / "groups" / folder / name).write_text(f"active_file {number}" if "stat" in name else number)
    kind, _, *names = needs.CGROUPS[0]
    monkeypatch.setattr(needs, "PROC", tmp_path)
    monkeypatch.setattr(needs, "CGROUPS", ((kind, str(tmp_path / "groups"), *names),))
    assert needs.free_host_memory() == free


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
