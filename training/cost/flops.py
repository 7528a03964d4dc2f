"""Floating-point operations of each part of the model, by closed form: 2 per multiply-add, matrix products alone.

`counted` gives the same figures as torch's own counter sees them, without computing a number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

    from training.model.connectors import ConnectorConfig
    from training.model.model import CompactVisionConfig

# Name, ConnectorConfig's fields, and the TFLOPs that the paper prints for 7B.
PAPER: tuple[tuple[str, dict[str, Any], float | None], ...] = (
    ("LLaVA-1.5 (Tables 2, 3; k=1 E=1)", {"arm": "mlp"}, 7.6),
    ("MBTF (Table 3)", {"arm": "mbtf"}, 7.6),
    ("STF (Table 3)", {"arm": "stf"}, 1.9),
    ("MBTF+STF (Tables 2-5; k=2 E=1)", {}, 1.9),
    ("MBTF+STF, as released", {"preset": "released"}, 1.9),
    ("MBTF+STF k=2 E=2 (Table 4)", {"fused_tokens": 2}, 3.8),
    ("MBTF+STF k=4 E=4 (Table 4)", {"kernel_size": 4, "fused_tokens": 4}, 1.9),
    ("MBTF+STF k=4 E=8 (Table 4)", {"kernel_size": 4, "fused_tokens": 8}, 3.8),
    ("MBTF+STF k=8 E=16 (Table 4)", {"kernel_size": 8, "fused_tokens": 16}, 1.9),
    ("MBTF+STF k=8 E=32 (Table 4)", {"kernel_size": 8, "fused_tokens": 32}, 3.8),
    ("AvgPool before the MLP (Tables 2, 5)", {"arm": "avgpool"}, 1.9),
    ("AvgPool after the MLP", {"arm": "avgpool", "pool": "after"}, None),
    ("TokenConcat (Table 5)", {"arm": "tokenconcat"}, 1.9),
    ("MBTF+STF k=3 E=1", {"kernel_size": 3}, None),
)


def prefill_flops(text: LlamaConfig, tokens: int) -> int:
    """One prefill of so many tokens, without the head; of the vision tokens alone it is what Tables 2 to 5 report.

    L (8 N d^2 + 6 N d m + 4 N^2 d) where every query head has its own keys, as in Llama-2.
    """
    d, head = text.hidden_size, text.hidden_size // text.num_attention_heads
    kv = head * text.num_key_value_heads
    layer = 4 * tokens * d * (d + kv) + 6 * tokens * d * text.intermediate_size + 4 * tokens**2 * d
    return int(text.num_hidden_layers * layer)


def head_flops(text: LlamaConfig) -> int:
    """The language model's head at one position: a prefill needs no more."""
    return int(2 * text.hidden_size * text.vocab_size)


def encoder_flops(vision: CLIPVisionConfig, deepest: int) -> int:
    """One image through CLIP's patch embedding and its first `deepest` blocks."""
    d, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    tokens = patches + 1
    embedding = 2 * patches * 3 * vision.patch_size**2 * d
    layer = 8 * tokens * d**2 + 4 * tokens * d * vision.intermediate_size + 4 * tokens**2 * d
    return int(embedding + deepest * layer)


def connector_flops(config: ConnectorConfig) -> int:
    """The columns of one image to its vision tokens."""
    c1, c3, k, patches = config.vision_width, config.llm_width, config.kernel_size, config.grid**2
    windows = patches // k**2
    flops = 0
    if "mbtf" in config.arm:
        flops += patches * (len(config.columns) * c1 * 4 * c1 + 4 * c1 * c1)
    if "stf" in config.arm:
        narrow = config.fused_width // config.fused_tokens
        flops += windows * k**2 * c1 * config.fused_width
        flops += config.tokens * (narrow * 4 * c3 + 4 * c3 * c3 if config.preset == "paper" else narrow * c3)
    else:
        width = k * k * c1 if config.arm == "tokenconcat" else c1
        projected = patches if config.arm == "avgpool" and config.pool == "after" else config.tokens
        flops += projected * (width * c3 + c3 * c3)
    return 2 * flops


def kv_cache_bytes(text: LlamaConfig, tokens: int, bytes_per_number: int = 2) -> int:
    """What the language model keeps of so many tokens while it answers: keys and values of every layer."""
    head = text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * text.num_key_value_heads * head * bytes_per_number * tokens)


def counted(call: Callable[[], Any]) -> int:
    """What torch's counter sees `call` do; on the meta device nothing is computed."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call()
    return int(counter.get_total_flops())


def paper_rows(config: CompactVisionConfig, text_tokens: int) -> list[dict[str, Any]]:
    """A row of TFLOPs for every arm of `PAPER` at the widths of `config`, each part both ways.

    `prefill` is the vision tokens alone through the language model; `all` is encoder, connector, prefill of vision
    and text tokens, and the head of one position.

    Raises:
        AssertionError: if torch counts otherwise than the closed form.
    """
    import torch
    from transformers import CLIPVisionModel, LlamaModel

    text: Any = config.text_config
    vision: Any = config.vision_config
    with torch.device("meta"):
        llm, tower = LlamaModel._from_config(text), CLIPVisionModel._from_config(vision)

    @cache
    def prefill(tokens: int) -> float:
        embeds = torch.zeros(1, tokens, text.hidden_size, device="meta")
        return _agreed("prefill", prefill_flops(text, tokens), lambda: llm(inputs_embeds=embeds))

    rows = []
    for name, given, printed in PAPER:
        figures = _vision_figures(tower, given, text.hidden_size)
        tokens = int(figures.pop("tokens"))
        with_text = prefill(tokens + text_tokens)
        head = head_flops(text) / 1e12
        row = {"arm": name, "tokens": tokens, "paper": printed, "prefill": prefill(tokens), **figures}
        everything = figures["encoder"] + figures["connector"] + with_text + head
        rows.append({**row, "prefill with text": with_text, "all": everything})
    return rows


def _vision_figures(tower: CLIPVisionModel, given: dict[str, Any], llm_width: int) -> dict[str, float]:
    """TFLOPs of CLIP up to the deepest block that an arm reads, and of its connector."""
    import torch

    from training.model.connectors import ConnectorConfig, build_connector

    vision = tower.config
    grid = vision.image_size // vision.patch_size
    config = ConnectorConfig(**given, grid=grid, llm_width=llm_width, vision_width=vision.hidden_size)
    deepest = max(int(column[-2:]) for column in config.columns)
    with torch.device("meta"):
        connector = build_connector(config)
        pixels = torch.zeros(1, 3, vision.image_size, vision.image_size)
        columns = {column: torch.zeros(1, grid**2, vision.hidden_size) for column in config.columns}

    def encode() -> None:
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in tower.encoder.layers[:deepest]:
            hidden = layer(hidden, None)

    return {
        "tokens": connector.tokens,
        "encoder": _agreed("encoder", encoder_flops(vision, deepest), encode),
        "connector": _agreed("connector", connector_flops(config), lambda: connector(columns)),
        "connector parameters": sum(p.numel() for p in connector.parameters()),
    }


def _agreed(part: str, formula: int, call: Callable[[], Any]) -> float:
    found = counted(call)
    assert found == formula, f"{part}: the closed form gives {formula} FLOPs, torch counts {found}"
    return formula / 1e12
