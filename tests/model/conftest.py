"""Parts of a few thousand weights, made from a seed: a CLIP, a Llama, and the model around them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from training.model.model import CompactVisionForConditionalGeneration
from training.model.reducers import build_connector, connector_config
from training.model.reducers.connector import Connector

VOCABULARY = 736  # of tests/parity/tiny_tokenizer
BLOCKS = (1, 2, 4)


def make_tower(seed: int = 0) -> CLIPVisionModel:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
    return CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **shape)).eval()


def make_llm(seed: int = 1, **more: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    # Weights larger than Llama's usual start, so that what a token says depends on all that is before it.
    config = LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, initializer_range=0.3, **shape, **more)
    return LlamaForCausalLM(config).eval()


def make_connector(seed: int = 2, **more: object) -> Connector:
    torch.manual_seed(seed)
    shape = {"grid": 4, "vision_width": 32, "llm_width": 64, "blocks": BLOCKS, "block": 4, **more}
    return build_connector(connector_config(**shape))


@pytest.fixture
def make_model() -> Callable[..., CompactVisionForConditionalGeneration]:
    """4 vision tokens per image of 32 x 32 pixels; arguments are LlamaConfig's."""

    def make(tower: bool = True, **llm: object) -> CompactVisionForConditionalGeneration:
        parts = make_llm(**llm), make_connector(), make_tower() if tower else None
        return CompactVisionForConditionalGeneration.from_parts(*parts).eval()

    return make


@pytest.fixture
def model(make_model: Callable[..., CompactVisionForConditionalGeneration]) -> CompactVisionForConditionalGeneration:
    return make_model()


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    make_llm().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    make_tower().save_pretrained(folder)
    return folder
