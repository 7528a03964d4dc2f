"""A reducer, a vision encoder and a decoder are one file and one line each: toys of all three train, export, answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from pipeline.encoder import _folder_digest
from pipeline.manifest import read_store
from pipeline.schema import EncoderSpec
from pipeline.storage import Storage
from training.config import TrainConfig
from training.fit.build import empty_model
from training.model.decoders.base import Decoder

ROOT = Path(__file__).resolve().parents[2]
GRID, WIDTH, KEPT = 4, 32, 3
REDUCER = '''
from dataclasses import dataclass

import torch
from torch import nn

from .base import ConnectorConfig
from .connector import Connector

IGNORE = 5  # a name that model.py has too


@dataclass(frozen=True)
class NearestConfig(ConnectorConfig):
    """The patches most alike to the text."""

    keep: int = 2
    block: int = 3
    reads_text = True

    def __post_init__(self):
        if not 0 < self.keep <= self.grid**2:
            raise ValueError(f"connector.keep {self.keep} of {self.grid**2} patches; choose fewer")

    @property
    def columns(self):
        return (f"block{self.block:02d}",)

    @property
    def tokens(self):
        return self.keep

    def flops(self):
        c1, c3, patches = self.vision_width, self.llm_width, self.grid**2
        return 2 * (c3 * c1 + patches * c1 + self.keep * c1 * c3)


class Nearest(Connector):
    def __init__(self, config):
        super().__init__(config)
        self.question = nn.Linear(config.llm_width, config.vision_width)
        self.project = nn.Linear(config.vision_width, config.llm_width)

    def reduce(self, columns, text):
        (patches,) = columns  # (n, grid*grid, C1)
        seen = text.embeds.to(patches.dtype) * text.mask[..., None]
        asked = self.question(seen.sum(dim=1) / text.mask.sum(dim=1, keepdim=True))  # (n, C1)
        alike = torch.bmm(patches, asked[..., None])[..., 0]  # (n, grid*grid)
        best = alike.topk(self.config.keep, dim=1)
        weight, places = best.values.softmax(dim=1)[..., None], best.indices[..., None]
        return self.project(patches.gather(1, places.expand(-1, -1, patches.shape[-1])) * weight)
'''
ENCODER = '''
from .base import VisionEncoder
from .columns import grid_of
from .pixels import normalised


class Plain(VisionEncoder):
    """SigLIP's shape: no CLS token, pixels stretched to a square."""

    model_class = "SiglipVisionModel"
    mean = std = (0.5, 0.5, 0.5)
    prefix = 0

    def layers(self, tower):
        return tower.encoder.layers

    def embed(self, tower, pixels):
        return tower.embeddings(pixels)

    def flops(self, config, deepest):
        d, tokens = config.hidden_size, grid_of(config) ** 2
        layer = 8 * tokens * d**2 + 4 * tokens * d * config.intermediate_size + 4 * tokens**2 * d
        return 2 * tokens * 3 * config.patch_size**2 * d + deepest * layer

    def pixels(self, image, aspect, size):
        import numpy as np

        return normalised(np.asarray(image.resize((size, size))), self.mean, self.std)
'''
DECODER = """
from .base import Decoder

CHAT = "{% for turn in messages %}{{ turn['role'] + ': ' + turn['content'] }}{% endfor %}"
QWEN = Decoder(template="v1", chat_template=CHAT)
"""
ADDED = {  # the file, and its line in the registry of its folder
    "training/model/reducers/nearest.py": (REDUCER, '"nearest": ("nearest:NearestConfig", "nearest:Nearest"),'),
    "pipeline/encoders/plain.py": (ENCODER, '"siglip_vision_model": "plain:Plain",'),
    "training/model/decoders/qwen.py": (DECODER, '"qwen2": "qwen:QWEN",'),
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with three files more and three lines more."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pipeline", "training"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, (text, line) in ADDED.items():
        (folder / name).write_text(text, encoding="utf-8")
        registry = (folder / name).with_name("__init__.py")
        before = registry.read_text(encoding="utf-8").splitlines()
        (opening,) = [i for i, found in enumerate(before) if " = {" in found and found.partition(" ")[0].isupper()]
        registry.write_text("\n".join([*before[: opening + 1], f"    {line}", *before[opening + 1 :], ""]))
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    SiglipVisionModel(SiglipVisionConfig(image_size=32, patch_size=8, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=736, num_key_value_heads=2, pad_token_id=0, initializer_range=0.1, **shape)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for path in tiny_tokenizer.iterdir():
        shutil.copy(path, folder)
    return folder


def run(folder: Path, code: str, *arguments: object, **environment: str) -> dict[str, Any]:
    """What `code` prints last, as JSON, where `folder` is what Python finds."""
    variables = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, check=False, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


DECLARED = """
import json, sys
import torch
from transformers import AutoConfig
from pipeline.config import ConfigError, load_config
from training.config import TrainConfig
from training.cost.flops import counted, image_flops
from training.model.reducers import build_connector, connector_config
from training.model.reducers.connector import Text
base = ["run=r", "data.store=s", "model.llm=l", "model.connector.arm=nearest"]
def settings(*more):
    try:
        return load_config(TrainConfig, "training/finetune.yaml", [*base, *more]).model.connector.model_dump()
    except ConfigError as error:
        return str(error)
shape = {"grid": 4, "vision_width": 32, "llm_width": 48}
declared, fewer = (connector_config(arm="nearest", keep=keep, **shape) for keep in (3, 2))
connector = build_connector(declared)
columns = {"block03": torch.randn(1, 16, 32)}
text = Text(torch.randn(1, 5, 48), torch.ones(1, 5, dtype=torch.bool))
llm = AutoConfig.for_model("llama", num_hidden_layers=4, hidden_size=48, num_attention_heads=4)
vision = AutoConfig.for_model("siglip_vision_model", hidden_size=32, image_size=32, patch_size=8)
print(json.dumps({
    "settings": [settings(f"model.connector.{text}") for text in ("keep=3", "keeep=3", "keep=x")],
    "shape": list(connector(columns, text).shape),
    "flops": [counted(lambda: connector(columns, text)), declared.flops()],
    "prefill": [image_flops(llm, vision, each, text_tokens=0).prefill for each in (declared, fewer)],
}))
"""


def test_settings_costs_and_refusals_follow_from_what_a_new_reducer_declares(checkout: Path) -> None:
    seen = run(checkout, DECLARED)
    known, unknown, wrong = seen["settings"]
    assert known == {"arm": "nearest", "keep": 3, "block": 3}
    assert "keeep: unknown setting of nearest; did you mean 'keep'" in unknown
    assert "model.connector.keep: Input should be a valid integer" in wrong
    assert seen["shape"] == [1, 3, 48]
    assert seen["flops"][0] == seen["flops"][1]
    assert seen["prefill"][0] > seen["prefill"][1]


WALKED = """
import json, sys
import numpy as np, torch
from PIL import Image
from transformers import SiglipVisionModel
from pipeline.encoder import Encoder, columns_of, describe_encoder
from pipeline.encoder import Encoder, columns_of, describe_encoder
from pipeline.encoders import encoder_of
from pipeline.encoders.clip import Clip
from pipeline.schema import EncoderSpec
from training.cost.flops import counted
spec = describe_encoder(sys.argv[1], None)
encode = Encoder(sys.argv[1], None, columns_of(spec, (1, 3), ()), "float32")
picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
pixels = torch.from_numpy(encode.pixels(picture, "pad"))[None]
whole = SiglipVisionModel.from_pretrained(sys.argv[1], attn_implementation="sdpa").eval()
with torch.no_grad():
    states = whole(pixels, output_hidden_states=True).hidden_states
features, family = encode(pixels), encoder_of("siglip_vision_model")
print(json.dumps({
    "spec": [spec.grid, spec.width, spec.blocks],
    "same": [torch.equal(features[f"block{i:02d}"], states[i]) for i in (1, 3)],
    "flops": [counted(lambda: family.columns(whole.to("meta"), pixels.to("meta"), ["block03"])),
              family.flops(whole.config, 3)],
}))
"""


def test_the_build_walks_a_new_encoder_and_makes_its_pixels(checkout: Path, tower: Path) -> None:
    seen = run(checkout, WALKED, tower)
    assert seen["spec"] == [GRID, WIDTH, 4]
    assert seen["same"] == [True, True]
    assert seen["flops"][0] == seen["flops"][1]


TRAINED = """
import json, sys
from PIL import Image
from training.answers.answer import load_model, reply
from training.config import TrainConfig
from training.fit.stage import train
for tree in json.loads(sys.argv[1]):
    train(TrainConfig.model_validate(tree))
model, processor = load_model(sys.argv[2], "cpu")
picture = Image.new("RGB", (50, 40), (200, 30, 10))
said = reply(model, processor, ["What is this?"], [picture], 4)
print(json.dumps({"said": said, "keep": model.connector.config.keep}))
"""
ANSWERED = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
sys.modules["training"] = sys.modules["pipeline"] = None  # importing either would fail
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
picture = Image.new("RGB", (50, 40), (200, 30, 10))
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions. ")
inputs = processor(images=picture, text=SYSTEM + "USER: <image>\\nWhat is this? ASSISTANT:", return_tensors="pt")
new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1]:]
print(json.dumps({
    "said": [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)],
    "chat": processor.apply_chat_template([{"role": "user", "content": "Hi"}]),
    "parts": [type(part).__name__ for part in (model.vision_tower, model.connector, model.llm)],
}))
"""


def test_all_three_train_export_and_answer_where_this_project_is_not(
    checkout: Path, tmp_path: Path, tower: Path, llm: Path, new_store: Callable[..., Path], settings: Callable[..., Any]
) -> None:
    digest = _folder_digest(tower)
    encoder = EncoderSpec(id=str(tower), revision=digest, blocks=4, width=WIDTH, image_size=8 * GRID, patch_size=8)
    store = new_store(tmp_path / "store", encoder, (3,), 64)
    trees = []
    for stage in (1, 2):
        changes = {"data.store": str(store), "model.llm": str(llm), "steps": 3}
        trees.append(settings(tmp_path / f"stage{stage}", stage, changes))
        trees[-1]["model"]["connector"] = {"arm": "nearest", "keep": KEPT}
    trees[1]["model"]["connector_from"] = str(tmp_path / "stage1" / "connector")
    exported = tmp_path / "stage2" / "model"
    here = run(checkout, TRAINED, json.dumps(trees), exported)
    assert here["keep"] == KEPT
    assert {"reducers_nearest.py", "encoders_plain.py"} <= {path.name for path in exported.iterdir()}
    there = run(tmp_path, ANSWERED, exported, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert there["parts"] == ["SiglipVisionModel", "Nearest", "Qwen2ForCausalLM"]
    assert there["chat"] == "user: Hi"
    assert there["said"] == here["said"]


def test_a_chat_template_that_cannot_be_rendered_is_named_before_training(
    monkeypatch: pytest.MonkeyPatch, llm: Path, tmp_path: Path, settings: Callable[..., Any], run_store: Path
) -> None:
    config = TrainConfig.model_validate(settings(tmp_path, 1, {"model.llm": str(llm)}))
    for chat, said in (
        ("{% for %}", "cannot be rendered: .*correct its file"),
        ("{{ 1 + 'a' }}", "cannot be rendered"),
    ):
        monkeypatch.setattr("training.fit.build.decoder_of", lambda name, chat=chat: Decoder("v1", chat))
        with pytest.raises(ValueError, match=rf"of type qwen2: its decoder's chat template {said}"):
            empty_model(config, read_store(Storage(str(run_store))))
