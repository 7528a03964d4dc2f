"""The authors' checkpoints to models of this project, and back: LLaVA-STF's and LLaVA-1.5's names and files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.encoders.columns import block_of, grid_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPVisionModel, LlamaForCausalLM

    from training.model.model import CompactVisionForConditionalGeneration
    from training.model.reducers.connector import Connector

CLIP = "openai/clip-vit-large-patch14-336"
TOWER = "model.vision_tower.vision_tower.vision_model."  # before CLIP's names, as transformers 4 wrote them
PROJECTOR = "model.mm_projector"
_GIVE = "give the mm_projector.bin of LLaVA-STF or LLaVA-1.5"


def take_in(
    source: Path,
    out: Path,
    llm: str | None = None,
    clip: str | None = None,
    aspect: str | None = None,
    ignore_unused: bool = False,
) -> list[str]:
    """Write the authors' checkpoint as a model of this project; returns the keys that were not used.

    Raises:
        ValueError: naming every missing key and, unless they are to be ignored, every unused one; or what else does
            not fit. OSError: if a part cannot be read.
    """
    from training.model.model import CompactVisionForConditionalGeneration
    from training.model.tokenizer import Tokenizer
    from training.release.card import escaped, model_card
    from training.release.folder import write_model

    said = _settings(source if source.is_dir() else source.parent)
    state = read_tensors(source)
    whole = "model.embed_tokens.weight" in state  # with the language model, not only the projector
    if whole is (llm is not None):
        has, do = ("a language model", "leave out") if whole else ("no language model", "name it with")
        raise ValueError(f"{source} holds {has}; {do} --llm")
    # Take the state apart: CLIP's weights, the projector's, and what is left is the language model's.
    seen = {name.removeprefix(TOWER): state.pop(name) for name in list(state) if name.startswith(TOWER)}
    projector = {name: state.pop(name) for name in list(state) if name.startswith(PROJECTOR)}
    vision = _vision_config(clip or said.get("mm_vision_tower") or CLIP)
    connector = connector_from_released(projector, grid_of(vision), vision.hidden_size, _block(said, vision))
    text = _text_config(said) if whole else None
    unused = _check_keys(source, vision, seen, text, state, ignore_unused)
    model = CompactVisionForConditionalGeneration.from_parts(
        _language_model(llm, text, state), connector, _tower(vision, seen), aspect or _aspect(said)
    )
    tokenizer = Tokenizer.from_pretrained(str(source if whole else llm))
    write_model(model, tokenizer, out, model_card(model, {"converted from": escaped(source.name)}))
    return unused


def _settings(folder: Path) -> dict[str, Any]:
    """LLaVA's config.json beside the weights, empty if there is none; ValueError if it reads other features."""
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; download it again") from error
    feature = settings.get("mm_vision_select_feature", "patch")
    if feature != "patch":
        raise ValueError(f"{path}: mm_vision_select_feature {feature!r}; take a checkpoint that reads patch tokens")
    return dict(settings)


def _block(said: Mapping[str, Any], vision: Any) -> int:
    """The block that LLaVA's `mm_vision_select_layer` means, an index into the hidden states; -2 by default."""
    layer, states = said.get("mm_vision_select_layer", -2), vision.num_hidden_layers + 1
    if not isinstance(layer, int) or not -states <= layer < states:
        raise ValueError(
            f"mm_vision_select_layer {layer!r} in config.json is none of the encoder's {states} hidden states; give "
            "the encoder of the checkpoint with --clip"
        )
    return layer % int(states)


def _aspect(said: Mapping[str, Any]) -> str:
    """LLaVA's `image_aspect_ratio`: `pad`, or nothing for a centre crop; `pad` where nothing is said at all."""
    return "pad" if not said or said.get("image_aspect_ratio") == "pad" else "square"


def read_tensors(source: Path) -> dict[str, Tensor]:
    """Every tensor of a file, or of a folder's `*.safetensors`, else its `pytorch_model*.bin`.

    Raises:
        ValueError: if there is no such file, or one that holds anything but tensors.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = [source]
    if source.is_dir():
        files = sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
        files = files or sorted(source.glob("mm_projector.bin"))
    if not files or not files[0].is_file():
        raise ValueError(
            f"{source} holds no weights; name a folder with *.safetensors, pytorch_model*.bin or mm_projector.bin, or "
            "one of these files"
        )
    state: dict[str, Tensor] = {}
    for path in files:
        try:
            safe = path.suffix == ".safetensors"
            part = load_file(path) if safe else torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            strange = [name for name, value in part.items() if not isinstance(value, torch.Tensor)]
        except (pickle.UnpicklingError, SafetensorError, RuntimeError, AttributeError, EOFError) as error:
            first = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{path} is not a file of plain tensors, and nothing else is opened: {first}; download it again, or "
                "save its state_dict by itself"
            ) from error
        if strange:
            raise ValueError(f"{path} holds more than tensors: {strange[:5]}; save its state_dict by itself")
        state |= part
    return state


def _vision_config(name: str) -> Any:
    """The configuration of the CLIP `name` (Hub id or folder), which remembers that name."""
    from transformers import CLIPVisionConfig

    try:
        kind = CLIPVisionConfig.get_config_dict(name)[0].get("model_type")
        if kind not in ("clip", "clip_vision_model"):
            raise ValueError(f"it is of type {kind!r}")
        config = CLIPVisionConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no CLIP can be read from {name} ({str(error).partition(chr(10))[0]}); see --clip") from error
    config._name_or_path = name
    return config


def _text_config(said: Mapping[str, Any]) -> Any:
    """Llama's part of LLaVA's configuration."""
    from transformers import LlamaConfig

    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - {"architectures", "model_type", "dtype"}
    return LlamaConfig(**{name: value for name, value in said.items() if name in known})


def _check_keys(
    source: Path, vision: Any, seen: Mapping[str, Tensor], text: Any, state: Mapping[str, Tensor], ignore_unused: bool
) -> list[str]:
    """Compare the keys of both parts with what their models read; returns those that are not used."""
    import torch
    from transformers import CLIPVisionModel, LlamaForCausalLM

    with torch.device("meta"):
        tower = CLIPVisionModel._from_config(vision).state_dict() if seen else {}
        llm = {} if text is None else LlamaForCausalLM._from_config(text).state_dict()
    missing, unused = [], []
    for prefix, expected, found in ((TOWER, tower, seen), ("", llm, state)):
        missing += [f"{prefix}{name}" for name in expected if name not in found]
        unused += [f"{prefix}{name}" for name in found if name not in expected]
        for name in expected.keys() & found.keys():
            if expected[name].shape != found[name].shape:
                missing.append(f"{prefix}{name} of shape {[*expected[name].shape]}, found {[*found[name].shape]}")
    if missing or (unused and not ignore_unused):
        hint = "take a whole checkpoint" if missing else "add --ignore-unused to go on without the unused ones"
        raise ValueError(f"{source}: missing {missing or 'nothing'}, not used {unused or 'nothing'}; {hint}")
    return unused


def _tower(vision: Any, seen: Mapping[str, Tensor]) -> CLIPVisionModel:
    """CLIP with the checkpoint's own weights, else with those of its name."""
    from transformers import CLIPVisionModel

    name = vision._name_or_path
    if not seen:
        return CLIPVisionModel.from_pretrained(name)
    dtype = next(iter(seen.values())).dtype
    return CLIPVisionModel.from_pretrained(None, config=vision, state_dict=dict(seen), dtype=dtype)


def _language_model(name: str | None, text: Any, state: Mapping[str, Tensor]) -> LlamaForCausalLM:
    """The language model `name`, or the one whose weights `state` holds by name, in their dtype."""
    from transformers import LlamaForCausalLM

    if name is not None:
        return LlamaForCausalLM.from_pretrained(name)
    read = {key: weight for key, weight in state.items() if key == "lm_head.weight" or key.startswith("model.")}
    return LlamaForCausalLM.from_pretrained(
        None, config=text, state_dict=read, dtype=state["model.embed_tokens.weight"].dtype
    )


def connector_from_released(
    state: Mapping[str, Tensor], grid: int = 24, vision_width: int | None = None, block: int = 23
) -> Connector:
    """The connector of the published `mm_projector.bin`, or LLaVA-1.5's: a mapping of their names to tensors.

    Widths, the number of blocks and k are read off the shapes. Not in them are the encoder's `vision_width`, where it
    is known, and the one `block` that LLaVA-1.5's projector reads.

    Raises:
        ValueError: naming every key that is missing, and every one that was not used; or shapes of another connector.
    """
    from training.model.reducers import build_connector
    from training.model.reducers.fusion import published_config

    try:
        shape = published_config({name: tuple(weight.shape) for name, weight in state.items()}, grid, vision_width)
        if shape.arm == "mlp":
            shape = replace(shape, block=block)
        elif block != shape.block:
            raise ValueError(f"its config.json selects block {block}; the published one reads {shape.blocks}")
        connector = build_connector(shape)
        names = {
            f"{a}.{kind}": f"{b}.{kind}" for a, b in shape.published_names().items() for kind in ("weight", "bias")
        }
        connector.load_state_dict({mine: state[theirs] for theirs, mine in names.items()})
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"not a released projector: {error}; {_GIVE}") from error
    return connector.to(state["model.mm_projector.0.weight"].dtype)


def give_out(source: Path, out: Path, clip: str = CLIP) -> None:
    """Write a model with a released connector, or LLaVA-1.5's, as a LLaVA-1.5-style folder, CLIP's weights included.

    Raises:
        ValueError: if its connector is none that the authors' code can load. OSError: if it cannot be read.
    """
    import torch
    from huggingface_hub import save_torch_state_dict

    from training.model.exported import exported_model
    from training.model.tokenizer import Tokenizer
    from training.release.folder import replaced_folder

    model = exported_model(source)
    projector = released_projector(model.connector)
    state = {**model.llm.state_dict(), **projector}
    if model.vision_tower is not None:
        state |= {f"{TOWER}{name}": weight for name, weight in model.vision_tower.state_dict().items()}
    with replaced_folder(out) as target:
        save_torch_state_dict({name: weight.contiguous() for name, weight in state.items()}, target)
        torch.save(projector, target / "mm_projector.bin")
        Tokenizer.from_pretrained(str(source)).save(target)
        settings = json.dumps(_llava_settings(model, clip), indent=1)
        (target / "config.json").write_text(settings, encoding="utf-8")


def released_projector(connector: Connector) -> dict[str, Tensor]:
    """A connector's weights under the published names.

    Raises:
        ValueError: if the authors' code has no such connector.
    """
    names = connector.config.published_names()
    if not names:
        raise ValueError(
            f"the authors' code has no connector {connector.config}; it loads mbtf+stf with preset released and "
            "fused_tokens 1, and mlp: train one of these to export it"
        )
    weights = connector.state_dict()
    return {
        f"{theirs}.{kind}": weights[f"{mine}.{kind}"].contiguous()
        for theirs, mine in names.items()
        for kind in ("weight", "bias")
    }


def _select_layer(model: CompactVisionForConditionalGeneration) -> int:
    """LLaVA's index of the one block that is read, from the end: -2 for block 23 of 24. With MBTF it says nothing."""
    connector, vision = model.connector.config, model.config.vision_config
    if connector.arm != "mlp":
        return -2
    blocks = 24 if vision is None else vision.num_hidden_layers  # without an encoder: those of LLaVA's
    return block_of(connector.columns[0]) - (blocks + 1)


def _llava_settings(model: CompactVisionForConditionalGeneration, clip: str) -> dict[str, Any]:
    """LLaVA-1.5's config.json: Llama's settings in transformers 4's words, and the multimodal ones."""
    settings = model.llm.config.to_dict()
    rope = settings.pop("rope_parameters", None) or {}
    scaled = None if rope.get("rope_type", "default") == "default" else rope
    return {
        **settings,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": scaled,
        "torch_dtype": settings.pop("dtype", None),
        "image_aspect_ratio": "pad" if model.config.aspect == "pad" else None,
        "mm_hidden_size": model.connector.config.vision_width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": _select_layer(model),
        "mm_vision_tower": clip,
        "use_mm_proj": True,
    }
