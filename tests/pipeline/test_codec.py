"""Features to bytes and back: sizes as promised, errors within the codec's precision, whatever the values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.codec import from_payload, payload_bytes, to_payload
from pipeline.schema import Codec, Column

COLUMN = Column(name="block03", tokens=6, width=16)
ERROR = {"bf16": 2**-8, "fp16": 2**-10, "fp8": 2**-4 + 2**-6, "int8": 1 / 127}  # of a token's largest magnitude
CODECS: list[Codec] = ["bf16", "fp16", "fp8", "int8"]


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), exponent=st.floats(-6, 4))
def test_what_comes_back_is_what_went_in_within_the_precision(codec: Codec, seed: int, exponent: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3, COLUMN.tokens, COLUMN.width, generator=generator) * 10**exponent
    features[0, 2] = 0
    payload = to_payload(features, codec)
    assert payload.dtype == torch.uint8
    assert payload.shape == (3, payload_bytes(COLUMN, codec))
    back = from_payload(payload, COLUMN, codec, torch.float32)
    largest = features.abs().amax(dim=-1, keepdim=True)
    assert bool(((back - features).abs() <= ERROR[codec] * largest + 1e-7).all())
    assert bool((back[0, 2] == 0).all())


@pytest.mark.parametrize("codec", ["fp8", "int8"])
def test_one_large_token_does_not_cost_the_others_their_precision(codec: Codec) -> None:
    features = torch.randn(1, COLUMN.tokens, COLUMN.width, generator=torch.Generator().manual_seed(1))
    alone = from_payload(to_payload(features, codec), COLUMN, codec, torch.float32)
    features[0, 0] *= 1e4
    beside = from_payload(to_payload(features, codec), COLUMN, codec, torch.float32)
    assert torch.equal(alone[:, 1:], beside[:, 1:])


@pytest.mark.parametrize("codec", CODECS)
def test_decoding_gives_the_dtype_that_is_asked_for(codec: Codec) -> None:
    payload = to_payload(torch.randn(2, COLUMN.tokens, COLUMN.width), codec)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert from_payload(payload, COLUMN, codec, dtype).dtype == dtype


def test_bf16_features_come_back_bit_for_bit() -> None:
    features = torch.randn(2, COLUMN.tokens, COLUMN.width).bfloat16()
    assert torch.equal(from_payload(to_payload(features, "bf16"), COLUMN, "bf16", torch.bfloat16), features)


def test_a_number_beyond_fp16_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="does not fit fp16; use bf16"):
        to_payload(torch.full((1, COLUMN.tokens, COLUMN.width), 1e5), "fp16")
