"""From training to files: the connector alone (stage 1), or a whole Hugging Face folder (stage 2).

Every folder is written beside its final place and renamed, so one that exists is whole.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.schema import StoreSpec
from training.connectors import RELEASED_BLOCKS, Connector, ConnectorConfig, build_connector
from training.flops import prefill_flops
from training.model import CompactVisionForConditionalGeneration

if TYPE_CHECKING:
    from training.tokenizer import Tokenizer

WEIGHTS, SHAPE = "connector.safetensors", "connector.json"
_RELEASED_NAMES = {
    "mm_projector_crosslayer.0": "mbtf.0",
    "mm_projector_crosslayer.2": "mbtf.2",
    "mm_projector.0": "stf.fuse",
    "mm_projector.2": "stf.project.0",
}


def export_connector(model: CompactVisionForConditionalGeneration, folder: Path) -> None:
    """Write the connector's weights and its shape: what stage 2 starts from."""
    with replaced_folder(folder) as target:
        weights = {name: weight.detach().cpu().contiguous() for name, weight in model.connector.state_dict().items()}
        save_file(weights, target / WEIGHTS)
        (target / SHAPE).write_text(json.dumps(asdict(model.connector.config), indent=1), encoding="utf-8")


def load_connector(target: Connector | CompactVisionForConditionalGeneration, folder: Path) -> None:
    """Load the weights that `export_connector` wrote.

    Raises:
        ValueError: if there are none, or the connector has another shape, naming each difference.
    """
    connector = target if isinstance(target, Connector) else target.connector
    if not (folder / WEIGHTS).is_file() or not (folder / SHAPE).is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS} with its {SHAPE}; stage 1 writes them to its run's connector/")
    theirs = asdict(ConnectorConfig(**json.loads((folder / SHAPE).read_text(encoding="utf-8"))))
    mine = asdict(connector.config)
    differing = [f"{name}: {theirs[name]} there, {mine[name]} here" for name in mine if theirs[name] != mine[name]]
    if differing:
        raise ValueError(f"{folder} holds another connector: " + "; ".join(differing))
    connector.load_state_dict(load_file(folder / WEIGHTS))


def connector_from_released(state: Mapping[str, Tensor], grid: int = 24) -> Connector:
    """The connector of the published `mm_projector.bin`: a mapping of names to tensors, prefixes before `mm_` allowed.

    Widths, the number of blocks and k are read off the shapes.

    Raises:
        ValueError: naming every key that is missing, and every one that was not used.
    """
    tensors = {name[name.index("mm_projector") :]: t for name, t in state.items() if "mm_projector" in name}
    wanted = {
        f"{theirs}.{kind}": f"{mine}.{kind}" for theirs, mine in _RELEASED_NAMES.items() for kind in ("weight", "bias")
    }
    missing, unused = sorted(wanted.keys() - tensors.keys()), sorted(state.keys() - _original(state, wanted))
    if missing or unused:
        raise ValueError(f"not a released projector: missing {missing or 'nothing'}, not used {unused or 'nothing'}")
    c1, c3 = len(tensors["mm_projector_crosslayer.2.bias"]), len(tensors["mm_projector.2.bias"])
    blocks = tensors["mm_projector_crosslayer.0.weight"].shape[1] // c1
    k = round((tensors["mm_projector.0.weight"].shape[1] // c1) ** 0.5)
    if blocks != len(RELEASED_BLOCKS):
        raise ValueError(f"the released projector reads {len(RELEASED_BLOCKS)} blocks; these weights read {blocks}")
    shape = ConnectorConfig(preset="released", kernel_size=k, grid=grid, vision_width=c1, llm_width=c3)
    connector = build_connector(shape)
    connector.load_state_dict({mine: tensors[theirs] for theirs, mine in wanted.items()})
    return connector.to(tensors["mm_projector.0.weight"].dtype)


def _original(state: Mapping[str, Tensor], wanted: Mapping[str, str]) -> set[str]:
    return {name for name in state if "mm_projector" in name and name[name.index("mm_projector") :] in wanted}


def export_model(
    model: CompactVisionForConditionalGeneration,
    tokenizer: Tokenizer,
    store: StoreSpec,
    folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a folder from which transformers loads the whole model, the store's own vision encoder included.

    Args:
        model: as trained; it is left as it is.
        tokenizer: of the language model.
        store: says which encoder made the features and how images became square.
        folder: replaced if it exists.
        dtype: of the weights; None keeps each part's own.

    Raises:
        OSError: if the vision encoder cannot be read.
    """
    from transformers import CLIPVisionModel, GenerationConfig

    from training.processor import CompactVisionImageProcessor, CompactVisionProcessor, CompactVisionTokenizer

    local = Path(store.encoder.id).is_dir()  # its revision is then a digest, which no Hub knows
    tower = CLIPVisionModel.from_pretrained(
        store.encoder.id, revision=None if local else store.encoder.revision, dtype=dtype or model.llm.dtype
    )
    whole = CompactVisionForConditionalGeneration.from_parts(model.llm, model.connector, tower, aspect=store.aspect)
    text = CompactVisionTokenizer(
        str(tokenizer.model_file), legacy=tokenizer.legacy, image_token_id=whole.config.image_token_id
    )
    images = CompactVisionImageProcessor(aspect=store.aspect, image_size=store.encoder.image_size)
    processor = CompactVisionProcessor(images, text, image_tokens=whole.config.image_tokens)
    whole.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    state: dict[str, Tensor] | None = None
    if dtype is not None:
        whole.config.dtype = dtype
        state = {name: weight.to(dtype) for name, weight in whole.state_dict().items()}
    with replaced_folder(folder) as target:
        processor.save_pretrained(target)
        whole.save_pretrained(target, state_dict=state)
        (target / "README.md").write_text(_card(whole, store), encoding="utf-8")


def _card(model: CompactVisionForConditionalGeneration, store: StoreSpec) -> str:
    """The model card: what it is, what it was trained on, how to run it; numbers from the parts themselves."""
    connector, text, encoder = model.connector, model.config.text_config, store.encoder
    patches, tokens = encoder.grid**2, connector.tokens
    rows = {
        "vision tokens per image": f"{tokens} of {patches} patch tokens",
        "prefill of the vision tokens": f"{prefill_flops(text, tokens) / 1e12:.4g} TFLOPs, instead of "
        f"{prefill_flops(text, patches) / 1e12:.4g} for all patch tokens (language model alone, no head)",
        "connector": f"`{json.dumps(asdict(connector.config))}`",
        "columns read": ", ".join(connector.columns),
        "parameters": f"connector {_count(connector):,}, language model {_count(model.llm):,}, "
        f"vision encoder {_count(model.vision_tower):,}",
        "language model": model.llm.name_or_path,
        "vision encoder": f"{encoder.id} at {encoder.revision}, frozen",
        "images": f"aspect {store.aspect}, {encoder.image_size} x {encoder.image_size} pixels",
        "trained on features": f"{store.samples} samples, data {store.dataset}, codec {store.codec}, "
        f"computed in {store.compute}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
---
# An image in {tokens} vision tokens

| | |
|---|---|
{table}

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
picture, words = {{"type": "image", "path": "photo.jpg"}}, {{"type": "text", "text": "What is this?"}}
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": [picture, words]}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=128)
print(processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```

An image goes first in its message, one image per conversation. `pip install transformers sentencepiece pillow` is all
it needs.
"""


def _count(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which becomes `folder` at the end, or nothing at all if writing fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    fresh.mkdir()
    try:
        yield fresh
        if folder.exists():
            old = fresh.with_name(fresh.name + ".old")
            folder.rename(old)
            fresh.rename(folder)
            shutil.rmtree(old)
        else:
            fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
