"""From training to files and back: what stage 2 starts from, and a folder that needs nothing of this project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from pipeline.codec import from_payload, to_payload
from pipeline.encoder import Encoder, columns_of, describe_encoder
from pipeline.schema import StoreSpec
from training.config import TrainConfig
from training.fit.build import build_model, load_tokenizer
from training.model.model import CompactVisionConfig, CompactVisionForConditionalGeneration
from training.model.processor import CompactVisionProcessor
from training.release.connector import export_connector, load_connector
from training.release.folder import export_model, replaced_folder


@pytest.fixture
def store(clip_folder: Path) -> StoreSpec:
    """What a store of this CLIP's features would say of itself."""
    encoder = describe_encoder(str(clip_folder), None)
    return StoreSpec(
        dataset="0" * 64,
        samples=3,
        shards=1,
        shard_size=4,
        seed=0,
        encoder=encoder,
        aspect="square",
        compute="bfloat16",
        codec="bf16",
        columns=columns_of(encoder, (1, 2, 4), ()),
    )


@pytest.fixture
def config(tiny_tokenizer: Path, llm_folder: Path, tmp_path: Path):
    """TrainConfig.model_validate with what these tests have in common."""

    def make(train: tuple[str, ...] = ("connector", "llm"), **model: object) -> TrainConfig:
        return TrainConfig.model_validate(
            {
                "run": str(tmp_path / "run"),
                "train": train,
                "model": {
                    "llm": str(llm_folder),
                    "tokenizer": str(tiny_tokenizer),
                    "connector": {"blocks": [1, 2, 4]},
                    **model,
                },
                "data": {"store": "unused", "template": "v1"},
                "optimizer": {"lr": 1e-3},
                "global_batch_size": 2,
            }
        )

    return make


@pytest.mark.parametrize("frozen", ["float32", "bfloat16"])
def test_stage_one_learns_the_connector_in_fp32_around_a_frozen_llm(config, store: StoreSpec, frozen: str) -> None:
    model = build_model(config(("connector",), frozen_dtype=frozen), store)
    assert {p.dtype for p in model.connector.parameters()} == {torch.float32}
    assert {p.dtype for p in model.llm.parameters()} == {getattr(torch, frozen)}
    assert all(p.requires_grad for p in model.connector.parameters())
    assert not any(p.requires_grad for p in model.llm.parameters())
    assert model.training
    assert model.vision_tower is None
    assert model.config.aspect == "square"


def test_stage_two_learns_everything_or_the_llm_alone(config, store: StoreSpec) -> None:
    model = build_model(config(), store)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    model = build_model(config(("llm",), activation_checkpointing=True), store)
    assert {p.dtype for p in model.connector.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.connector.parameters())
    assert model.llm.model.layers[0].gradient_checkpointing


def test_the_connector_starts_the_same_on_every_rank_and_another_seed_starts_elsewhere(config, store) -> None:
    first = build_model(config(), store).connector.state_dict()
    torch.manual_seed(123)
    settings = config()
    again = build_model(settings, store).connector.state_dict()
    other = build_model(settings.model_copy(update={"seed": 1}), store).connector.state_dict()
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert not torch.equal(other["mbtf.0.weight"], first["mbtf.0.weight"])


def test_the_llm_is_taken_as_it_is(config, store: StoreSpec, llm_folder: Path) -> None:
    model = build_model(config(), store)
    for name, weight in load_file(llm_folder / "model.safetensors").items():
        assert torch.equal(model.llm.state_dict()[name], weight)


def test_parts_that_do_not_fit_are_refused(config, store: StoreSpec, clip_folder: Path) -> None:
    with pytest.raises(ValueError, match="needs block03, block05; there is only block01, block02, block04"):
        build_model(config(connector={"blocks": [3, 4, 5]}), store)
    with pytest.raises(ValueError, match="a language model of type 'clip_vision_model' is not known"):
        build_model(config(llm=str(clip_folder)), store)
    with pytest.raises(OSError, match="nowhere"):
        build_model(config(llm="/nowhere/at/all"), store)
    with pytest.raises(ValueError, match=r"holds no connector.safetensors"):
        build_model(config(connector_from="/nowhere"), store)


def test_the_tokenizer_is_the_one_that_is_named(config) -> None:
    assert load_tokenizer(config()).pad_id == 0
    with pytest.raises(ValueError, match=r"tokenizer.model does not exist"):
        load_tokenizer(config(tokenizer=None))
    with pytest.raises(ValueError, match=r"model.tokenizer '/nowhere' is no folder here, .* correct model.tokenizer"):
        load_tokenizer(config(tokenizer="/nowhere"))
    with pytest.raises(ValueError, match=r"model.llm '/nowhere' is no folder here, .* correct model.llm"):
        load_tokenizer(config(tokenizer=None, llm="/nowhere"))


def test_a_file_that_is_no_tokenizer_is_named(config, tmp_path: Path) -> None:
    for content in (b"", b"\xff"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer.model is no SentencePiece model"):
            load_tokenizer(config(tokenizer=str(tmp_path)))


def test_stage_two_starts_from_the_connector_of_stage_one(config, store: StoreSpec, tmp_path: Path) -> None:
    first = build_model(config(("connector",)), store)
    with torch.no_grad():
        first.connector.mbtf[0].weight.add_(1)
    export_connector(first.connector, tmp_path / "connector")
    second = build_model(config(connector_from=str(tmp_path / "connector")), store)
    for name, weight in first.connector.state_dict().items():
        assert torch.equal(second.connector.state_dict()[name], weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["connector"]


def test_another_connector_is_refused_with_every_difference(config, store: StoreSpec, tmp_path: Path) -> None:
    export_connector(build_model(config(), store).connector, tmp_path / "connector")
    other = build_model(config(connector={"blocks": [1, 2], "preset": "released"}), store)
    with pytest.raises(
        ValueError, match=r"preset: 'paper' there, 'released' now; blocks: \(1, 2, 4\) there, \(1, 2\) now"
    ):
        load_connector(other.connector, tmp_path / "connector")


def test_who_may_read_one_file_of_an_export_may_read_all(config, store: StoreSpec, tmp_path: Path) -> None:
    model = build_model(config(), store)
    export_connector(model.connector, tmp_path / "connector")
    export_model(model, load_tokenizer(config()), [store], tmp_path / "model")
    (tmp_path / "usual").touch()
    for path in tmp_path.glob("*/*"):
        assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("connector.safetensors", b""),
        ("connector.safetensors", b"\xff" * 100),
        ("connector.json", b"{"),
        ("connector.json", b"[1]"),
        ("connector.json", b"[" * 100_000),
        ("connector.json", b"\xff"),
    ],
)
def test_a_damaged_connector_is_named(config, store: StoreSpec, tmp_path: Path, file: str, content: bytes) -> None:
    connector = build_model(config(), store).connector
    export_connector(connector, tmp_path / "connector")
    (tmp_path / "connector" / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"connector holds a damaged connector: .* put a copy of it back"):
        load_connector(connector, tmp_path / "connector")


def test_weights_of_another_connector_under_its_shape_are_named(config, store: StoreSpec, tmp_path: Path) -> None:
    connector = build_model(config(), store).connector
    export_connector(connector, tmp_path / "connector")
    save_file({"weight": torch.zeros(2)}, tmp_path / "connector" / "connector.safetensors")
    with pytest.raises(ValueError, match=r"connector.safetensors is not of .*connector.json"):
        load_connector(connector, tmp_path / "connector")


def test_the_exported_model_sees_what_it_was_trained_on(
    config, store: StoreSpec, tmp_path: Path, clip_folder: Path
) -> None:
    """The same image through a bf16 store and through the live CLIP: equal columns, and so equal logits."""
    trained = build_model(config(), store).eval()
    export_model(trained, load_tokenizer(config()), [store], tmp_path / "model", dtype=torch.bfloat16)
    live = CompactVisionForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert {p.dtype for p in live.parameters()} == {torch.bfloat16}
    pixels = torch.randn(2, 3, 32, 32)
    features = Encoder(str(clip_folder), None, store.columns, store.compute)(pixels)
    stored = {
        c.name: from_payload(to_payload(features[c.name], "bf16"), c, "bf16", torch.bfloat16) for c in store.columns
    }
    seen = live.encode_images(pixels.bfloat16())
    assert stored.keys() == seen.keys()
    assert all(torch.equal(stored[name], seen[name]) for name in seen)
    ids = torch.tensor([[1, 5, *[736] * 4, 8], [1, 6, *[736] * 4, 8]])
    assert torch.equal(live(ids, columns=stored).logits, live(ids, pixel_values=pixels.bfloat16()).logits)
    exact = trained(ids, columns={name: column.float() for name, column in stored.items()}).logits
    assert (live(ids, columns=stored).logits.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_exporting_keeps_every_weight_and_leaves_the_trained_model_alone(
    config, store: StoreSpec, tmp_path: Path
) -> None:
    trained = build_model(config(), store)
    before = {name: weight.clone() for name, weight in trained.state_dict().items()}
    export_model(trained, load_tokenizer(config()), [store], tmp_path / "model")
    assert trained.vision_tower is None
    assert trained.training
    saved = load_file(tmp_path / "model" / "model.safetensors")
    for name, weight in before.items():
        assert torch.equal(saved[name], weight)
        assert torch.equal(trained.state_dict()[name], weight)
    assert sum(name.startswith("vision_tower.") for name in saved) == len(saved) - len(before)


def test_the_encoder_may_be_the_vision_half_of_a_whole_clip(
    config, store: StoreSpec, tmp_path: Path, clip_folder: Path
) -> None:
    from transformers import CLIPConfig, CLIPVisionModel

    tower = CLIPVisionModel.from_pretrained(clip_folder)
    text = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
    whole = CLIPModel(CLIPConfig(vision_config=tower.config.to_dict(), text_config={"vocab_size": 50, **text}))
    whole.vision_model.load_state_dict(tower.state_dict())
    whole.save_pretrained(tmp_path / "clip")
    other = store.model_copy(update={"encoder": describe_encoder(str(tmp_path / "clip"), None)})
    export_model(build_model(config(), other), load_tokenizer(config()), [other], tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    for name, weight in tower.state_dict().items():
        assert torch.equal(saved[f"vision_tower.{name}"], weight)


CLEAN = """
import json, sys
sys.modules["training"] = sys.modules["pipeline"] = None  # importing either would fail
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers import pipeline
folder = sys.argv[1]
image = Image.new("RGB", (50, 40), (200, 30, 10))
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
texts = ["USER: <image>\\nWhat is this? ASSISTANT:", "USER: Hi. ASSISTANT:"]
inputs = processor(images=[image], text=texts, return_tensors="pt", padding=True)
new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1]:]
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
hidden = base(**inputs).last_hidden_state
ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]}]
try:
    ask(text=[{"role": "user", "content": 2 * chat[0]["content"]}], max_new_tokens=4)
except ValueError as error:
    refused = str(error)
model.save_pretrained("again")
processor.save_pretrained("again")
text_only = processor(text=texts[1], return_tensors="pt")
print(json.dumps({
    "refused": refused,
    "text": model.generate(**text_only, max_new_tokens=4, do_sample=False).tolist()[0],
    "ids": inputs["input_ids"].tolist(),
    "new": new.tolist(),
    "same": torch.allclose(base.llm.lm_head(hidden), model(**inputs).logits),
    "chat": ask(text=chat, max_new_tokens=4, return_full_text=False)[0]["generated_text"],
    "plain": ask(images=image, text=texts[0], max_new_tokens=4)[0]["generated_text"],
    "tokens": AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(texts[1])["input_ids"],
    "aspect": AutoImageProcessor.from_pretrained(folder, trust_remote_code=True).aspect,
    "again": [AutoImageProcessor.from_pretrained("again", trust_remote_code=True).aspect,
              type(AutoProcessor.from_pretrained("again", trust_remote_code=True)).__name__,
              AutoTokenizer.from_pretrained("again", trust_remote_code=True)(texts[1])["input_ids"],
              type(AutoModelForImageTextToText.from_pretrained("again", trust_remote_code=True)).__name__],
}))
"""


def test_the_exported_folder_runs_where_this_project_is_not(config, store: StoreSpec, tmp_path: Path) -> None:
    export_model(build_model(config(), store), load_tokenizer(config()), [store], tmp_path / "model")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": "",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    done = subprocess.run(
        [sys.executable, "-c", CLEAN, str(tmp_path / "model")],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert [row.count(736) for row in seen["ids"]] == [4, 0]
    assert all(len(row) == 4 for row in seen["new"])
    assert seen["same"]
    assert seen["aspect"] == "square"
    assert seen["again"] == [
        "square", "CompactVisionProcessor", seen["tokens"], "CompactVisionForConditionalGeneration"
    ]  # fmt: skip
    assert seen["tokens"] == [index for index in seen["ids"][1] if index != 0]
    assert seen["plain"].startswith("USER: <image>\nWhat is this? ASSISTANT:")
    assert isinstance(seen["chat"], str)
    assert "holds 2 images" in seen["refused"]
    assert seen["text"] == [index for index in seen["ids"][1] if index != 0] + seen["new"][1]


def test_several_tokens_per_window_have_as_many_placeholders(config, store: StoreSpec, tmp_path: Path) -> None:
    trained = build_model(config(connector={"blocks": [1, 2, 4], "fused_tokens": 2}), store)
    export_model(trained, load_tokenizer(config()), [store], tmp_path / "model")
    processor = CompactVisionProcessor.from_pretrained(tmp_path / "model")
    model = CompactVisionForConditionalGeneration.from_pretrained(tmp_path / "model")
    picture = Image.new("RGB", (50, 40), (200, 30, 10))
    inputs = processor(images=picture, text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == model.config.image_tokens == 8
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_the_folder_says_what_it_is(config, store: StoreSpec, tmp_path: Path) -> None:
    export_model(build_model(config(), store), load_tokenizer(config()), [store], tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    for fact in ("4 of 16 patch tokens", store.dataset, store.encoder.revision, "aspect square", "block01, block02"):
        assert fact in card
    settings = CompactVisionConfig.from_pretrained(tmp_path / "model")
    assert settings.auto_map["AutoModelForImageTextToText"] == "model.CompactVisionForConditionalGeneration"
    assert settings.auto_map["AutoModel"] == "model.CompactVisionModel"
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 0)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    for content in ("config.json", "model.safetensors"):
        with replaced_folder(tmp_path / "out") as folder:
            (folder / content).touch()
        assert [path.name for path in (tmp_path / "out").iterdir()] == [content]
    with pytest.raises(RuntimeError), replaced_folder(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("there", ["out", "out/photo.jpg", "out/checkpoints/ba00000001/composer.pt"])
def test_what_is_no_export_is_never_replaced(tmp_path: Path, there: str) -> None:
    path = tmp_path / there
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    if "checkpoints" in there:
        (tmp_path / "out" / "config.json").touch()  # a run has one too
    refused = pytest.raises(ValueError, match=r"out is no exported folder .* would be replaced; name another")
    with refused, replaced_folder(tmp_path / "out") as folder:
        (folder / "config.json").touch()
    assert path.read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
