#!/usr/bin/env python
"""What an image costs: FLOPs of every arm of the paper, and times and memory of 576, 288, 144 and 64 vision tokens.

    python training/efficiency.py --flops                          exact, for every arm of Tables 2 to 5; seconds
    python training/efficiency.py runs/demo/finetune/model         measured side by side, with a model's own weights
    python training/efficiency.py --config 7b --layers 2           measured on random weights of a shape

Times are medians over rounds in which every row has its turn, so that all rows share whatever else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository root, not this folder

if TYPE_CHECKING:
    import torch

    from training.model.connectors import Connector, ConnectorConfig
    from training.model.model import CompactVisionConfig, CompactVisionForConditionalGeneration

SIZES: dict[str, dict[str, int]] = {  # Vicuna's, that is Llama-2's
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
CLIP_L = {  # ViT-L/14-336
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder that training/train.py exported, or a Hub id")
    parser.add_argument("--config", metavar="SHAPE", help="random weights: 7b, 13b, or a folder with config.json")
    parser.add_argument("--flops", action="store_true", help="the table of FLOPs; with --config 7b (default) or 13b")
    parser.add_argument("--layers", type=int, help="only so many layers of the language model, for small machines")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="bfloat16 on a GPU")
    parser.add_argument("--text-tokens", type=int, default=64, help="of the prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="decoded after it (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="prompts at once (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=7, help="medians over so many, after a warm-up (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="write the figures there too, as JSON")
    arguments = parser.parse_args()
    if arguments.model and (arguments.config or arguments.flops):
        parser.error("a MODEL is measured with its own shape: leave out --config and --flops")
    if not (arguments.model or arguments.config or arguments.flops):
        parser.error("give a MODEL, --config or --flops")
    if min(arguments.text_tokens, arguments.batch_size, arguments.rounds) < 1 or arguments.new_tokens < 2:
        parser.error("--text-tokens, --batch-size and --rounds are at least 1, --new-tokens at least 2")
    try:
        result = flops(arguments) if arguments.flops else benchmark(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(render(result))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


def shape(name: str, layers: int | None = None) -> CompactVisionConfig:
    """The configuration of `7b`, `13b`, or of an exported folder.

    Raises:
        ValueError: if there are fewer layers than asked for. OSError: if the folder has no configuration.
    """
    from transformers import CLIPVisionConfig, LlamaConfig

    from training.model.model import CompactVisionConfig

    if name in SIZES:
        text = LlamaConfig(**SIZES[name], vocab_size=32000, max_position_embeddings=4096)
        config = CompactVisionConfig(text_config=text, vision_config=CLIPVisionConfig(**CLIP_L))
    elif not Path(name).exists():
        raise ValueError(f"--config {name}: there is no such folder, and the known shapes are {', '.join(SIZES)}")
    else:
        config = CompactVisionConfig.from_pretrained(name)
    llm: Any = config.text_config
    if layers is not None and not 0 < layers <= llm.num_hidden_layers:
        raise ValueError(f"--layers {layers}: the language model has {llm.num_hidden_layers}")
    llm.num_hidden_layers = layers or llm.num_hidden_layers
    return config


def flops(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every arm of the paper: the figure that it prints, and what an image costs in all; TFLOPs.

    Raises:
        ValueError: for a shape that the paper's arms do not fit. AssertionError: if torch counts otherwise.
    """
    from training.cost.flops import paper_rows

    name = arguments.config or "7b"
    if name not in SIZES:
        raise ValueError(f"--flops is about the paper's shapes, {' and '.join(SIZES)}; found {name}")
    config = shape(name, arguments.layers)
    rows = paper_rows(config, arguments.text_tokens)
    if name != "7b" or arguments.layers is not None:
        rows = [{**row, "paper": None} for row in rows]
    note = (
        f"TFLOPs of one image at {name}, 2 per multiply-add; each figure from its closed form, and counted by torch "
        "on the meta device.\nprefill: the vision tokens alone through the language model, without head, which is "
        f"what the paper prints.\nall: CLIP + connector + prefill of vision tokens and {arguments.text_tokens} text "
        "tokens + head of one position."
    )
    return {"title": note, "shape": name, "text_tokens": arguments.text_tokens, "rows": rows}


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times (ms), tokens/s and bytes of each number of vision tokens, one table.

    Raises:
        ValueError: for a shape that cannot be. OSError: if the model cannot be read.
    """
    import torch

    from training.model.connectors import build_connector

    gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not gpu:
        raise ValueError("--device cuda: torch finds no GPU here; use --device cpu")
    device = torch.device("cuda" if gpu and arguments.device != "cpu" else "cpu")
    default = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, default if arguments.dtype == "auto" else arguments.dtype)
    model = _load(arguments, device, dtype)
    connectors = []
    for config in reductions(model.connector.config):
        with device:  # where random weights are made in a moment
            own = config == model.connector.config
            connectors.append(model.connector if own else build_connector(config).to(dtype))
    figures: list[list[dict[str, float]]] = [[] for _ in connectors]
    with torch.inference_mode():
        for number in range(-2 if device.type == "cuda" else -1, arguments.rounds):  # a GPU needs longer to warm up
            print("warm-up" if number < 0 else f"round {number + 1}/{arguments.rounds}", file=sys.stderr, flush=True)
            for connector, seen in zip(connectors, figures, strict=True):
                once = _measure(model, connector, arguments)
                if number >= 0:
                    seen.append(once)
    rows = [_row(c, seen, figures[0], model) for c, seen in zip(connectors, figures, strict=True)]
    note = (
        f"{arguments.model or arguments.config}, batch {arguments.batch_size}, {arguments.text_tokens} text tokens, "
        f"{arguments.new_tokens} new ones; ms, medians of {arguments.rounds}; x: first row's prefill / this one's"
    )
    return {"title": note, "settings": _settings(arguments), "environment": _environment(model, device), "rows": rows}


def reductions(own: ConnectorConfig) -> list[ConnectorConfig]:
    """Connectors of all patch tokens, half, a quarter and a ninth of them, and the model's own, most tokens first.

    A reduction that does not divide the grid is left out.
    """
    from dataclasses import replace

    base = replace(own, arm="mbtf+stf", kernel_size=1, fused_tokens=1)
    wanted = [own, replace(own, arm="mlp", block=max(own.blocks or ()), kernel_size=1, fused_tokens=1)]
    for k, fused in ((2, 2), (2, 1), (3, 1)):
        if own.grid % k == 0:
            wanted.append(replace(base, kernel_size=k, fused_tokens=fused))
    different: dict[int, ConnectorConfig] = {}
    for config in wanted:
        different.setdefault(config.tokens, config)
    return [different[tokens] for tokens in sorted(different, reverse=True)]


def _load(
    arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> CompactVisionForConditionalGeneration:
    import torch

    from training.model.model import CompactVisionForConditionalGeneration

    if arguments.model:
        model = CompactVisionForConditionalGeneration.from_pretrained(arguments.model, dtype=dtype).to(device)
    else:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # 7B weights in float32 first would not fit many a machine
        config = shape(arguments.config, arguments.layers)
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
        raise ValueError(f"{arguments.model or arguments.config} has no vision tower: there is no image to encode")
    return model.eval()  # type: ignore[no-any-return]


def _measure(
    model: CompactVisionForConditionalGeneration, connector: Connector, arguments: argparse.Namespace
) -> dict[str, float]:
    """One image, or a batch of them, from pixels on the host to the last new token's id on the host."""
    import torch

    device, llm, batch = model.device, model.llm, arguments.batch_size
    generator = torch.Generator().manual_seed(0)
    assert model.vision_tower is not None
    side = model.vision_tower.config.image_size
    pixels = torch.randn(batch, 3, side, side, generator=generator).to(model.dtype)
    text = torch.randint(3, llm.config.vocab_size, (batch, arguments.text_tokens), generator=generator)
    model.connector = connector  # it says which columns the encoder makes
    seconds: dict[str, float] = {}
    with _peak_memory(device) as memory:
        _wait(device)
        start = time.perf_counter()
        on_device, words = pixels.to(device), llm.get_input_embeddings()(text.to(device))
        columns = _timed(seconds, "encode", device, lambda: model.encode_images(on_device))
        vision = _timed(seconds, "connector", device, lambda: connector(columns))
        both = torch.cat([words[:, :1], vision, words[:, 1:]], dim=1)
        out = _timed(seconds, "prefill", device, lambda: llm(inputs_embeds=both, use_cache=True, logits_to_keep=1))
        token = out.logits[:, -1:].argmax(-1)
        token.tolist()
        first = time.perf_counter()
        for _ in range(arguments.new_tokens - 1):
            out = llm(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            token.tolist()
        end = time.perf_counter()
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    position = held / (arguments.text_tokens + connector.tokens + arguments.new_tokens - 1) / batch
    return {
        **{name: 1e3 * value for name, value in seconds.items()},
        "first token": 1e3 * (first - start),
        "per token": 1e3 * (end - first) / (arguments.new_tokens - 1),
        "tokens/s": batch * (arguments.new_tokens - 1) / (end - first),
        "peak bytes": memory[0],
        "kv bytes": position * connector.tokens,
    }


def _timed(seconds: dict[str, float], name: str, device: torch.device, call: Callable[[], Any]) -> Any:
    _wait(device)
    start = time.perf_counter()
    result = call()
    _wait(device)
    seconds[name] = time.perf_counter() - start
    return result


def _wait(device: torch.device) -> None:
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
    except OSError:
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
    from training.cost.flops import prefill_flops

    config = connector.config
    name = (
        config.arm if config.arm in ("mlp", "mbtf") else f"{config.arm} k={config.kernel_size} E={config.fused_tokens}"
    )
    median = {key: statistics.median(once[key] for once in seen) for key in seen[0]}
    ratio = statistics.median(a["prefill"] / b["prefill"] for a, b in zip(first, seen, strict=True))
    tflops = prefill_flops(model.llm.config, connector.tokens) / 1e12
    return {"arm": name, "tokens": connector.tokens, **median, "x": ratio, "TFLOPs": tflops}


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}


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


def render(result: dict[str, Any]) -> str:
    """The rows as a table."""
    keys = list(result["rows"][0])
    lines = [[_cell(key, row[key]) for key in keys] for row in result["rows"]]
    widths = [max(len(key), *(len(line[i]) for line in lines)) for i, key in enumerate(keys)]
    table = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in (keys, *lines)
    ]
    environment = result.get("environment", {})
    about = [", ".join(f"{key} {value}" for key, value in environment.items())] if environment else []
    return "\n".join([result["title"], *about, *table])


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key.endswith("bytes"):
        return f"{value / 2**20:,.2f} MiB"
    if isinstance(value, float):
        return f"{value:.1f}" if key == "paper" else f"{value:#.4g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
