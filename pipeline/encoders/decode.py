"""Image files to upright RGB: one way for the build, evaluation, chat and exported models, with Pillow.

What is wrong with an image is a ValueError whose reason is the same on every machine. The bounds below keep what one
image takes to some 1.5 GB, and as much again in another process for a TIFF that is decoded twice (one not packed in a
way of NOTICES_DAMAGE); a MemoryError is therefore of the moment, and passes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import signal
import stat
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from .pixels import bands

MAX_BYTES = 2**30  # of a file
MAX_PIXELS = 178_956_970  # Pillow's own bound for a decompression bomb
MAX_SIDE = 2**16  # in pixels: every row of a tall image is padded to its height, which takes this squared
MAX_RATIO = 10_000  # of the sides: the image is enlarged until the short one fills the encoder's input


ORIENTATION = 0x0112  # EXIF's tag
TURNS = {  # what undoes each orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"  # what their files begin with
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of TIFF
# Ways to pack a TIFF that notice damage. Of the others libtiff leaves pixels as the memory was.
NOTICES_DAMAGE = {"raw", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits"}
DECODE = """
import hashlib, io, resource, sys
from PIL import Image
page, seconds = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
data = sys.stdin.buffer.read()
try:
    image = Image.open(io.BytesIO(data))
    image.seek(page)
    image.load_end = lambda: None
    image.load()
except MemoryError:
    raise
except Exception:
    print("unreadable")
else:
    print(hashlib.sha256(image.tobytes()).hexdigest())
"""
CPU_S = 120  # s of CPU time in which a TIFF is decoded again; the largest sound ones take some seconds
# Signals by which damaged data end a decoder; any other comes from outside.
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
_ADDRESS = re.compile(r" ?<?_io\.\w+ object at 0x[0-9a-f]+>?|0x[0-9a-f]{6,}")  # Pillow's texts hold object addresses

warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd metadata, and bombs, which are refused below


def open_image(path: Path) -> Image.Image:
    """The upright RGB image of a local file.

    Raises:
        ValueError: with the path and a reason, if it is no readable image. OSError: if it cannot be read.
    """
    try:
        return load_image(read_image(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_image(path: Path) -> bytes:
    """The bytes of a local file, which need not be there nor end: a link may lead to a device.

    Raises:
        ValueError: with a reason, if it is not a file of at most MAX_BYTES. OSError: if it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or a FIFO would be waited for
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "a folder, not an image", str(path))
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is a device, a pipe or a socket; give a file")
        check_bytes(status.st_size)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(descriptor)


def check_bytes(size: int) -> None:
    """Raise ValueError for a file that is not to be read, for its size in bytes."""
    if size == 0:  # so say the endless files of /proc
        raise ValueError("empty file")
    if size > MAX_BYTES:
        raise ValueError(f"file of {size:,} bytes, images of up to {MAX_BYTES:,} are read; make it smaller")


def load_image(data: bytes) -> Image.Image:
    """The upright RGB image in the bytes of a file, of any format and mode that Pillow itself reads.

    Raises:
        ValueError: with a reason, if there is no readable image. OSError: if another process must decode it and fails.
    """
    if not data:
        raise ValueError("empty file")
    try:
        return upright_rgb(_opened(data))
    except ValueError:
        for signature, essential in ((PNG, _essential_png), (JPEG, _essential_jpeg)):
            if data.startswith(signature):
                with contextlib.suppress(ValueError):
                    return upright_rgb(_opened(essential(data)))
        raise


def upright_rgb(image: Image.Image) -> Image.Image:
    """RGB as a viewer sees it: EXIF orientation applied, 16-bit grey scaled to 8 bit, other modes by `convert`.

    It never alters `image`, and may return it. The result has no EXIF left that would turn it again.

    Raises:
        ValueError: with a reason, if the image cannot be decoded or is too large. OSError: as `load_image`.
    """
    _check_bounds(image)
    expected = _decoded_elsewhere(image)
    with _reasons():
        _decode(image)
    _check_bounds(image)  # an icon's header need not say how large its image is
    if expected is not None and expected != hashlib.sha256(image.tobytes()).hexdigest():
        raise ValueError(
            f"damaged {image.width}x{image.height} TIFF: it decodes to other pixels each time; copy it again"
        )
    with _reasons():
        turn = TURNS.get(_orientation(image))
        if turn is not None:
            image = image.transpose(turn)
            image.info = {}
        if image.mode.startswith(("I", "F")):
            return _from_deep(image)
        return image if image.mode == "RGB" else image.convert("RGB")


def _opened(data: bytes) -> Image.Image:
    """The image whose header is read, its pixels not yet."""
    with _reasons():
        return Image.open(io.BytesIO(data))


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Pillow raises anything (OSError, SyntaxError, struct.error, ...): a ValueError with a reason, cut to one line."""
    try:
        yield
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"refused as a decompression bomb: {error}; make it smaller") from error
    except Exception as error:
        said = _ADDRESS.sub("", str(error)).strip() or type(error).__name__
        # Which of the two a decoder says of the same damage depends on what its memory held.
        said = said.replace("unrecognized data stream contents", "broken data stream")
        raise ValueError(f"unreadable image: {' '.join(said[:300].split())}") from error


def _check_bounds(image: Image.Image) -> None:
    """Raise ValueError for an image that would take too much memory, or that only another program can draw."""
    width, height = image.size
    short, long = sorted(image.size)
    size = f"{width}x{height} pixels"
    if short < 1:
        raise ValueError(f"{size}: empty")
    is_slow = any(part[0] in Image.DECODERS for part in getattr(image, "tile", ()))  # decoded by Python
    if width * height > (MAX_PIXELS // 10 if is_slow else MAX_PIXELS):
        raise ValueError(f"{size}: refused as a decompression bomb; make it smaller")
    if long > MAX_SIDE or long > MAX_RATIO * short:
        raise ValueError(
            f"{size}: too long; sides of up to {MAX_SIDE:,} are read, and up to {MAX_RATIO:,} times the other; cut it"
        )
    tags = getattr(image, "tag_v2", {})
    wide, high = tags.get(TILE_WIDTH, 1), tags.get(TILE_LENGTH, 1)
    if not isinstance(wide, int) or not isinstance(high, int) or wide * high > MAX_PIXELS:
        raise ValueError(f"tiles of {wide}x{high} pixels: refused as a decompression bomb; make it smaller")
    if image.format == "EPS":
        raise ValueError(f"{size} of an EPS file, which only another program can draw; convert it to PNG")


def _decode(image: Image.Image) -> None:
    """Read the pixels of an image, whatever its metadata are."""
    if not isinstance(image, ImageFile.ImageFile) or image.format not in ("PNG", "TIFF") or not image.tile:
        image.load()
        return
    if image.format == "TIFF":
        _orientation(image)  # known from now on: the file is closed when it is decoded
    read_metadata = image.load_end

    def load_end() -> None:
        """In the place of Pillow's: what stands behind the pixels is no reason to lose them. TIFFs are turned later."""
        with _as_far_as_sound():
            if image.format == "PNG":
                read_metadata()

    vars(image)["load_end"] = load_end
    try:
        image.load()
    finally:
        del vars(image)["load_end"]


@contextlib.contextmanager
def _as_far_as_sound() -> Iterator[None]:
    """For metadata: what they say before a fault counts, the fault does not."""
    try:
        yield
    except MemoryError:
        raise
    except Exception:
        pass


def _orientation(image: Image.Image) -> Any:
    """What EXIF or XMP say of it, as far as they can be read."""
    with _as_far_as_sound():
        image.getexif()
    with _as_far_as_sound():
        return image.getexif().get(ORIENTATION)  # after an error it gives what it had read until then
    return None


def _decoded_elsewhere(image: Image.Image) -> str | None:
    """The digest of a TIFF that another process decodes in memory filled with other bytes; None if none is needed.

    Raises:
        ValueError: if the decoder crashes or does not end. MemoryError: if the process has too little.
        OSError: if it fails otherwise.
    """
    if not isinstance(image, ImageFile.ImageFile) or image.format != "TIFF" or not image.tile or image.fp is None:
        return None
    if image.info.get("compression") in NOTICES_DAMAGE:
        return None
    place = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(place)
    command = [sys.executable, "-P", "-c", DECODE, str(image.tell()), str(CPU_S)]
    fill = {"MALLOC_PERTURB_": "165", "MallocPreScribble": "1"}  # of Linux and of macOS
    done = subprocess.run(command, input=data, capture_output=True, env=os.environ | fill, check=False)
    if done.returncode == -signal.SIGKILL or b"MemoryError" in done.stderr:
        raise MemoryError(f"decoding a TIFF of {image.width}x{image.height} pixels")
    if -done.returncode in CRASHES:
        raise ValueError(f"damaged {image.width}x{image.height} TIFF: its decoder crashes; copy it again")
    if done.returncode == -signal.SIGXCPU:
        said = f"its decoder has not ended after {CPU_S} s of CPU time"
        raise ValueError(f"damaged {image.width}x{image.height} TIFF: {said}; copy it again")
    if not done.stdout:
        said = (str(done.stderr, "utf-8", "replace").splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise OSError(errno.EIO, f"the process that decodes a TIFF a second time failed: {said}; run again")
    return str(done.stdout, "ascii").strip()


def _essential_png(png: bytes) -> bytes:
    """Only the chunks that the pixels need, and the EXIF if that is whole."""
    kept, at = [PNG], len(PNG)
    while at < len(png):
        kind = png[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")  # its length, its kind, the payload, its checksum
        is_whole = zlib.crc32(png[at + 4 : end - 4]).to_bytes(4, "big") == png[end - 4 : end]
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or (kind == b"eXIf" and is_whole):
            kept.append(png[at:end])
        at = end
    return b"".join(kept)


def _essential_jpeg(jpeg: bytes) -> bytes:
    """Without what applications add (profiles, further images, comments), except EXIF and what tells the colours."""
    kept, at = [JPEG], len(JPEG)
    while jpeg[at : at + 1] == b"\xff" and jpeg[at + 1 : at + 2] != b"\xda":  # a segment before the pixels
        kind = jpeg[at + 1 : at + 2]
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        # APP0 to APP15 are 0xE0 to 0xEF: JFIF is 0, EXIF is 1, Adobe's colours are 14. A comment is 0xFE.
        if not (b"\xe2" <= kind <= b"\xed" or kind in (b"\xef", b"\xfe")):
            kept.append(jpeg[at:end])
        at = end
    return b"".join([*kept, jpeg[at:]])


def _from_deep(image: Image.Image) -> Image.Image:
    """16 and 32 bit grey to RGB: `convert` would clip everything above 255 to white."""
    width, height = image.size
    parts = [(0, first, width, last) for first, last in bands(height, width)]
    # Files do not say how many bits they use: one without a value above 255 is taken for 8 bit.
    highest = max(_numbers(image, part).max() for part in parts)
    top = 255.0 if highest <= 255 else 65535.0
    rgb = Image.new("RGB", image.size)
    for part in parts:
        grey = np.clip(_numbers(image, part) * (255.0 / top), 0, 255).astype(np.uint8)
        rgb.paste(Image.fromarray(grey).convert("RGB"), part)
    return rgb


def _numbers(image: Image.Image, part: tuple[int, int, int, int]) -> npt.NDArray[np.float64]:
    """Grey values (rows, width) of a part; what is no number counts as 0."""
    return np.nan_to_num(np.asarray(image.crop(part)).astype(np.float64))
