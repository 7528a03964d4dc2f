"""The authors' checkpoints in and out, on small ones that are laid out exactly like theirs."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from training.convert import main
from training.model.model import CompactVisionForConditionalGeneration
from training.model.tokenizer import Tokenizer
from training.release.llava import TOWER, connector_from_released, give_out, read_tensors, take_in

C1, C3 = 16, 64


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of 24 blocks, as the released connector reads them, of width 16."""
    torch.manual_seed(0)
    shape = {"hidden_size": C1, "intermediate_size": 32, "num_hidden_layers": 24, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("clip24")
    CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **shape)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    torch.manual_seed(1)
    shape = {"hidden_size": C3, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("vicuna")
    config = LlamaConfig(vocab_size=736, max_position_embeddings=512, rms_norm_eps=1e-5, **shape)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    Tokenizer(tiny_tokenizer / "tokenizer.model", legacy=False).save(folder)
    return folder


def projector(arm: str = "stf") -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    layers = {"mm_projector_crosslayer.0": (4 * C1, 8 * C1), "mm_projector_crosslayer.2": (C1, 4 * C1)}
    layers |= {"mm_projector.0": (16 * C1, 4 * C1), "mm_projector.2": (C3, 16 * C1)}
    if arm == "mlp":
        layers = {"mm_projector.0": (C3, C1), "mm_projector.2": (C3, C3)}
    state = {}
    for name, shape in layers.items():
        state[f"model.{name}.weight"] = torch.randn(shape).bfloat16()
        state[f"model.{name}.bias"] = torch.randn(shape[0]).bfloat16()
    return state


@pytest.fixture
def tuned(llm: Path, clip: Path, tmp_path: Path) -> Path:
    """A fine-tuned folder as the authors publish it: the LLM's keys, 8 of the projector, 391 of CLIP, in two files."""
    folder = tmp_path / "llava-stf"
    folder.mkdir()
    tower = CLIPVisionModel.from_pretrained(clip).state_dict()
    assert len(tower) == 391
    language = LlamaForCausalLM.from_pretrained(llm).state_dict()
    torch.save(language, folder / "pytorch_model-00001-of-00002.bin")
    theirs = {f"model.vision_tower.vision_tower.vision_model.{name}": weight for name, weight in tower.items()}
    torch.save({**projector(), **theirs}, folder / "pytorch_model-00002-of-00002.bin")
    settings = json.loads((llm / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    settings |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "image_aspect_ratio": "pad"}
    settings |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "mm_vision_tower": str(clip)}
    settings |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu"}
    (folder / "config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((llm / name).read_bytes())
    return folder


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in theirs)


def test_a_fine_tuned_folder_comes_in_and_goes_out_bit_for_bit(tuned: Path, clip: Path, tmp_path: Path) -> None:
    assert take_in(tuned, tmp_path / "ours") == []
    model = CompactVisionForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert model.connector.columns[0] == "block23"
    assert (model.config.aspect, model.config.image_tokens) == ("pad", 4)
    assert model.llm.config.rms_norm_eps == 1e-5
    assert model.llm.config.rope_parameters["rope_theta"] == 10000.0
    ids = torch.tensor([[1, 5, *[736] * 4, 8]])
    assert model(ids, pixel_values=torch.randn(1, 3, 32, 32).bfloat16()).logits.isfinite().all()
    give_out(tmp_path / "ours", tmp_path / "theirs", clip=str(clip))
    assert same(read_tensors(tmp_path / "theirs"), read_tensors(tuned))
    assert same(read_tensors(tmp_path / "theirs" / "mm_projector.bin"), projector())
    before, after = (json.loads((f / "config.json").read_text()) for f in (tuned, tmp_path / "theirs"))
    kept = (*[name for name in before if name.startswith("mm_")], "rope_theta", "rope_scaling", "image_aspect_ratio")
    assert all(after[name] == before[name] for name in ("model_type", "architectures", "hidden_size", *kept))
    assert take_in(tmp_path / "theirs", tmp_path / "again") == []
    first, second = (read_tensors(tmp_path / name) for name in ("ours", "again"))
    assert same(first, second)


def test_it_computes_what_its_parts_compute(tuned: Path, tmp_path: Path, clip: Path) -> None:
    take_in(tuned, tmp_path / "ours")
    model = CompactVisionForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    pixels, weights = torch.randn(1, 3, 32, 32), {name[6:]: w.float() for name, w in projector().items()}
    hidden = CLIPVisionModel.from_pretrained(clip, dtype=torch.float32)(pixels, output_hidden_states=True).hidden_states
    x = torch.cat([hidden[block][:, 1:] for block in (23, 21, 18, 15, 12, 9, 6, 3)], dim=-1)

    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = layer("mm_projector_crosslayer.2", torch.nn.functional.gelu(layer("mm_projector_crosslayer.0", x)))
    image = x.transpose(1, 2).reshape(1, C1, 4, 4)
    unfolded = torch.nn.functional.unfold(image, kernel_size=2, stride=2).transpose(1, 2)
    expected = layer("mm_projector.2", torch.nn.functional.gelu(layer("mm_projector.0", unfolded)))
    torch.testing.assert_close(model.get_image_features(pixels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("arm", "tokens"), [("stf", 4), ("mlp", 16)])
def test_a_projector_comes_in_beside_a_language_model(
    arm: str, tokens: int, llm: Path, clip: Path, tmp_path: Path
) -> None:
    torch.save(projector(arm), tmp_path / "mm_projector.bin")
    take_in(tmp_path / "mm_projector.bin", tmp_path / "ours", llm=str(llm), clip=str(clip), aspect="square")
    model = CompactVisionForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert (model.config.aspect, model.config.image_tokens) == ("square", tokens)
    give_out(tmp_path / "ours", tmp_path / "theirs")
    assert same(read_tensors(tmp_path / "theirs" / "mm_projector.bin"), projector(arm))
    assert sum(name.startswith(TOWER) for name in read_tensors(tmp_path / "theirs")) == 391


def resized(hidden: int, narrow: int, c3: int = C3) -> dict[str, torch.Tensor]:
    """A released projector of another width between its two layers."""
    second = {"model.mm_projector.2.weight": torch.randn(c3, narrow), "model.mm_projector.2.bias": torch.randn(c3)}
    first = {
        "model.mm_projector.0.weight": torch.randn(hidden, 4 * C1),
        "model.mm_projector.0.bias": torch.randn(hidden),
    }
    return {**projector(), **{name: weight.bfloat16() for name, weight in {**first, **second}.items()}}


@pytest.mark.parametrize("hidden", [20 * C1, 16 * C1])  # C3 = 4*C1 makes 16*C1 = 4*C3, as at 7B; 13B's is not 4*C3
def test_the_width_between_the_projectors_layers_is_read_off_the_checkpoint(
    hidden: int, llm: Path, clip: Path, tmp_path: Path
) -> None:
    state = resized(hidden, hidden)
    torch.save(state, tmp_path / "mm_projector.bin")
    take_in(tmp_path / "mm_projector.bin", tmp_path / "ours", llm=str(llm), clip=str(clip))
    model = CompactVisionForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert model.connector.config.hidden_width == (None if hidden == 4 * C3 else hidden)
    give_out(tmp_path / "ours", tmp_path / "theirs")
    assert same(read_tensors(tmp_path / "theirs" / "mm_projector.bin"), state)


def test_the_projector_of_13b_fits() -> None:
    with torch.device("meta"):
        shapes = {"crosslayer.0": (4096, 8192), "crosslayer.2": (1024, 4096)}
        state = {f"model.mm_projector_{name}.weight": torch.empty(shape) for name, shape in shapes.items()}
        state |= {f"model.mm_projector.{n}.weight": torch.empty(s) for n, s in ((0, (16384, 4096)), (2, (5120, 16384)))}
        state |= {name.replace("weight", "bias"): weight[:, 0] for name, weight in state.items()}
        connector = connector_from_released(state)
    assert (connector.config.kernel_size, connector.config.hidden_width, connector.tokens) == (2, 16384, 144)
    assert sum(weight.numel() for weight in state.values()) == sum(p.numel() for p in connector.parameters())
    assert connector.config.flops() > 2 * 144 * 16384 * (4096 + 5120)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (resized(16 * C1, 8 * C1), "kernel_size 2 with fused_tokens 2, where the published one has 1"),
        (
            {name: weight for name, weight in projector().items() if "crosslayer" not in name},
            "stf and tokenconcat of kernel_size 2 have these shapes both",
        ),
        (
            {**projector(), "model.mm_projector.0.weight": torch.zeros(16 * C1, 5 * C1)},
            "reads 80 channels, no k\\*k of the encoder's 16",
        ),
    ],
)
def test_shapes_that_fit_no_published_connector_or_two_are_not_guessed(
    state: dict[str, torch.Tensor], said: str, llm: Path, clip: Path, tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=f"not a released projector: .*{said}"):
        take_in(tmp_path / "mm_projector.bin", tmp_path / "ours", llm=str(llm), clip=str(clip))


@pytest.mark.parametrize(("layer", "block"), [(-2, 23), (-1, 24), (-12, 13), (3, 3)])
def test_the_block_of_a_plain_projector_comes_in_and_goes_out(
    layer: int, block: int, llm: Path, clip: Path, tmp_path: Path
) -> None:
    torch.save(projector("mlp"), tmp_path / "mm_projector.bin")
    (tmp_path / "config.json").write_text(json.dumps({"mm_vision_select_layer": layer}))
    take_in(tmp_path / "mm_projector.bin", tmp_path / "ours", llm=str(llm), clip=str(clip))
    assert CompactVisionForConditionalGeneration.from_pretrained(tmp_path / "ours").connector.columns == (
        f"block{block:02d}",
    )
    give_out(tmp_path / "ours", tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["mm_vision_select_layer"] == block - 25
    for wrong in (-26, 25, "last", None):
        (tmp_path / "config.json").write_text(json.dumps({"mm_vision_select_layer": wrong}))
        with pytest.raises(ValueError, match=rf"mm_vision_select_layer {wrong!r} .* 25 hidden states"):
            take_in(tmp_path / "mm_projector.bin", tmp_path / "ours", llm=str(llm), clip=str(clip))


def test_every_missing_and_every_unused_key_is_named(tuned: Path, tmp_path: Path) -> None:
    path = tuned / "pytorch_model-00002-of-00002.bin"
    state = torch.load(path, weights_only=True)
    post = f"{TOWER}post_layernorm.bias"
    torch.save({**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}, path)
    with pytest.raises(ValueError, match=r"missing nothing, not used .*inv_freq.*--ignore-unused"):
        take_in(tuned, tmp_path / "ours")
    assert take_in(tuned, tmp_path / "ours", ignore_unused=True) == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    del state[post]
    torch.save({**state, "model.norm.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError) as error:
        take_in(tuned, tmp_path / "ours", ignore_unused=True)
    assert post in str(error.value)
    assert "model.norm.weight of shape [64], found [3]" in str(error.value)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_nothing_but_tensors_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for value, said in (({"a": Evil()}, "not a file of plain tensors"), ({"a": 3}, "more than tensors")):
        torch.save(value, tmp_path / "mm_projector.bin")
        with pytest.raises(ValueError, match=said):
            read_tensors(tmp_path / "mm_projector.bin")
    assert not (tmp_path / "executed").exists()
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        read_tensors(tmp_path)


def test_other_connectors_are_refused_with_what_the_authors_code_loads(make_model, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "paper")
    with pytest.raises(
        ValueError, match=r"no connector FusionConfig\(arm='mbtf\+stf'.*preset='paper'.* preset released"
    ):
        give_out(tmp_path / "paper", tmp_path / "theirs")


def test_mistakes_on_the_command_line_are_said_in_a_line(
    tmp_path: Path, llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(projector(), tmp_path / "mm_projector.bin")
    save_file({"a": torch.zeros(1)}, tmp_path / "strange.safetensors")
    for source, more, said in (
        (tmp_path / "nothing", [], "holds no weights"),
        (tmp_path / "mm_projector.bin", [], "holds no language model; name it with --llm"),
        (tmp_path / "mm_projector.bin", ["--llm", str(llm), "--clip", str(llm)], "--clip"),
    ):
        monkeypatch.setattr(sys, "argv", ["convert.py", "import", str(source), "--out", str(tmp_path / "o"), *more])
        with pytest.raises(SystemExit, match=f"error: .*{said}"):
            main()
