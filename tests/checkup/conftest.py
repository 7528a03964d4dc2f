"""A language model and a configuration that pass every check."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from training.toy.models import train_tokenizer

LLM = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of a few thousand weights, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("llm")
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, pad_token_id=0, **LLM)).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(train_tokenizer({"caption": "w w w a b"}, []))
    return folder


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
