"""What an image root holds: plan, build, verification and evaluation find the same files under the same names."""

from __future__ import annotations

import io
import os
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

from pipeline.encoders import decode
from pipeline.images import (
    ImageSource,
    MissingImageError,
    absent_images,
    check_roots,
    compare_names,
    find_file,
    index_zips,
)
from pipeline.storage import Storage


def test_images_are_found_in_the_first_root_that_has_them(tmp_path: Path) -> None:
    for root, names in (("one", ("a.jpg", "both.jpg")), ("two/coco/train2017", ("b.jpg",)), ("two", ("both.jpg",))):
        (tmp_path / root).mkdir(parents=True, exist_ok=True)
        for name in names:
            (tmp_path / root / name).write_bytes(f"{root}/{name}".encode())
    source = ImageSource((str(tmp_path / "one"), str(tmp_path / "two")))
    assert source.read("a.jpg") == b"one/a.jpg"
    assert source.read("coco/train2017/b.jpg") == b"two/coco/train2017/b.jpg"
    assert source.read("both.jpg") == b"one/both.jpg"
    for missing in ("c.jpg", "coco", "a.jpg/below"):
        with pytest.raises(ValueError, match="missing image"):
            source.read(missing)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("where", ["local", "s3"])
def test_images_are_read_from_inside_a_zip(tmp_path: Path, s3: dict[str, str], method: int, where: str) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w", method) as archive:
        for number in range(3):
            archive.writestr(f"coco/{number}.jpg", f"image {number} ".encode() * 100)
    root = str(tmp_path / "images.zip")
    if where == "s3":
        boto3.client("s3").upload_file(root, "chaos", f"{method}/images.zip")
        root = f"s3://chaos/{method}/images.zip"
    index = index_zips((root,))
    source = ImageSource((root,))
    for number in range(3):
        place = index[0][f"coco/{number}.jpg"]
        assert source.read(f"coco/{number}.jpg", [place]) == f"image {number} ".encode() * 100
    with pytest.raises(ValueError, match="missing image"):
        source.read("coco/3.jpg", [None])
    assert absent_images((root,), ["coco/2.jpg", "coco/3.jpg"]) == ["coco/3.jpg"]


def test_no_root_gives_a_file_above_the_bound(
    tmp_path: Path, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x" * 101)
    boto3.client("s3").upload_file(str(tmp_path / "a.jpg"), "chaos", "bound/a.jpg")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "a.jpg", "a.jpg")
    root = str(tmp_path / "images.zip")
    place = index_zips((root,))[0]["a.jpg"]
    monkeypatch.setattr(decode, "MAX_BYTES", 100)
    reads = [(str(tmp_path), None), ("s3://chaos/bound", None)]
    reads += [(root, place._replace(packed=50)), (root, place._replace(size=50))]
    for root, found in reads:
        with pytest.raises(ValueError, match="file of 101 bytes, images of up to 100 are read"):
            ImageSource((root,)).read("a.jpg", [found])


def test_a_damaged_member_of_a_zip_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", b"x" * 100)
    data = bytearray(path.read_bytes())
    data[data.index(b"x" * 100) + 50] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="wrong checksum"):
        ImageSource((str(path),)).read("a.jpg", [index_zips((str(path),))[0]["a.jpg"]])


@pytest.mark.parametrize(
    "data", [b"", b"PK", b"not a zip", b"PK\6\7" + bytes(12) + b"\1\0\0\0" + b"PK\5\6" + bytes(18)]
)  # the last points before its start
def test_an_archive_that_is_none_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "images.zip").write_bytes(data)
    with pytest.raises(ValueError, match=r"images\.zip is not a zip archive"):
        index_zips((str(tmp_path / "images.zip"),))


def test_folders_within_a_zip_are_no_images(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("folder/", b"")
        archive.writestr("folder/a.jpg", b"1234")
    (tmp_path / "a.ZIP").write_bytes(buffer.getvalue())
    assert set(index_zips((str(tmp_path / "a.ZIP"),))[0]) == {"folder/a.jpg"}


def read(root: Path, name: str) -> bytes:
    """What the build reads, after checking that the plan and evaluation find the same."""
    roots = (str(root),)
    assert absent_images(roots, [name]) == []
    if root.is_dir():
        assert find_file(root, name) is not None
    return ImageSource(roots).read(name, [index.get(name) for index in index_zips(roots)])


def is_missing(root: Path, name: str) -> bool:
    """Whether the build says so, after checking that the plan and evaluation agree."""
    roots = (str(root),)
    assert absent_images(roots, [name]) == [name]
    assert find_file(root, name) is None
    with pytest.raises(MissingImageError):
        ImageSource(roots).read(name)
    return True


def test_images_behind_links_are_found_and_links_without_content_are_missing(tmp_path: Path) -> None:
    (tmp_path / "elsewhere/train2017").mkdir(parents=True)
    (tmp_path / "elsewhere/train2017/0.jpg").write_bytes(b"0")
    root = tmp_path / "images"
    root.mkdir()
    (root / "coco").symlink_to(tmp_path / "elsewhere")
    (root / "one.jpg").symlink_to(tmp_path / "elsewhere/train2017/0.jpg")
    (root / "dangling.jpg").symlink_to(tmp_path / "annex/objects/1")
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    (root / "again").symlink_to(root)
    assert read(root, "coco/train2017/0.jpg") == read(root, "one.jpg") == read(root, "again/again/one.jpg") == b"0"
    for name in ("dangling.jpg", "loop.jpg", "loop.jpg/0.jpg", "coco", "one.jpg/0.jpg", "n" * 300, "a/" * 3000):
        assert is_missing(root, name)
    assert "'coco/train2017/0.jpg'" in compare_names((str(root),), ["0.jpg"])  # and the search ends


def test_a_root_that_cannot_be_listed_does_not_hide_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(self: Storage, count: int) -> list[str]:
        raise PermissionError("Access Denied")

    (tmp_path / "damaged.zip").write_bytes(b"PK")
    monkeypatch.setattr(Storage, "first", refuses)
    said = compare_names(("s3://bucket/images", str(tmp_path / "damaged.zip")), ["a.jpg"])
    assert "asked for 'a.jpg'; what s3://bucket/images holds cannot be listed (Access Denied); what " in said


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert is_missing(tmp_path, "pipe.jpg")


@pytest.mark.parametrize(("there", "asked"), [("NFD", "NFC"), ("NFC", "NFD")])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_names_are_found_in_either_normal_form(tmp_path: Path, there: str, asked: str, kind: str) -> None:
    name = "caf\u00e9/\u30c6\u3099 1.jpg"
    root = tmp_path / "images"
    path = root / unicodedata.normalize(there, name)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"1")
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            archive.write(path, unicodedata.normalize(there, name))
        root = tmp_path / "images.zip"
    assert read(root, unicodedata.normalize(asked, name)) == b"1"


def test_names_are_found_in_either_normal_form_in_a_bucket(s3: dict[str, str]) -> None:
    boto3.client("s3").put_object(Bucket="chaos", Key="forms/cafe\u0301.jpg", Body=b"1")
    roots = ("s3://chaos/forms",)
    assert ImageSource(roots).read("caf\u00e9.jpg") == b"1"
    assert absent_images(roots, ["caf\u00e9.jpg", "cafe.jpg"]) == ["cafe.jpg"]
    with pytest.raises(MissingImageError):
        ImageSource(roots).read("cafe.jpg")


def headers(data: bytearray, change: Callable[[int, int], None]) -> bytearray:
    """Apply `change(position of the flags, position of the method)` to each header of a zip archive."""
    for mark, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.find(mark)
        while at >= 0:
            change(at + flags, at + flags + 2)
            at = data.find(mark, at + 4)
    return data


@pytest.fixture
def archive(tmp_path: Path) -> Callable[..., Path]:
    """archive(name, change): a zip of one file, its headers changed as `headers` says."""

    def make(name: str, change: Callable[[bytearray, int, int], None]) -> Path:
        path = tmp_path / "images.zip"
        with zipfile.ZipFile(path, "w") as zipped:
            zipped.writestr("__MACOSX/._a.jpg", b"")
            zipped.writestr(name, b"1")
        data = bytearray(path.read_bytes())
        path.write_bytes(headers(data, lambda flags, method: change(data, flags, method)))
        return path

    return make


def test_names_that_macos_packs_are_found(archive: Callable[..., Path]) -> None:
    def unflag(data: bytearray, flags: int, _: int) -> None:
        data[flags + 1] &= ~8  # macOS writes UTF-8 without the flag that says so

    path = archive("cafe\u0301 \u4e2d.jpg", unflag)
    assert "\u4e2d" not in "".join(zipfile.ZipFile(path).namelist())
    assert read(path, "caf\u00e9 \u4e2d.jpg") == b"1"


class Unsaid(zipfile.ZipInfo):
    """A member whose name is these bytes, in an encoding that the archive does not tell."""

    raw: bytes

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802
        return self.raw, self.flag_bits & ~0x800


def packed(path: Path, names: dict[bytes, bytes]) -> tuple[str]:
    """An archive of {raw name: content}, as image roots."""
    with zipfile.ZipFile(path, "w") as zipped:
        for number, (raw, content) in enumerate(names.items()):
            info = Unsaid(f"{number}")
            info.raw = raw
            zipped.writestr(info, content)
    return (str(path),)


def found(roots: tuple[str, ...], asked: list[str]) -> dict[str, bytes]:
    """What the build reads of these names, after checking that the plan agrees."""
    places = {name: index_zips(roots, asked)[0].get(name) for name in asked}
    assert absent_images(roots, asked) == [name for name, place in places.items() if place is None]
    return {name: ImageSource(roots).read(name, [place]) for name, place in places.items() if place is not None}


@pytest.mark.parametrize(
    ("encoding", "names"),
    [
        ("gbk", ["照片/联通.jpg", "照片/乗客.jpg"]),  # the first is UTF-8 too, the other holds the byte of a backslash
        ("gb18030", ["照片/㐀.jpg", "é/ü.jpg"]),
        ("big5", ["相片/功能.jpg"]),
        ("cp932", ["写真/表ソ.jpg", "ｶﾅ.jpg"]),
        ("cp949", ["사진/똠방.jpg"]),
        ("cp1251", ["фото/Ёж.jpg"]),
        ("cp866", ["фото/Ёж.jpg"]),
        ("cp1252", ["Fotos/Größe œ.jpg", "Ñandú.jpg"]),
        ("cp850", ["Fotos/Größe ø.jpg"]),
        ("cp437", ["Fotos/Größe.jpg"]),
        ("utf-8", ["照片/联通.jpg", "cafe\u0301.jpg"]),
    ],
)
def test_names_in_an_encoding_that_the_archive_does_not_tell_are_those_that_are_asked_for(
    tmp_path: Path, encoding: str, names: list[str]
) -> None:
    roots = packed(tmp_path / "a.zip", {name.encode(encoding): name.encode() for name in [*names, "plain.jpg"]})
    there = {unicodedata.normalize("NFC", name): name.encode() for name in [*names, "plain.jpg"]}
    assert found(roots, [*there, "ни.jpg", "没有.jpg"]) == there


def test_where_two_encodings_give_as_many_names_but_other_members_none_is_believed(tmp_path: Path) -> None:
    roots = packed(tmp_path / "a.zip", {b"\xe6.jpg": b"1", b"\xf1.jpg": b"2"})
    assert found(roots, ["æ.jpg", "ж.jpg"]) == {}
    assert found(roots, ["æ.jpg", "ж.jpg", "ñ.jpg"]) == {"æ.jpg": b"1", "ñ.jpg": b"2"}
    assert found(roots, ["µ.jpg"]) == {"µ.jpg": b"1"}, "as Python reads it, whoever wrote the records so"


def test_an_archive_whose_names_are_not_what_it_says_is_named(tmp_path: Path) -> None:
    (root,) = packed(tmp_path / "a.zip", {b"\xff.jpg": b"1"})
    data = bytearray(Path(root).read_bytes())

    def flag(flags: int, _: int) -> None:
        data[flags + 1] |= 8

    Path(root).write_bytes(headers(data, flag))
    with pytest.raises(ValueError, match=r"a\.zip is not a zip archive: 'utf-8' codec.*copy it again"):
        index_zips((root,))


def test_names_in_a_field_of_their_own_are_found(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("????.jpg")
    true = "\u4e2d\u6587.jpg".encode()
    info.extra = (0x7075).to_bytes(2, "little") + (5 + len(true)).to_bytes(2, "little") + b"\1\0\0\0\0" + true
    info.filename = "\u00e9.jpg"
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as zipped:
        zipped.writestr(info, b"1")
    data = bytearray((tmp_path / "images.zip").read_bytes())

    def unflag(flags: int, _: int) -> None:
        data[flags + 1] &= ~8

    (tmp_path / "images.zip").write_bytes(headers(data, unflag))
    assert read(tmp_path / "images.zip", "\u4e2d\u6587.jpg") == b"1"


def test_names_with_backslashes_in_an_archive_are_found(archive: Callable[..., Path]) -> None:
    assert read(archive("coco\\0.jpg", lambda *_: None), "coco/0.jpg") == b"1"


@pytest.mark.parametrize(("method", "said"), [(9, "deflate64"), (12, "bzip2"), (14, "lzma"), (77, "method 77")])
def test_other_packings_are_refused_at_once(archive: Callable[..., Path], method: int, said: str) -> None:
    def repack(data: bytearray, _: int, at: int) -> None:
        data[at : at + 2] = method.to_bytes(2, "little")

    with pytest.raises(ValueError, match=rf"images\.zip is packed with .*({said}).*unpack it"):
        index_zips((str(archive("a.jpg", repack)),))


def test_an_encrypted_archive_is_refused_at_once(archive: Callable[..., Path]) -> None:
    def encrypt(data: bytearray, flags: int, _: int) -> None:
        data[flags] |= 1

    with pytest.raises(ValueError, match=r"images\.zip is encrypted .*unpack it with its password"):
        index_zips((str(archive("a.jpg", encrypt)),))


@pytest.mark.parametrize("name", ["images.tar", "images.tar.gz", "images.7z", "picture.jpg", "images.zip/"])
def test_a_file_that_is_no_zip_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name.strip("/")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a file, not a folder or a \.zip; unpack it"):
        check_roots((f"{tmp_path}/{name}",))


def test_a_folder_named_like_an_archive_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "images.zip").mkdir()
    with pytest.raises(ValueError, match=r"images\.zip is a folder; rename it"):
        index_zips((str(tmp_path / "images.zip"),))


@pytest.mark.parametrize(
    ("root", "said"), [("s3://chaos/nothing.tar", "nothing lies below"), ("s3://no-such-bucket/a", "existing bucket")]
)
def test_a_bucket_that_holds_no_image_is_refused_at_once(s3: dict[str, str], root: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_roots((root,))


def test_a_huge_file_is_a_fault_that_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"file of 1,099,511,627,776 bytes"):
        ImageSource((str(tmp_path),)).read("huge.jpg")


def test_a_root_that_goes_away_is_no_fault_of_its_images(tmp_path: Path) -> None:
    source = ImageSource((str(tmp_path / "mounted"),))
    with pytest.raises(OSError, match=r"mounted is not there on .*; mount it"):
        source.read("a.jpg")
