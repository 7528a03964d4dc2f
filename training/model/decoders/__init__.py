"""Language models: what is not in transformers' own metadata; a file for each family, a line for each in `DECODERS`."""

from __future__ import annotations

from importlib import import_module

from .base import Decoder

DECODERS = {  # transformers' model_type -> "file:name"
    "llama": "llama:LLAMA",
}


def decoder_of(model_type: str) -> Decoder:
    """What is known of language models of this type.

    Raises:
        ValueError: if there is no file for them.
    """
    if model_type not in DECODERS:
        raise ValueError(
            f"a language model of type {model_type!r} is not known; choose one of type {', '.join(DECODERS)}, or add "
            "a file to training/model/decoders"
        )
    file, name = DECODERS[model_type].split(":")
    found: Decoder = getattr(import_module(f"{__name__}.{file}"), name)
    return found
