"""A good configuration, what it names, and the doctor."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from training import doctor
from training.toy.models import train_tokenizer

LLM = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of a few thousand weights, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("llm")
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, pad_token_id=0, **LLM)).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(train_tokenizer({"caption": "w w w a b"}, []))
    return folder


@pytest.fixture(scope="module")
def seen(store: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small store, as made by an encoder that is there: what stage 2 needs at its end."""
    from pipeline.encoder import describe_encoder

    copy = Path(shutil.copytree(store, tmp_path_factory.mktemp("seen") / "store"))
    spec = json.loads((copy / "store.json").read_text())
    spec["encoder"] |= {"id": str(clip_folder), "revision": describe_encoder(str(clip_folder), None).revision}
    (copy / "store.json").write_text(json.dumps(spec))
    return f"data.store={copy}"


@pytest.fixture
def good(store: Path, llm: Path, tmp_path: Path) -> list[str]:
    """A configuration of a run on the small store, as arguments."""
    settings = {
        "run": str(tmp_path / "run"),
        "train": ["connector"],
        "model": {"llm": str(llm), "connector": {"blocks": [3]}},
        "data": {"store": str(store), "template": "v1", "max_length": 512},
        "optimizer": {"lr": 1e-3, "warmup_ratio": 0.1},
        "global_batch_size": 8,
        "microbatch_size": 4,
        "epochs": 3,
        "precision": "fp32",
        "device": "cpu",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return [str(tmp_path / "config.yaml")]


@pytest.fixture
def examine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the doctor; gives its exit code and what it said."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["doctor.py", *arguments])
        code = doctor.main()
        return code, capsys.readouterr().out

    return run
