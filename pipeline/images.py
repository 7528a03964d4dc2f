"""Image roots (folders and .zip archives, local or s3://) -> the bytes of an image by name.

What a root holds is decided here, for the plan, the build, verification and evaluation alike: regular files, through
links too, under the names that records ask for, in any Unicode normal form.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import posixpath
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from pipeline.storage import Storage, is_absent

LOCAL_HEADER = 30  # bytes of a zip member's header before its name
SHOWN = 3  # names of each side in a message about names
_ENCRYPTED, _UTF8 = 0x1, 0x800  # flag bits of a zip member
_PACKINGS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 98: "ppmd", 99: "AES"}  # not read
ENCODINGS = (  # of names in archives that do not tell theirs: what Windows packs in as many countries
    *("utf-8", "cp437", "gb18030", "big5hkscs", "cp932", "cp949", "cp1252", "cp1250", "cp1251", "cp1253", "cp1254"),
    *("cp1255", "cp1256", "cp1257", "cp1258", "cp850", "cp852", "cp866", "cp874"),
)
_UNICODE_PATH = 0x7075  # the extra field that holds a member's name in UTF-8


class MissingImageError(ValueError):
    """No image root has the image."""


class ZipMember(NamedTuple):
    """Where a file lies within a zip archive."""

    offset: int  # of its local header
    packed: int  # bytes in the archive
    size: int
    method: int
    crc: int


class ImageSource:
    """Images by name from one or several roots, tried in order.

    `places` comes from `index_zips` on the driver: opening an archive of 600,000 images takes seconds, once is enough.
    """

    def __init__(self, roots: tuple[str, ...]) -> None:
        self._roots = roots
        self._storages = [Storage(root.rpartition("/")[0] or ".") if is_zip(root) else Storage(root) for root in roots]

    def read(self, name: str, places: Sequence[ZipMember | None] | None = None) -> bytes:
        """The bytes of an image.

        Raises:
            MissingImageError: if no root has it. ValueError: if the archive's copy is damaged.
            OSError: for what is no fact of the image: permission, network, disk, a root that is not there (any more).
        """
        from pipeline.encoders.decode import check_bytes

        for number, (root, storage) in enumerate(zip(self._roots, self._storages, strict=True)):
            if is_zip(root):
                found = places[number] if places else None
                if found is not None:
                    place = ZipMember(*found)  # as a list, if it comes from JSON
                    check_bytes(place.size)
                    check_bytes(place.packed)
                    return _read_member(storage, root.rpartition("/")[2], place)
                continue
            for spelling in spellings(name):
                path = storage.local_path(spelling)
                if path is not None and not is_file(path):
                    continue
                try:
                    return storage.read(spelling, check_bytes)
                except OSError as error:
                    if not is_absent(error):
                        raise
            if "://" not in root and not Path(root).is_dir():
                host = os.uname().nodename
                raise OSError(errno.ENOTCONN, f"the image folder {root} is not there on {host}; mount it")
        if name.startswith("data:"):
            raise MissingImageError(
                f"missing image: {name[:40]!r} holds the image itself; write it to a file, name that"
            )
        raise MissingImageError("missing image: no image folder or archive has it; add it to one")


def spellings(name: str) -> tuple[str, ...]:
    """`name` and its other Unicode normal forms: a Mac's folder spells `é` as two characters, most texts as one."""
    if name.isascii():
        return (name,)
    return tuple(dict.fromkeys((name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))))


def is_file(path: Path) -> bool:
    """Whether a regular file is there, itself or at the end of links: no folder, device, pipe or endless link.

    Raises:
        OSError: if that cannot be told, for example for want of permission.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if is_absent(error):
            return False
        raise
    except ValueError:  # a name that no file can have
        return False


def find_file(folder: Path, name: str) -> Path | None:
    """The file that `name` means in `folder`, None if there is none. A name cannot lead out of it; a link in it may."""
    top = Path.cwd() / folder
    paths = [Path(os.path.normpath(top / spelling)) for spelling in spellings(name)]  # not resolved: links are followed
    return next((path for path in paths if path.is_relative_to(os.path.normpath(top)) and is_file(path)), None)


def is_zip(root: str) -> bool:
    """Whether an image root is an archive."""
    return root.lower().endswith(".zip")


def _read_member(storage: Storage, archive: str, place: ZipMember) -> bytes:
    """Two range reads: the local header, whose two lengths say where the data start, then the data."""
    header = storage.read_range(archive, place.offset, LOCAL_HEADER)
    name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    start = place.offset + LOCAL_HEADER + name_length + extra_length
    packed = storage.read_range(archive, start, place.packed)
    try:
        data = (
            packed if place.method == zipfile.ZIP_STORED else zlib.decompressobj(-15).decompress(packed, place.size + 1)
        )
    except zlib.error as error:
        raise ValueError(f"damaged in the archive: {error}; copy the archive again") from error
    crc = zlib.crc32(data)
    if len(data) != place.size or crc != place.crc:
        raise ValueError(
            f"damaged in the archive: wrong checksum {crc:08x} of {len(data)} bytes, where its index says "
            f"{place.crc:08x} of {place.size}; copy the archive again"
        )
    return data


def index_zips(roots: tuple[str, ...], asked: Iterable[str | None] = ()) -> list[dict[str, ZipMember]]:
    """For each root, where the members of its archive lie (empty for folders), by every spelling of their names.

    `asked`: the names that records ask for, which tell in what encoding an archive's names are if it does not say.

    Raises:
        ValueError: if an archive is not there, is none, or holds what cannot be read in place.
    """
    odd = {name for name in asked if name is not None and not name.isascii()} if any(map(is_zip, roots)) else set()
    return [_index_zip(root, odd) if is_zip(root) else {} for root in roots]


def _index_zip(root: str, asked: Set[str] = frozenset()) -> dict[str, ZipMember]:
    """The members of one archive; `asked`: names beyond ASCII."""
    folder, _, name = root.rpartition("/")
    try:
        with Storage(folder or ".").open(name) as file, zipfile.ZipFile(file) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except FileNotFoundError as error:
        raise ValueError(f"images: {root} does not exist; give a folder or a .zip file") from error
    except IsADirectoryError as error:
        raise ValueError(f"images: {root} is a folder; rename it, so that it does not end in .zip") from error
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError, UnicodeError) as error:
        read = error.__context__  # zipfile takes any error of reading for the lack of an end
        if isinstance(read, OSError) and read.errno != errno.EINVAL:  # a place before the start of the file is damage
            raise read from None
        raise ValueError(f"images: {root} is not a zip archive: {error}; copy it again") from error
    index: dict[str, ZipMember] = {}
    unsaid: dict[bytes, ZipMember] = {}  # by names in an encoding that the archive does not tell
    for info in infos:
        if info.flag_bits & _ENCRYPTED:
            raise ValueError(f"images: {root} is encrypted ({info.filename}); unpack it with its password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            packing = _PACKINGS.get(info.compress_type, f"method {info.compress_type}")
            raise ValueError(
                f"images: {root} is packed with {packing} ({info.filename}), which cannot be read in place; unpack it, "
                "or pack it again with `zip -r` (stored or deflated)"
            )
        member = ZipMember(info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
        if (said := _said_name(info)) is None:
            unsaid[info.filename.encode("cp437")] = member  # as which Python reads it, byte for byte
        else:
            index[_plain(said)] = member
    index |= _in_one_encoding(unsaid, asked - index.keys())
    for name in [name for name in index if not name.isascii()]:
        for spelling in spellings(name):
            index.setdefault(spelling, index[name])
    return index


def _plain(name: str) -> str:
    """A member's name as records write it: no backslashes, no leading `./`."""
    return posixpath.normpath(name.replace("\\", "/"))


def _said_name(info: zipfile.ZipInfo) -> str | None:
    """A member's name if the archive says in what encoding it is."""
    if info.flag_bits & _UTF8 or info.filename.isascii():
        return info.filename
    extra = info.extra
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == _UNICODE_PATH and size > 5:  # a version (1 byte), the CRC of the other name (4), then this one
            return extra[9 : 4 + size].decode("utf-8", "replace")
        extra = extra[4 + size :]
    return None


def _in_one_encoding(unsaid: Mapping[bytes, ZipMember], asked: Set[str]) -> dict[str, ZipMember]:
    """Members by their names: read as UTF-8, as macOS writes it, else as cp437, and as the records ask for them.

    One packer wrote them all, so one encoding is theirs. It is the one that gives most of the names that are `asked`
    for; if two give as many, but other members, none is believed.
    """
    plain, found = {}, []
    for raw, member in unsaid.items():
        try:
            plain[_plain(raw.decode())] = member
        except UnicodeError:
            plain[_plain(raw.decode("cp437"))] = member
    forms = {name: unicodedata.normalize("NFC", name) for name in asked}
    for encoding in ENCODINGS if asked - plain.keys() else ():
        with contextlib.suppress(UnicodeError):
            there = {unicodedata.normalize("NFC", _plain(raw.decode(encoding))): raw for raw in unsaid}
            found.append({name: unsaid[there[form]] for name, form in forms.items() if form in there})
    best = max(found, key=len, default={})
    if any(len(other) == len(best) and other != best for other in found):
        return plain
    return plain | best


def absent_images(roots: tuple[str, ...], names: Iterable[str]) -> list[str]:
    """Those of `names` that no root has, by the rules of `ImageSource.read`; a bucket is listed once.

    Raises:
        ValueError, OSError: if a root cannot be read.
    """
    names = list(names)
    for root, index in zip(roots, index_zips(roots, names), strict=True):
        if is_zip(root):
            names = [name for name in names if name not in index]
        elif "://" in root:
            there = Storage(root).list()
            names = [name for name in names if there.keys().isdisjoint(spellings(name))]
        else:
            names = [name for name in names if find_file(Path(root), name) is None]
    return names


def compare_names(roots: tuple[str, ...], absent: Sequence[str]) -> str:
    """Names that are asked for beside names that are there, for a message about images that are missing."""

    def holds(root: str) -> str:
        try:
            return f"{root} holds {', '.join(_shown(_names_in(root))) or 'nothing'}"
        except (ValueError, OSError) as error:  # the message is about something else
            return f"what {root} holds cannot be listed ({error})"

    return f"asked for {', '.join(_shown(absent))}; " + "; ".join(map(holds, roots))


def _names_in(root: str) -> Iterable[str]:
    """Names in a root as they are spelled there, the first ones at least."""
    if is_zip(root):
        return _index_zip(root)
    return Storage(root).first(SHOWN) if "://" in root else _walk(Path(root))


def _walk(root: Path) -> Iterator[str]:
    """Names of the files below `root`, linked folders included: each real folder once, so that loops end."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        paths = [Path(folder, file) for file in sorted(files)]
        yield from (path.relative_to(root).as_posix() for path in paths if path.is_file())


def _shown(names: Iterable[str]) -> list[str]:
    """The first names, in quotes, the long ones cut."""
    return [repr(name if len(name) <= 80 else f"{name[:77]}...") for name in itertools.islice(names, SHOWN)]


def check_roots(roots: tuple[str, ...]) -> None:
    """Say at once what would otherwise fail for every image.

    Raises:
        ValueError: naming a root that does not exist, is empty, or is an archive of another kind.
    """
    for root in roots:
        if is_zip(root):
            continue  # whoever reads it looks into it
        if "://" not in root:
            if not Path(root).exists():
                raise ValueError(f"images: {root} does not exist; give image folders or .zip files")
            if not Path(root).is_dir():
                raise ValueError(f"images: {root} is a file, not a folder or a .zip; unpack it, or make it a .zip")
        else:
            _check_bucket(root)


def _check_bucket(root: str) -> None:
    """Raise ValueError if nothing lies below an S3 root. Credentials that may not list are no fault."""
    try:
        there = Storage(root).first(1)
    except PermissionError:
        return
    except FileNotFoundError as error:
        raise ValueError(f"images: {root}: {error.strerror}; give an existing bucket") from error
    if not there:
        raise ValueError(f"images: nothing lies below {root}; give a folder of images, or a .zip file")
