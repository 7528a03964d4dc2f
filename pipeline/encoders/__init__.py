"""Vision encoders: a file for each family, a line for each in `ENCODERS`.

The build, the trained model and its export compute features and pixels by the same code, that of this folder. It needs
torch, transformers and Pillow: it travels with every exported model.
"""

from __future__ import annotations

from importlib import import_module
from inspect import isabstract
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import VisionEncoder

ENCODERS = {  # transformers' model_type, of the whole model or of its vision part -> "file:class"
    **dict.fromkeys(("clip", "clip_vision_model"), "clip:Clip"),
}


def encoder_of(model_type: str) -> VisionEncoder:
    """How encoders of this type are loaded, fed and walked.

    Raises:
        ValueError: if there is no file for them, or it does not hold what `ENCODERS` says.
    """
    if model_type not in ENCODERS:
        raise ValueError(
            f"a vision encoder of type {model_type!r} is not known; choose one of type {', '.join(ENCODERS)}, or add a "
            "file to pipeline/encoders"
        )
    file, _, name = ENCODERS[model_type].partition(":")
    try:
        found: type[VisionEncoder] = getattr(import_module(f"{__name__}.{file}"), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"pipeline/encoders names {ENCODERS[model_type]!r} in ENCODERS: {error}; correct that line"
        ) from error
    if isabstract(found):
        lacking = ", ".join(sorted(found.__abstractmethods__))
        raise ValueError(f"{ENCODERS[model_type]} of pipeline/encoders lacks {lacking}; write it there")
    return found()
