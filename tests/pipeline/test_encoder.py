"""Images of every kind become the pixels of LLaVA-1.5, and pixels the hidden states of CLIP."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.encoder import Encoder, columns_of, describe_encoder
from pipeline.encoders.clip import Clip
from pipeline.encoders.decode import load_image


def packed(image: Image.Image, kind: str, **more: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **more)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth colours, darker to the right: lossy formats keep them nearly."""
    y, x = np.mgrid[0:40, 0:60].astype(np.float64)
    return Image.fromarray(np.stack([200 - 3 * x, 100 + 2 * y, 50 + x + y], axis=-1).astype(np.uint8))


def difference(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).max())


@pytest.mark.vectors("images*.npz")
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_pixels_are_bit_equal_to_those_of_llava(vectors: Path, aspect: str) -> None:
    arrays = np.load(vectors, allow_pickle=False)
    expected = json.loads(vectors.with_suffix(".json").read_text(encoding="utf-8"))
    theirs = "pad" if aspect == "pad" else "None"
    names = [name.removeprefix("in::") for name in arrays if name.startswith("in::")]
    assert names
    for name in names:
        pixels = Clip().pixels(load_image(packed(Image.fromarray(arrays[f"in::{name}"]), "PNG")), aspect, 336)
        assert np.array_equal(pixels.ravel()[arrays["pick"]], arrays[f"px::{theirs}::{name}"])
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == expected[f"{name}::{theirs}"]["sha256"]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG"])
def test_formats_are_read(photo: Image.Image, kind: str) -> None:
    lossy = {"GIF": 40, "JPEG": 12, "WEBP": 12}
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    assert difference(load_image(packed(photo, kind, **options)), photo) <= lossy.get(kind, 0)


def test_cmyk_becomes_rgb(photo: Image.Image) -> None:
    read = load_image(packed(photo.convert("CMYK"), "JPEG", quality=95))
    assert read.mode == "RGB"
    assert difference(read, photo) <= 16


def test_palette_with_transparency_becomes_the_rgb_of_its_palette(photo: Image.Image) -> None:
    palette = photo.quantize(64)
    read = load_image(packed(palette, "PNG", transparency=0))
    assert difference(read, palette.convert("RGB")) == 0


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "1"])
def test_other_modes_become_rgb(photo: Image.Image, mode: str) -> None:
    image = photo.convert(mode)
    assert difference(load_image(packed(image, "PNG")), image.convert("RGB")) == 0


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(8, axis=0)
    read = np.asarray(load_image(packed(Image.fromarray(ramp), "PNG")))
    assert read.shape == (8, 64, 3)
    assert np.abs(read[..., 0].astype(int) - ramp // 257).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_read_upright(photo: Image.Image, orientation: int) -> None:
    turn = {  # what undoes each orientation, after the EXIF standard
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = photo
    for step in turn.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert difference(load_image(packed(stored, "PNG", exif=exif)), photo) == 0


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (14_000, 60_000):  # above Pillow's own warning, and above its error
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        with pytest.raises(ValueError, match="decompression bomb"):
            load_image(bomb)


@pytest.mark.parametrize("damage", ["empty", "noise", "truncated", "html"])
def test_what_is_no_image_has_the_same_reason_each_time(photo: Image.Image, damage: str) -> None:
    whole = packed(photo, "PNG")
    data = {
        "empty": b"",
        "noise": bytes(range(256)),
        "truncated": whole[: len(whole) // 2],
        "html": b"<html>404</html>",
    }
    reasons = []
    for _ in range(2):
        with pytest.raises(ValueError, match=r"empty file|unreadable image") as caught:
            load_image(bytes(data[damage]))
        reasons.append(str(caught.value))
    assert reasons[0] == reasons[1]
    assert "0x" not in reasons[0]


def test_columns_are_the_hidden_states_that_transformers_names(clip: Path) -> None:
    from transformers import CLIPVisionModel

    spec = describe_encoder(str(clip), None)
    columns = columns_of(spec, [0, 1, 3], [2, 3])
    assert [column.name for column in columns] == ["block00", "block01", "block03", "cls02", "cls03"]
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    encoder = Encoder(str(clip), None, columns, "float32")
    features = encoder(pixels)
    whole = CLIPVisionModel.from_pretrained(clip, attn_implementation="sdpa")(pixels, output_hidden_states=True)
    for column in columns:
        hidden = whole.hidden_states[column.block]
        expected = hidden[:, :1] if column.name.startswith("cls") else hidden[:, 1:]
        assert features[column.name].shape == (3, column.tokens, column.width)
        assert torch.equal(features[column.name], expected)
    assert len(encoder._tower.encoder.layers) == 3, "blocks above the deepest column are not kept"


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_half_precision_is_near_single(clip: Path, compute: str) -> None:
    columns = columns_of(describe_encoder(str(clip), None), [4], [])
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    full = Encoder(str(clip), None, columns, "float32")(pixels)["block04"]
    half = Encoder(str(clip), None, columns, compute)(pixels)["block04"]
    assert half.dtype == getattr(torch, compute)
    assert float((half.float() - full).norm() / full.norm()) < 0.02
