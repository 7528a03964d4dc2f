"""The model card: what a model is, what it was trained on and how, its losses and scores; numbers from files and parts.

Nothing is typed by hand: a figure that is not known is not there.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.regular import check_regular
from training.config import TrainConfig, flat
from training.release.records import CONFIG, LAST, SKIPPED, final_loss, read_config, read_log

if TYPE_CHECKING:
    import torch

    from pipeline.schema import StoreSpec
    from training.model.model import CompactVisionForConditionalGeneration

USE = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
picture, words = {"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is this?"}
inputs = processor.apply_chat_template(
    [{"role": "user", "content": [picture, words]}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=128)
print(processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```

An image goes first in its message, one image per conversation. `pip install transformers sentencepiece pillow` is all
it needs."""


class CardFiles(NamedTuple):
    """Files that a card takes its figures from.

    Attributes:
        run: folder of the training run: its settings, its losses, and those of the stage that it started from.
        scores: files that training/evaluate.py wrote beside its answers.
        step: of the run, that the weights are of; None for its last.
    """

    run: Path | None = None
    scores: Sequence[Path] = ()
    step: int | None = None


NO_FILES = CardFiles()
_BAR, _ESCAPED_BAR = re.compile(r"(?<!\\)\|"), r"\\|"


def model_card(
    model: CompactVisionForConditionalGeneration, origin: Mapping[str, str], files: CardFiles = NO_FILES
) -> str:
    """The card as Markdown.

    Args:
        model: whole, with its vision tower.
        origin: rows about where the weights come from.
        files: what the figures of training and the scores are read from.

    Raises:
        ValueError: if a file of scores is none.
    """
    parts = [
        f"# An image in {model.connector.tokens} vision tokens",
        _table({**_facts(model), **origin}),
        USE,
        *trained(files.run, files.step),
        *_scores(files.scores),
    ]
    return "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n" + "\n\n".join(parts) + "\n"


def store_facts(stores: Sequence[StoreSpec]) -> dict[str, str]:
    """What the features were that a model was trained on; the stores have the same encoder, pixels and codec."""
    store, encoder = stores[0], stores[0].encoder
    of = [f"{store.samples} samples, data {escaped(store.dataset)}" for store in stores]
    fingerprints = [hashlib.sha256(store.model_dump_json().encode()).hexdigest() for store in stores]
    return {
        "vision encoder": f"{escaped(encoder.id)} at {escaped(encoder.revision)}, frozen",
        "images": f"aspect {store.aspect}, {encoder.image_size} x {encoder.image_size} pixels",
        "trained on features": f"{'; '.join(of)}, codec {store.codec}, computed in {store.compute}",
        "feature store": f"fingerprint {', '.join(fingerprints)}",
    }


def _facts(model: CompactVisionForConditionalGeneration) -> dict[str, str]:
    """Sizes and costs of the model, each from its own configuration."""
    from training.cost.flops import image_flops, kv_cache_bytes, prefill_flops

    connector, text, vision = model.connector, model.llm.config, model.config.vision_config
    patches, tokens = connector.config.grid**2, connector.tokens
    flops = image_flops(text, vision, connector.config, text_tokens=0)
    parts = (flops.encoder, flops.connector, flops.prefill)
    encoder, fusion, prefill = map(_flops_text, parts)
    size, layers = model.llm.dtype.itemsize, connector.config.tokens_per_layer(text.num_hidden_layers)
    kept, instead = (kv_cache_bytes(text, count, size) / 2**20 for count in (layers, patches))
    return {
        "vision tokens per image": f"{tokens} of {patches} patch tokens",
        "prefill of the vision tokens": f"{prefill}, instead of "
        f"{_flops_text(prefill_flops(text, patches))} for all patch tokens (only the language model, no head)",
        "one image in all": f"{_flops_text(sum(parts))}: vision encoder {encoder}, connector {fusion}, "
        f"prefill {prefill}",
        "KV cache of an image": f"{kept:.4g} MiB, instead of {instead:.4g}",
        "connector": f"`{json.dumps(asdict(connector.config))}`",
        "columns read": ", ".join(connector.columns),
        "parameters": f"connector {_count(connector):,}, language model {_count(model.llm):,}, "
        f"vision encoder {_count(model.vision_tower):,}",
        "language model": escaped(model.llm.name_or_path or "as converted"),
    }


def escaped(text: Any) -> str:
    """A text that others wrote, as one line without tag, image, code, column, or link behind other words."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`\[\]|])", r"\\\1", line).replace("://", ":&#47;&#47;")


def _code(value: Any) -> str:
    """A setting's value as code, which it cannot end."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39))}`"


def _flops_text(flops: int) -> str:
    """FLOPs in the largest unit of which there is at least a tenth."""
    scale, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "G")) if flops >= s / 10), (1e6, "M"))
    return f"{flops / scale:.4g} {unit}FLOPs"


def _count(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def trained(run: Path | None, step: int | None = None) -> list[str]:
    """A section for each stage that led to `run`, the first stage first: its settings, and its losses up to `step`.

    Raises:
        ValueError: if a file in which one speaks of itself is damaged. OSError: if it cannot be read.
    """
    if run is None or not (run / CONFIG).is_file():
        return []
    settings = read_config(run)
    earlier = trained(stage_before(settings))
    named = flat(settings.model_dump(mode="json"))
    rows = {escaped(key): _code(value) for key, value in named.items() if key not in ("run", "data.cache_dir")}
    lines = read_log(run, step=step)
    text = f"## Trained: {', '.join(settings.train)}\n\n"
    if lines:
        at = (
            "the first step" if lines[0]["step"] == 1 else f"step {lines[0]['step']:,.0f}, the first that its log holds"
        )
        skipped = len(read_log(run, SKIPPED))
        text += (
            f"{lines[-1]['step']:,.0f} steps in {sum(line['step_s'] for line in lines):,.0f} s; loss "
            f"{lines[0]['loss']:.4f} at {at}, {final_loss(lines):.4f} over the last {min(LAST, len(lines))}"
            f"{f'; {skipped:,} examples that teach nothing were skipped' if skipped else ''}.\n\n"
        )
    if measured := [line for line in lines if "heldout_loss" in line]:
        text += (
            f"On held-out examples: loss {measured[-1]['heldout_loss']:.4f}, {measured[-1]['heldout_accuracy']:.1%} of "
            f"the tokens right, after step {measured[-1]['step']:,.0f}.\n\n"
        )
    return [*earlier, text + "<details><summary>Settings</summary>\n\n" + _table(rows) + "\n\n</details>"]


def stage_before(settings: TrainConfig) -> Path | None:
    """The folder with the records of the run that a connector comes from; None if that is not known.

    The end of a run leaves the connector in the run's folder; one of a checkpoint has the records beside it. Another
    folder with a `config.json` and weights is a model's.
    """
    if settings.model.connector_from is None:
        return None
    folder = Path(settings.model.connector_from)
    if (folder / CONFIG).is_file():
        return folder
    return None if any(folder.parent.glob("*.safetensors")) else folder.parent


def _scores(files: Sequence[Path]) -> list[str]:
    """The section of scores, a row for each file; nothing without files."""
    if not files:
        return []
    rows = {}
    for path in files:
        try:
            check_regular(path)
            scores = json.loads(path.read_text(encoding="utf-8"))
            name = path.name.removesuffix(".json").removesuffix(".scores")
            rows[escaped(name)] = _score_text(scores)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(
                f"{path} holds no scores ({type(error).__name__}: {error}); name a file of training/evaluate.py"
            ) from error
    return ["## Scores\n\n" + _table(rows)]


def _score_text(scores: Mapping[str, Any]) -> str:
    """The score of a benchmark or of a file of questions, with its 95% interval, its count, and its categories."""
    name, value = (scores["headline"], scores["score"]) if "headline" in scores else ("accuracy", scores["accuracy"])
    if value is None:
        return f"{scores['questions']:d} questions, whose truth is not known"
    interval = scores.get("interval")
    text = f"{escaped(name)} {value:.4g}" + (f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "")
    parts = [f"{escaped(category)} {part['accuracy']:.4g}" for category, part in scores.get("categories", {}).items()]
    return ", ".join([text, f"{scores['questions']:d} questions", *parts])


def _table(rows: Mapping[str, str]) -> str:
    """Two columns in Markdown, without a heading."""
    # A bar that is not escaped yet would end the cell, in code too.
    lines = [f"| {name} | {_BAR.sub(_ESCAPED_BAR, value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
