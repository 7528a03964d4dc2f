"""The weights of an exported model: safetensors files of bounded size, each written when its weights have come."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from training.model.model import CompactVisionForConditionalGeneration

SHARD_BYTES = 10**9  # of one file: what is in memory at a time


def write_weights(
    whole: CompactVisionForConditionalGeneration,
    contents: Iterable[tuple[str, Tensor]],
    folder: Path,
    dtype: torch.dtype | None,
) -> None:
    """Write settings and weights as `save_pretrained` does, and keep no more than a file's weights in memory.

    Args:
        whole: the model; its weights may be on `meta`.
        contents: every weight by its name in `whole`, in any order.
        folder: where to.
        dtype: of the weights; None keeps each one's own.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    tensors = dict(whole.named_parameters()) | dict(whole.named_buffers())  # a tied weight stands there once
    meta = {name: _cast(tensors[name].to("meta"), dtype) for name in whole.state_dict() if name in tensors}
    arriving = ((name, _cast(weight, dtype).contiguous()) for name, weight in contents if name in meta)
    in_files = revert_weight_conversion(whole, dict(meta))
    if any(in_files.get(name) is not tensor for name, tensor in meta.items()):  # files of some families hold others
        whole.save_pretrained(folder, state_dict=dict(arriving))
        return
    plan = split_torch_state_dict_into_shards(meta, max_shard_size=SHARD_BYTES)
    whole.save_pretrained(folder, state_dict={})
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in plan.filename_to_tensors}
    for name, weight in arriving:
        file = plan.tensor_to_filename[name]
        waiting[file][name] = weight
        if len(waiting[file]) == len(plan.filename_to_tensors[file]):
            save_file(waiting.pop(file), folder / file, metadata={"format": "pt"})
    lost = [name for file, found in waiting.items() for name in plan.filename_to_tensors[file] if name not in found]
    assert not lost, f"no contents came of {lost}"
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _cast(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In another dtype, if one is wanted and it is a floating-point number."""
    return weight if dtype is None or not weight.is_floating_point() else weight.to(dtype)
