"""Shapes of models by name, for costs that need no weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.model.model import CompactVisionConfig

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


def shape(name: str, layers: int | None = None) -> CompactVisionConfig:
    """The configuration of `7b`, `13b`, or of an exported folder.

    Raises:
        ValueError: if there are fewer layers than asked for. OSError: if the folder has no configuration.
    """
    from transformers import CLIPVisionConfig, LlamaConfig

    from training.model.exported import exported_config
    from training.model.model import CompactVisionConfig

    if name in SIZES:
        text = LlamaConfig(**SIZES[name], vocab_size=32000, max_position_embeddings=4096)
        config = CompactVisionConfig(text_config=text, vision_config=CLIPVisionConfig(**CLIP_L))
    elif not Path(name).exists():
        raise ValueError(f"--config {name}: there is no such folder; use one, or a known shape: {', '.join(SIZES)}")
    else:
        config = exported_config(name)
    llm: Any = config.text_config
    if layers is not None and not 0 < layers <= llm.num_hidden_layers:
        raise ValueError(
            f"--layers {layers}: the language model has {llm.num_hidden_layers}; give 1 to {llm.num_hidden_layers}"
        )
    llm.num_hidden_layers = layers or llm.num_hidden_layers
    return config
