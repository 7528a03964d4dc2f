"""Floating-point operations of each part of the model, by closed form: 2 per multiply-add, only matrix products.

`counted` gives the same figures as torch's own counter sees them, without computing a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.encoders import encoder_of
from pipeline.encoders.columns import block_of, grid_of, is_cls

if TYPE_CHECKING:
    from torch import Tensor

    from training.model.model import CompactVisionConfig
    from training.model.reducers.base import ConnectorConfig
    from training.model.reducers.connector import Connector, Text

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


def layer_flops(text: Any, tokens: int) -> int:
    """One of the language model's layers over a sequence of tokens.

    8 N d^2 + 6 N d m + 4 N^2 d where every query head has its own keys, as in Llama-2.
    """
    d, head = text.hidden_size, text.hidden_size // text.num_attention_heads
    kv = head * text.num_key_value_heads
    return int(4 * tokens * d * (d + kv) + 6 * tokens * d * text.intermediate_size + 4 * tokens**2 * d)


def prefill_flops(text: Any, tokens: int | Sequence[int]) -> int:
    """One prefill without the head: `tokens` in every layer, or `tokens[i]` in layer i.

    Tables 2 to 5 report this for the vision tokens, without text.
    """
    if isinstance(tokens, int):
        return int(text.num_hidden_layers) * layer_flops(text, tokens)
    return sum(layer_flops(text, count) for count in tokens)


def head_flops(text: Any) -> int:
    """The language model's head at one position: a prefill needs no more."""
    return int(2 * text.hidden_size * text.vocab_size)


def encoder_flops(vision: Any, deepest: int) -> int:
    """One image through the vision encoder's embedding and its first `deepest` blocks."""
    return encoder_of(vision.model_type).flops(vision, deepest)


def kv_cache_bytes(text: Any, tokens: int | Sequence[int], bytes_per_number: int = 2) -> int:
    """Keys and values that the language model keeps of tokens while it answers; `tokens` as in `prefill_flops`."""
    head = text.hidden_size // text.num_attention_heads
    per_token = int(2 * text.num_key_value_heads * head * bytes_per_number)  # in one layer: a key and a value
    return per_token * int(text.num_hidden_layers * tokens if isinstance(tokens, int) else sum(tokens))


class ImageFlops(NamedTuple):
    """What one image costs, by part. `prefill` is of the vision tokens, `with_text` of them and a prompt's text."""

    encoder: int
    connector: int
    prefill: int
    with_text: int
    head: int

    @property
    def total(self) -> int:
        """From pixels to the logits of the first new token."""
        return self.encoder + self.connector + self.with_text + self.head


def image_flops(text: Any, vision: Any, connector: ConnectorConfig, text_tokens: int) -> ImageFlops:
    """One image and a prompt, through a vision encoder, a connector and a language model of these configurations."""
    layers = connector.tokens_per_layer(text.num_hidden_layers)
    return ImageFlops(
        encoder=encoder_flops(vision, max(map(block_of, connector.columns))),
        connector=connector.flops(),
        prefill=prefill_flops(text, layers),
        with_text=prefill_flops(text, [count + text_tokens for count in layers]),
        head=head_flops(text),
    )


def counted(call: Callable[[], Any]) -> int:
    """What torch's counter sees `call` do; on the meta device nothing is computed."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call()
    return int(counter.get_total_flops())


def check_connector(config: ConnectorConfig) -> None:
    """Let a connector compute one image, in shapes without numbers, and compare that with what it declares.

    Raises:
        ValueError: if it breaks off, makes another number of tokens, or needs other FLOPs than it says.
    """
    made: list[tuple[int, ...]] = []
    try:
        connector, image = _on_meta(config)
        expected, declared = (1, config.tokens, config.llm_width), config.flops()
        found = counted(lambda: made.append(tuple(connector(*image).shape)))
    except NotImplementedError:  # an operation whose result depends on numbers has no shape here
        return
    except (RuntimeError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"connector {config.arm} breaks off on one image: {type(error).__name__}: {error}; correct its file in "
            "training/model/reducers"
        ) from error
    if made != [expected] or found != declared:
        raise ValueError(
            f"connector {config.arm} makes {made[0]} with {found} FLOPs, but declares {expected} with {declared}; "
            "correct its file in training/model/reducers"
        )


def _on_meta(config: ConnectorConfig) -> tuple[Connector, tuple[dict[str, Tensor], Text]]:
    """A connector and what it takes of one image, the columns and a text of 8 tokens: shapes without numbers."""
    import torch

    from training.model.reducers import build_connector
    from training.model.reducers.connector import Text

    sizes = {name: 1 if is_cls(name) else config.grid**2 for name in config.columns}
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # initial weights would draw random numbers
        columns = {name: torch.zeros(1, size, config.vision_width) for name, size in sizes.items()}
        text = Text(torch.zeros(1, 8, config.llm_width), torch.ones(1, 8, dtype=torch.bool))
        return build_connector(config), (columns, text)


def paper_rows(config: CompactVisionConfig, text_tokens: int) -> list[dict[str, Any]]:
    """A row of TFLOPs for every arm of `PAPER` at the widths of `config`, each part both ways.

    `prefill` takes only the vision tokens through the language model; `all` is encoder, connector, prefill of vision
    and text tokens, and the head of one position.

    Raises:
        AssertionError: if torch counts otherwise than the closed form.
    """
    import torch
    from transformers import AutoModel

    text: Any = config.text_config
    vision: Any = config.vision_config
    # On the meta device tensors have shapes and no numbers: torch counts, and computes nothing.
    with torch.device("meta"):
        llm, tower = AutoModel.from_config(text), encoder_of(vision.model_type).build(vision)

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


def _vision_figures(tower: Any, given: dict[str, Any], llm_width: int) -> dict[str, float]:
    """TFLOPs of CLIP up to the deepest block that an arm reads, and of its connector, for one image."""
    import torch

    from training.model.reducers import connector_config

    vision, family = tower.config, encoder_of(tower.config.model_type)
    config = connector_config(**given, grid=grid_of(vision), llm_width=llm_width, vision_width=vision.hidden_size)
    deepest = max(map(block_of, config.columns))
    connector, image = _on_meta(config)
    pixels = torch.zeros(1, 3, vision.image_size, vision.image_size, device="meta")
    return {
        "tokens": connector.tokens,
        "encoder": _agreed(
            "encoder", encoder_flops(vision, deepest), lambda: family.columns(tower, pixels, config.columns)
        ),
        "connector": _agreed("connector", config.flops(), lambda: connector(*image)),
        "connector parameters": sum(p.numel() for p in connector.parameters()),
    }


def _agreed(part: str, formula: int, call: Callable[[], Any]) -> float:
    """TFLOPs by the formula, if torch counts the very same number of FLOPs in `call`."""
    found = counted(call)
    assert found == formula, f"{part}: the closed form gives {formula} FLOPs, torch counts {found}"
    return formula / 1e12
