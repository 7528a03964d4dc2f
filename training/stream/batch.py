"""One rank's part of a global batch, and how it is cut into microbatches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class Batch(dict[str, Any]):
    """One rank's part of a global batch: B examples, padded to L tokens, with I images among them.

    - what `collate` made of the examples, e.g. `input_ids`, `labels`, `attention_mask`, (B, L);
    - `columns`: {name: uint8 (I, bytes)}, in the store's codec: `pipeline.codec.from_payload` on the device;
    - `image_rows`: int64 (I,), ascending: the example that each image belongs to;
    - `keys`: B strings `<sample key>#<conversation>`, after `store<number>:` where several stores are read;
    - `stores`, in that case: int64 (B,), the number of each example's store;
    - `skipped`, where `collate` says so: for each example None, or why it teaches nothing (text.collate.Skip).

    The columns lie in buffers that are used again: they are valid until the consumer asks for the next batch.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Batch:
        """A new dict over the same tensors.

        Composer deep-copies each microbatch so that code which replaces entries of `state.batch` cannot change the
        cached one. A shallow copy keeps that promise, because nothing here writes into a batch's tensors; a deep one
        would copy gigabytes of features per step.
        """
        return Batch(self)


def split(batch: dict[str, Any], microbatch_size: int | float) -> list[Batch]:
    """Cut a batch on the host into microbatches of so many examples or fewer, each with the images that belong to them.

    Positions that are padding in all rows of a microbatch are cut off on the right: they would only cost time.
    """
    size = int(microbatch_size)
    total = len(batch["keys"])
    image_rows = batch["image_rows"]
    parts = []
    for start in range(0, total, size):
        stop = min(start + size, total)
        # `image_rows` ascends, so the images of examples start..stop are neighbours: first..last.
        first, last = np.searchsorted(image_rows.numpy(), [start, stop]).tolist()
        part = Batch(
            {name: value[start:stop] for name, value in batch.items() if name not in ("columns", "image_rows")}
        )
        part["columns"] = {name: value[first:last] for name, value in batch["columns"].items()}
        part["image_rows"] = image_rows[first:last] - start
        parts.append(_trimmed(part))
    return parts


def _trimmed(part: Batch) -> Batch:
    """The same rows, all (B, L) tensors cut to the longest of them."""
    mask = part.get("attention_mask")
    if mask is None:
        return part
    used = np.flatnonzero(mask.numpy().any(axis=0))  # positions that some row uses
    width = int(used[-1]) + 1 if len(used) else mask.shape[1]
    for name, value in part.items():
        if isinstance(value, torch.Tensor) and value.shape == mask.shape and name != "attention_mask":
            part[name] = value[:, :width]
    part["attention_mask"] = mask[:, :width]
    return part
