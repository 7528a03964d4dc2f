"""An image never stops anything: it is read in bounded memory whatever its metadata are, or refused with a reason."""

from __future__ import annotations

import hashlib
import io
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from pipeline.encoders import decode, pixels
from pipeline.encoders.clip import Clip
from pipeline.encoders.decode import MAX_BYTES, load_image, open_image, upright_rgb
from training.model.processor import CompactVisionImageProcessor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
RED = Image.new("RGB", (40, 30), (200, 30, 60))


def packed(image: Image.Image, kind: str, **more: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **more)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """An entry of a TIFF directory: its value, or where that is."""
    return struct.pack("<HHI4s", tag, kind, count, value)


def exif(*entries: bytes, rest: bytes = b"") -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4) + rest


TURN = entry(0x112, 3, 1, struct.pack("<HH", 6, 0))
ODD_EXIF = {
    "prefix twice": b"Exif\0\0" + exif(TURN),
    "header of nothing": b"Exif\0\0" + b"\0\x08\0\x02\x01\x12\0\x03",
    "a rational of -1 / 0": exif(
        TURN, entry(0x11A, 10, 1, struct.pack("<I", 8 + 2 + 24 + 4)), rest=struct.pack("<ii", -1, 0)
    ),
    "orientation as text": exif(entry(0x112, 2, 4, b"abc\0")),
    "orientation 0": exif(entry(0x112, 3, 1, bytes(4))),
    "cut off": exif(TURN, TURN)[:20],
    "GPS of another type": exif(TURN, entry(0x8825, 3, 1, struct.pack("<HH", 7, 0))),
    "text tag with a number": exif(entry(0x10F, 3, 1, struct.pack("<HH", 7, 0)), TURN),
}


@pytest.mark.parametrize("kind", ODD_EXIF)
def test_a_broken_exif_block_never_costs_the_picture(kind: str) -> None:
    data = packed(RED, "JPEG", exif=ODD_EXIF[kind])
    process = CompactVisionImageProcessor(image_size=32)
    exported = process(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0]
    read = load_image(data)
    assert np.array_equal(exported, Clip().pixels(read, "pad", 32))
    lost = ("header of nothing", "orientation as text", "orientation 0", "cut off")
    assert read.size == ((40, 30) if kind in lost else (30, 40)), "what can be read of it counts"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_photo_is_turned_once_wherever_it_comes_from(kind: str) -> None:
    options = {"compression": "tiff_lzw"} if kind == "TIFF" else {}
    data = packed(noise(40, 30), kind, exif=exif(TURN)[6:] if kind == "WEBP" else exif(TURN), **options)
    upright = load_image(data)
    assert upright.size == (30, 40)
    assert np.array_equal(upright, ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert upright_rgb(upright).size == (30, 40), "no EXIF is left"
    assert upright_rgb(Image.open(io.BytesIO(data))).size == (30, 40)


def with_chunk(png: bytes, more: bytes, before: bytes) -> bytes:
    at = png.index(before) - 4
    return png[:at] + more + png[at:]


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("damage", ["text bomb", "many texts", "profile bomb", "checksum", "too short"])
def test_metadata_of_a_png_never_cost_the_pixels(damage: str, before: bytes) -> None:
    bomb = zlib.compress(bytes(2**21))
    more = {
        "text bomb": chunk(b"zTXt", b"a\0\0" + bomb),
        "many texts": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20 - 10))) * 70,
        "profile bomb": chunk(b"iCCP", b"a\0\0" + bomb),
        "checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"x",
        "too short": chunk(b"pHYs", b"a"),
    }[damage]
    plain = packed(noise(40, 30), "PNG", exif=exif(TURN))
    assert np.array_equal(load_image(with_chunk(plain, more, before)), load_image(plain))
    assert load_image(plain).size == (30, 40)


def test_a_phone_s_photo_is_read_though_its_list_of_further_images_is_broken() -> None:
    data = packed(RED, "MPO", save_all=True, append_images=[RED])
    at = data.index(b"MPF\0") + 4
    for broken in (data[: at + 20] + b"\xff" * 8 + data[at + 28 :], data[: at + 8] + bytes(40) + data[at + 48 :]):
        assert np.array_equal(load_image(broken), load_image(data))


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_a_long_image_s_pixels_are_those_of_the_whole_canvas(aspect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def plainly(image: Image.Image, size: int) -> np.ndarray:
        if aspect == "pad":
            side, colour = max(image.size), tuple(int(channel * 255) for channel in Clip.mean)
            square = Image.new("RGB", (side, side), colour)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        other = int(size * max(image.size) / min(image.size))
        to = (size, other) if image.width <= image.height else (other, size)
        left, top = (to[0] - size) // 2, (to[1] - size) // 2
        whole = image.resize(to, Image.Resampling.BICUBIC)
        return np.asarray(whole.crop((left, top, left + size, top + size)))

    monkeypatch.setattr(pixels, "BAND", 5_000)  # many bands, of a few rows or one
    small = [(300, 7), (7, 300), (1, 400), (400, 1), (64, 48), (48, 65), (33, 33)]
    for width, height, size in [*((*each, 32) for each in small), (700, 500, 336), (301, 703, 336)]:
        image = noise(width, height, seed=size)
        padded = aspect == "pad"
        banded = (
            pixels.padded_and_resized(image, size, Clip.mean) if padded else pixels.resized_and_cropped(image, size)
        )
        assert np.array_equal(banded, plainly(image, size)), (width, height, size)


BOUNDED = """
import io, resource, sys
from pipeline.encoders.decode import load_image
from pipeline.encoders.pixels import padded_and_resized, resized_and_cropped
data = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = load_image(data)
print(padded_and_resized(image, 336, (0.5, 0.5, 0.5)).shape, resized_and_cropped(image, 336).shape)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_strip_of_60000_pixels_takes_some_hundred_megabytes() -> None:
    data = packed(noise(60_000, 8), "PNG")
    done = subprocess.run([sys.executable, "-c", BOUNDED], input=data, capture_output=True, check=True)
    assert done.stdout.startswith(b"(336, 336, 3) (336, 336, 3)")
    assert int(done.stdout.split()[-1]) < 600, "its square has 10.8 GB, its enlarged form 2.5 GB"


@pytest.mark.parametrize(
    ("size", "reason"),
    [((200_000, 100), "too long"), ((3, 40_000), "too long"), ((14_000, 14_000), "decompression bomb")],
)
def test_what_would_take_too_much_is_refused_with_its_size(size: tuple[int, int], reason: str) -> None:
    image = Image.new("1", size)
    process = CompactVisionImageProcessor(image_size=32)
    for read in (lambda: load_image(packed(image, "PNG")), lambda: process(image)):
        with pytest.raises(ValueError, match=reason):
            read()


def gif() -> bytes:
    """A canvas of 60,000 x 60,000 for a frame of one pixel."""
    return packed(RED.crop((0, 0, 1, 1)).quantize(2), "GIF").replace(struct.pack("<HH", 1, 1), b"\x60\xea\x60\xea", 1)


def tiled() -> bytes:
    """A TIFF of 16 x 16 whose one tile says that it has 60,000 x 60,000."""
    entries = [
        *(entry(tag, 4, 1, struct.pack("<I", value)) for tag, value in ((256, 16), (257, 16))),
        *(entry(tag, 3, 1, struct.pack("<HH", value, 0)) for tag, value in ((258, 8), (259, 5), (262, 1))),
        *(entry(tag, 4, 1, struct.pack("<I", value)) for tag, value in ((322, 60_000), (323, 60_000))),
        *(entry(tag, 4, 1, struct.pack("<I", value)) for tag, value in ((324, 8), (325, 100))),
    ]
    return exif(*entries, rest=bytes(100))[6:]


def slow() -> bytes:
    """An image that Pillow decodes in Python, of 100 million pixels and nearly no bytes."""
    return b"P3 10000 10000 255\n1 1 1"


@pytest.mark.parametrize("make", [gif, tiled, slow])
def test_a_header_that_promises_too_much_is_refused_at_once(make: Callable[[], bytes]) -> None:
    with pytest.raises(ValueError, match="refused as a decompression bomb"):
        load_image(make())


def test_an_image_that_another_program_would_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="EPS"):
        load_image(packed(RED, "EPS"))


@pytest.mark.parametrize("compression", ["group3", "group4"])
def test_a_fax_is_read(compression: str) -> None:
    page = noise(160, 120).convert("1")
    data = packed(page, "TIFF", compression=compression)
    for image in (load_image(data), upright_rgb(Image.open(io.BytesIO(data)))):
        assert np.array_equal(image, page.convert("RGB"))


def test_every_page_of_a_fax_is_read() -> None:
    pages = [noise(160, 120, seed).convert("1") for seed in range(3)]
    data = packed(pages[0], "TIFF", compression="group4", save_all=True, append_images=pages[1:])
    with Image.open(io.BytesIO(data)) as image:
        for number in (2, 0, 1):
            image.seek(number)
            assert np.array_equal(upright_rgb(image), pages[number].convert("RGB"))


def test_a_damaged_fax_is_refused_where_its_pixels_would_be_those_of_the_memory() -> None:
    data = bytearray(packed(noise(160, 120).convert("1"), "TIFF", compression="group4"))
    strip = len(data) // 2
    data[strip : strip + 40] = bytes(40)
    process = CompactVisionImageProcessor(image_size=32)
    for read in (load_image, lambda data: process(Image.open(io.BytesIO(data)))):
        with pytest.raises(ValueError, match="other pixels each time"):
            read(bytes(data))


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        ("raise SystemExit('no room')", OSError, "no room"),
        ("os.kill(os.getpid(), signal.SIGTERM)", OSError, "ended with code -15"),
        ("os.kill(os.getpid(), signal.SIGKILL)", MemoryError, "a TIFF of 160x120"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", ValueError, "its decoder crashes"),
        ("threading.Thread(target=exec, args=['while True: pass']).start()", ValueError, "not ended after 1 s of CPU"),
    ],
)
def test_only_what_its_bytes_do_is_a_fault_of_the_image(
    line: str, kind: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = packed(noise(160, 120).convert("1"), "TIFF", compression="group4")
    # What Python runs first in the process that decodes it again.
    (tmp_path / "sitecustomize.py").write_text(f"import os, signal, threading\n{line}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(decode, "CPU_S", 1)
    with pytest.raises(kind, match=said):
        load_image(data)


def test_grey_of_16_and_32_bits_is_the_same_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = np.random.default_rng(0).integers(0, 65536, (50, 40))
    images = [Image.fromarray(grey.astype(kind)) for kind in (np.uint16, np.int32, np.float32)]
    images.append(Image.frombytes("I;16B", (40, 50), grey.astype(">u2").tobytes()))
    whole = np.clip(grey * (255 / 65535), 0, 255).astype(np.uint8)
    monkeypatch.setattr(pixels, "BAND", 100)
    for image in images:
        assert np.array_equal(np.asarray(upright_rgb(image))[..., 0], whole), image.mode
    holes = Image.fromarray(np.array([[np.nan, 100.0, 200.0]], np.float32))
    assert np.asarray(upright_rgb(holes))[0, :, 0].tolist() == [0, 100, 200]


def test_too_little_memory_is_no_fault_of_the_image() -> None:
    script = """
import io, resource, sys
from pipeline.encoders.decode import load_image
now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**27, now + 2**27))
load_image(sys.stdin.buffer.read())
"""
    data = packed(Image.new("1", (8_000, 8_000)), "PNG")
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=False)
    assert b"\nMemoryError" in done.stderr
    assert load_image(data).size == (8_000, 8_000)


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "loop", "long name", "gigabytes"])
def test_a_path_that_is_no_image_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.jpg"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "long name":
        path = tmp_path / ("n" * 5_000)
    else:
        path.touch()
        os.truncate(path, MAX_BYTES + 1)
    with pytest.raises((ValueError, OSError), match=r"odd\.jpg|nnn"):
        open_image(path)


def test_an_exported_processor_reads_a_file_as_the_build_does(tmp_path: Path) -> None:
    data = packed(RED, "JPEG", exif=ODD_EXIF["a rational of -1 / 0"])
    (tmp_path / "photo.jpg").write_bytes(data)
    process = CompactVisionImageProcessor(image_size=32)
    assert process.fetch_images([str(tmp_path / "photo.jpg")])[0].size == (30, 40)


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 10))):
        at = rng.randrange(len(changed))
        how = rng.randrange(4)
        if how == 0:
            changed[at] = rng.randrange(256)
        elif how == 1:
            changed[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 0xFFFF, 2**31, 2**32 - 1)))
        elif how == 2:
            del changed[at : at + rng.randrange(1, 30)]
        else:
            changed[at:at] = rng.randbytes(rng.randrange(1, 20))
    return bytes(changed)


def test_any_bytes_are_an_image_or_have_a_reason_the_same_each_time() -> None:
    photo, text = noise(48, 36), PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 300, zip=True)
    sources = [
        packed(photo, "JPEG", exif=exif(TURN)),
        packed(photo, "JPEG", progressive=True),
        packed(photo, "PNG", pnginfo=text),
        packed(photo.quantize(32), "GIF"),
        packed(photo, "WEBP"),
        packed(photo, "BMP"),
        *(packed(photo, "TIFF", compression=how) for how in ("raw", "tiff_lzw", "tiff_deflate")),
    ]

    def result(data: bytes) -> str:
        try:
            values = Clip().pixels(load_image(data), "pad", 32)
        except ValueError as error:
            return str(error)
        assert values.shape == (3, 32, 32)
        return hashlib.sha256(values.tobytes()).hexdigest()

    rng = random.Random(15)
    for number in range(360):
        data = mutated(sources[number % len(sources)], rng)
        first = result(data)
        assert first == result(data)
        assert "0x" not in first
