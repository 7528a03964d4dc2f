"""An exported model, read whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .model import CompactVisionConfig, CompactVisionForConditionalGeneration
from .processor import CompactVisionProcessor

_NAMED = 3  # missing weights that a message names


def exported_config(name: str | Path) -> CompactVisionConfig:
    """The configuration of a folder or Hub id.

    Raises:
        ValueError: if it is of no model of this project, or cannot be read.
    """
    try:
        found, _ = CompactVisionConfig.get_config_dict(name)
        if found.get("model_type") != CompactVisionConfig.model_type:  # else transformers takes 7B's default
            raise ValueError(f"its config.json is of model type {found.get('model_type')!r}")
        config: CompactVisionConfig = CompactVisionConfig.from_pretrained(name)
    except Exception as error:
        raise _unreadable(name, error) from error
    return config


def exported_model(name: str | Path, **how: Any) -> CompactVisionForConditionalGeneration:
    """The model of a folder or Hub id; `how` goes to `from_pretrained`.

    Raises:
        ValueError: if it is no model of this project, is damaged, or lacks weights, which would be random.
    """
    exported_config(name)
    try:
        model, told = CompactVisionForConditionalGeneration.from_pretrained(name, output_loading_info=True, **how)
    except Exception as error:  # whatever the readers of its files meet
        raise _unreadable(name, error) from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise _unreadable(name, ValueError(f"{len(missing)} weights are missing, first {', '.join(missing[:_NAMED])}"))
    return model  # type: ignore[no-any-return]


def exported_processor(name: str | Path) -> CompactVisionProcessor:
    """The processor of a folder or Hub id.

    Raises:
        ValueError: if it has none, or it is damaged.
    """
    try:
        processor: CompactVisionProcessor = CompactVisionProcessor.from_pretrained(name)
    except Exception as error:
        raise _unreadable(name, error) from error
    return processor


def _unreadable(name: str | Path, error: Exception) -> ValueError:
    """One line: what was read, what is wrong with it, what to do."""
    first = str(error).strip().partition("\n")[0]
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__} "
    return ValueError(
        f"model {str(name)!r} cannot be read: {kind}{first}; name a folder that training/train.py exported"
    )
