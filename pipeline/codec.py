"""Features to payloads (bytes) and back, on the device where they are.

    bf16, fp16   2 bytes a number
    fp8          1 byte a number (e4m3), and a scale per token
    int8         1 byte a number, and a scale per token

One image's payload is its scales (float32, tokens) if the codec has any, then its numbers (tokens, width), row by row,
little-endian.
"""

from __future__ import annotations

import torch

from pipeline.schema import Codec, Column

_LARGEST = {"fp8": 448.0, "int8": 127.0}  # the scale maps a token's largest magnitude to this


def payload_bytes(column: Column, codec: Codec) -> int:
    """Bytes of one image's features in a column."""
    if codec in _LARGEST:
        return column.tokens * (column.width + 4)  # 4: a token's float32 scale
    return column.tokens * column.width * 2


def to_payload(features: torch.Tensor, codec: Codec) -> torch.Tensor:
    """(n, tokens, width) of any float dtype -> uint8 (n, payload bytes), on the same device.

    Raises:
        ValueError: if a finite number becomes infinite: fp16 ends at 65504.
    """
    if codec == "bf16":
        return _bytes(features.to(torch.bfloat16))
    if codec == "fp16":
        half = features.to(torch.float16)
        if not bool(torch.isfinite(half).all()) and bool(torch.isfinite(features).all()):
            raise ValueError(f"a feature of magnitude {float(features.abs().max()):.4g} does not fit fp16; use bf16")
        return _bytes(half)
    numbers = features.float()
    scale = numbers.abs().amax(dim=-1, keepdim=True) / _LARGEST[codec]  # (n, tokens, 1)
    scaled = numbers / torch.where(scale > 0, scale, 1.0)  # (n, tokens, width); a token of zeros stays zeros
    limited = scaled.clamp(-448.0, 448.0)  # rounding may have gone beyond, where e4m3 has only NaN
    small = limited.to(torch.float8_e4m3fn) if codec == "fp8" else scaled.round().to(torch.int8)
    return torch.cat([_bytes(scale), _bytes(small)], dim=1)


def from_payload(payload: torch.Tensor, column: Column, codec: Codec, dtype: torch.dtype) -> torch.Tensor:
    """uint8 (n, payload bytes) -> (n, tokens, width) in `dtype`, on the same device."""
    shape = (payload.shape[0], column.tokens, column.width)
    if codec == "bf16":
        return payload.view(torch.bfloat16).view(shape).to(dtype)
    if codec == "fp16":
        return payload.view(torch.float16).view(shape).to(dtype)
    split = column.tokens * 4  # bytes of the scales, which come first
    scale = payload[:, :split].contiguous().view(torch.float32).view(shape[0], column.tokens, 1)
    small = payload[:, split:].contiguous()
    numbers = small.view(torch.float8_e4m3fn) if codec == "fp8" else small.view(torch.int8)
    return (numbers.view(shape).float() * scale).to(dtype)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """(n, ...) -> uint8 (n, bytes)."""
    flat = tensor.contiguous().view(tensor.shape[0], -1)
    return flat.view(torch.uint8)
