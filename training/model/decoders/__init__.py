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
        ValueError: if there is no file for them, or it does not hold what `DECODERS` says.
    """
    if model_type not in DECODERS:
        raise ValueError(
            f"a language model of type {model_type!r} is not known; choose one of type {', '.join(DECODERS)}, or add "
            "a file to training/model/decoders"
        )
    file, _, name = DECODERS[model_type].partition(":")
    try:
        found = getattr(import_module(f"{__name__}.{file}"), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"training/model/decoders names {DECODERS[model_type]!r} in DECODERS: {error}; correct that line"
        ) from error
    if not isinstance(found, Decoder):
        raise ValueError(f"{DECODERS[model_type]} of training/model/decoders is no Decoder, but {found!r}; make it one")
    return found
