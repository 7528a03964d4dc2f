"""Times and memory of an image, measured: encoder, connector, prefill, and what each new token takes.

Times are medians over rounds. Each row has a turn in every round, so what else the machine does slows all rows alike.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.encoders.columns import block_of, is_cls
from training.cost.flops import prefill_flops
from training.cost.shapes import shape as shape_of
from training.model.reducers import SHAPE
from training.model.reducers.fusion import FusionConfig

if TYPE_CHECKING:
    import torch

    from training.model.model import CompactVisionForConditionalGeneration
    from training.model.reducers.base import ConnectorConfig
    from training.model.reducers.connector import Connector


@dataclass(frozen=True)
class Measurement:
    """What is measured, and how.

    Attributes:
        model: folder that training/train.py exported, or a Hub id; else `config`, a shape with random weights.
        layers: only the first layers of the language model; None for all.
        device, dtype: `auto` takes a GPU where there is one, and bfloat16 on it.
        text_tokens: of the prompt. new_tokens: decoded after it. batch_size: prompts at once.
        rounds: medians are over these, after a warm-up.
    """

    model: str | None
    config: str | None
    layers: int | None
    device: str
    dtype: str
    text_tokens: int
    new_tokens: int
    batch_size: int
    rounds: int


def benchmark(given: Measurement) -> dict[str, Any]:
    """Times (ms), tokens/s and bytes of each number of vision tokens, one table.

    Raises:
        ValueError: for a shape that cannot be. OSError: if the model cannot be read.
    """
    import torch

    from training.model.reducers import build_connector

    gpu = torch.cuda.is_available()
    if given.device == "cuda" and not gpu:
        raise ValueError(f"--device cuda: torch {torch.__version__} finds no GPU here; use --device cpu")
    device = torch.device("cuda" if gpu and given.device != "cpu" else "cpu")
    default = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, default if given.dtype == "auto" else given.dtype)
    model = _load(given, device, dtype)
    connectors = []
    for config in reductions(model.connector.config):
        with device:  # where random weights are made in a moment
            own = config == model.connector.config
            connectors.append(model.connector if own else build_connector(config).to(dtype))
    figures: list[list[dict[str, float]]] = [[] for _ in connectors]
    with torch.inference_mode():
        for number in range(-2 if device.type == "cuda" else -1, given.rounds):  # a GPU needs longer to warm up
            print("warm-up" if number < 0 else f"round {number + 1}/{given.rounds}", file=sys.stderr, flush=True)
            for connector, seen in zip(connectors, figures, strict=True):
                once = _measure(model, connector, given)
                if number >= 0:
                    seen.append(once)
    rows = [_row(c, seen, figures[0], model) for c, seen in zip(connectors, figures, strict=True)]
    note = (
        f"{given.model or given.config}, batch {given.batch_size}, {given.text_tokens} text tokens, "
        f"{given.new_tokens} new ones; ms, medians of {given.rounds}; x: first row's prefill / this one's"
    )
    return {"title": note, "settings": asdict(given), "environment": _environment(model, device), "rows": rows}


def reductions(own: ConnectorConfig) -> list[ConnectorConfig]:
    """Connectors of all patch tokens, half, a quarter and a ninth of them, and the model's own, most tokens first.

    A reduction that does not divide the grid is left out.
    """
    shape = {name: getattr(own, name) for name in SHAPE}
    blocks = tuple(dict.fromkeys(block_of(name) for name in own.columns if not is_cls(name)))
    base = own if isinstance(own, FusionConfig) else FusionConfig(blocks=blocks, **shape)
    wanted: list[ConnectorConfig] = [
        own,
        replace(base, arm="mlp", block=max(base.blocks or ()), kernel_size=1, fused_tokens=1),
    ]
    for k, fused in ((2, 2), (2, 1), (3, 1)):
        if own.grid % k == 0:
            wanted.append(replace(base, arm="mbtf+stf", kernel_size=k, fused_tokens=fused))
    different: dict[int, ConnectorConfig] = {}
    for config in wanted:
        different.setdefault(config.tokens, config)
    return [different[tokens] for tokens in sorted(different, reverse=True)]


def _load(given: Measurement, device: torch.device, dtype: torch.dtype) -> CompactVisionForConditionalGeneration:
    """The model that is measured, with its own weights or, for a shape, random ones made on the device."""
    import torch

    from training.model.exported import exported_model
    from training.model.model import CompactVisionForConditionalGeneration

    if given.model:
        model = exported_model(given.model, dtype=dtype).to(device)
    else:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # 7B weights in float32 first would not fit many a machine
        assert given.config is not None
        config = shape_of(given.config, given.layers)
        parts: list[Any] = [config, config.text_config, config.vision_config]
        for part in parts:
            if part is not None:
                part.dtype = dtype
        try:
            with device:
                model = CompactVisionForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(before)
    if model.vision_tower is None:
        raise ValueError(
            f"{given.model or given.config} has no vision tower, so no image can be encoded; name a folder that "
            "training/export.py wrote"
        )
    return model.eval()  # type: ignore[no-any-return]


def _measure(
    model: CompactVisionForConditionalGeneration, connector: Connector, given: Measurement
) -> dict[str, float]:
    """One image, or a batch of them, from pixels on the host to the last new token's id on the host."""
    import torch

    from training.model.reducers.connector import Text

    device, llm, batch = model.device, model.llm, given.batch_size
    generator = torch.Generator().manual_seed(0)
    assert model.vision_tower is not None
    side = model.vision_tower.config.image_size
    pixels = torch.randn(batch, 3, side, side, generator=generator).to(model.dtype)
    text = torch.randint(3, llm.config.vocab_size, (batch, given.text_tokens), generator=generator)
    model.connector = connector  # it says which columns the encoder makes
    seconds: dict[str, float] = {}
    with _peak_memory(device) as memory:
        _wait(device)
        start = time.perf_counter()
        on_device, words = pixels.to(device), llm.get_input_embeddings()(text.to(device))
        columns = _timed(seconds, "encode", device, lambda: model.encode_images(on_device))
        around = Text(words, torch.ones_like(words[..., 0], dtype=torch.bool))  # for a connector that reads it
        vision = _timed(seconds, "connector", device, lambda: connector(columns, around))
        both = torch.cat([words[:, :1], vision, words[:, 1:]], dim=1)  # (batch, length, C3): BOS, image, prompt
        out = _timed(seconds, "prefill", device, lambda: llm(inputs_embeds=both, use_cache=True, logits_to_keep=1))
        token = out.logits[:, -1:].argmax(-1)  # (batch, 1)
        token.tolist()  # waits for the device: the id is on the host
        first = time.perf_counter()
        for _ in range(given.new_tokens - 1):
            out = llm(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            token.tolist()
        end = time.perf_counter()
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    position = held / (given.text_tokens + connector.tokens + given.new_tokens - 1) / batch
    return {
        **{name: 1e3 * value for name, value in seconds.items()},
        "first token": 1e3 * (first - start),
        "per token": 1e3 * (end - first) / (given.new_tokens - 1),
        "tokens/s": batch * (given.new_tokens - 1) / (end - first),
        "peak bytes": memory[0],
        "kv bytes": position * connector.tokens,
    }


def _timed(seconds: dict[str, float], name: str, device: torch.device, call: Callable[[], Any]) -> Any:
    """The result of `call`, whose time goes into `seconds`; the device's queue is empty before and after."""
    _wait(device)
    start = time.perf_counter()
    result = call()
    _wait(device)
    seconds[name] = time.perf_counter() - start
    return result


def _wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Most bytes held meanwhile, weights included: of the GPU, else of this process (NaN if unknown)."""
    import torch

    peak, status = [float("nan")], Path("/proc/self/status")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = float(torch.cuda.max_memory_allocated(device))
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
    except OSError:  # no Linux, or a container that forbids it: the peak stays unknown, NaN
        yield peak
        return
    yield peak
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    peak[0] = 1024.0 * int(lines["VmHWM"].split()[0])


def _row(
    connector: Connector,
    seen: Sequence[dict[str, float]],
    first: Sequence[dict[str, float]],
    model: CompactVisionForConditionalGeneration,
) -> dict[str, Any]:
    config = connector.config
    median = {key: statistics.median(once[key] for once in seen) for key in seen[0]}
    ratio = statistics.median(a["prefill"] / b["prefill"] for a, b in zip(first, seen, strict=True))
    layers = config.tokens_per_layer(model.llm.config.num_hidden_layers)
    tflops = prefill_flops(model.llm.config, layers) / 1e12
    return {"arm": config.label, "tokens": connector.tokens, **median, "x": ratio, "TFLOPs": tflops}


def _environment(model: CompactVisionForConditionalGeneration, device: torch.device) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.llm.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
