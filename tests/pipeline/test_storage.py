"""An error of storage is a fact of the data at once; what is a fact of the moment is tried again, then raised."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

from pipeline import bucket
from pipeline import storage as storing
from pipeline.images import ImageSource, MissingImageError, index_zips
from pipeline.storage import Storage, is_absent

Answer = Callable[[int, Request], Response]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two attempts nothing is waited for, by us, s3fs or botocore."""
    turn = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: turn(0))
    monkeypatch.setattr(storing.time, "sleep", lambda seconds: None)


def refused(code: str, status: int, text: str = "no") -> Response:
    """An error as S3 words it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message></Error>"
    return Response(body, status=status, mimetype="application/xml")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], list[str]]]:
    """serve(answer): an S3 of which `answer(number of the request, request)` makes each response; the paths asked."""
    with contextlib.ExitStack() as stack:

        def start(answer: Answer) -> list[str]:
            asked: list[str] = []

            @Request.application
            def application(request: Request) -> Response:
                asked.append(request.path)
                return answer(len(asked), request)

            server = make_server("127.0.0.1", 0, application, threaded=True)
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
            stack.callback(server.shutdown)
            keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
            for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}.items():
                monkeypatch.setenv(name, value)
            return asked

        yield start


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken", "TokenRefreshRequired"])
def test_expired_credentials_are_read_again(serve: Callable[[Answer], list[str]], code: str) -> None:
    asked = serve(
        lambda number, _: refused(code, 403 if code == "ExpiredToken" else 400) if number < 4 else Response(b"1")
    )
    assert ImageSource(("s3://bucket/images",)).read("a.jpg") == b"1"
    assert len(asked) == 4


def test_credentials_that_stay_expired_end_the_job_and_are_no_missing_image(
    serve: Callable[[Answer], list[str]],
) -> None:
    asked = serve(lambda *_: refused("ExpiredToken", 403, "The provided token has expired."))
    with pytest.raises(OSError, match=r"token has expired.*s3://bucket/images/a\.jpg; run again when that is mended"):
        ImageSource(("s3://bucket/images",)).read("a.jpg")
    assert len(asked) == storing.ATTEMPTS


def test_a_403_says_that_it_may_mean_a_missing_key(serve: Callable[[Answer], list[str]]) -> None:
    asked = serve(lambda *_: refused("AccessDenied", 403, "Access Denied"))
    with pytest.raises(PermissionError, match=r"Access Denied: s3://bucket/images/a\.jpg.*not there.*ListBucket"):
        ImageSource(("s3://bucket/images",)).read("a.jpg")
    assert len(asked) == 1


@pytest.mark.parametrize(("code", "status"), [("SlowDown", 503), ("InternalError", 500), ("RequestTimeout", 400)])
def test_throttling_that_lasts_ends_the_job_and_is_no_missing_image(
    serve: Callable[[Answer], list[str]], code: str, status: int
) -> None:
    serve(lambda *_: refused(code, status))
    with pytest.raises(OSError, match=r"6 attempts") as caught:
        ImageSource(("s3://bucket/images",)).read("a.jpg")
    assert not is_absent(caught.value)


@pytest.mark.parametrize(("code", "status"), [("NoSuchKey", 404), ("KeyTooLongError", 400)])
def test_a_key_that_cannot_be_there_is_a_missing_image_at_once(
    serve: Callable[[Answer], list[str]], code: str, status: int
) -> None:
    asked = serve(lambda *_: refused(code, status))
    with pytest.raises(MissingImageError):
        ImageSource(("s3://bucket/images",)).read("a.jpg")
    assert len(asked) == 1


@pytest.mark.parametrize(
    "ask",
    [
        lambda storage: storage.read("a"),
        lambda storage: storage.read_range("a", 0, 1),
        lambda storage: storage.size("a"),
        lambda storage: storage.open("a").read(1),
        lambda storage: storage.list(),
        lambda storage: storage.first(1),
        lambda storage: storage.publish_bytes("a", b"1"),
        lambda storage: storage.replace("a", b"1"),
        lambda storage: storage.delete("a"),
    ],
    ids=["read", "range", "size", "open", "list", "first", "publish", "replace", "delete"],
)
@pytest.mark.parametrize("way", ["mute", "drips"])
def test_a_request_that_does_not_end_is_named(
    serve: Callable[[Answer], list[str]], monkeypatch: pytest.MonkeyPatch, ask: Callable[[Storage], object], way: str
) -> None:
    ends = threading.Event()

    def drops() -> Iterator[bytes]:
        yield b"<"
        ends.wait()

    def answer(number: int, request: Request) -> Response:
        if way == "mute" or request.method == "HEAD":  # to which an answer has no body
            ends.wait()
        return Response(drops(), headers={"Content-Length": "1000"})

    monkeypatch.setattr(bucket, "ANSWERS_IN", 0.2)
    monkeypatch.setattr(storing, "ATTEMPTS", 2)
    serve(answer)
    try:
        with pytest.raises(
            OSError, match=r"not done within 0\.2 s and .* \(2 attempts\): s3://bucket/images.*; run again"
        ):
            ask(Storage("s3://bucket/images"))
    finally:
        ends.set()


@pytest.mark.parametrize("size", [1000, 17 * 2**20])  # in one request, and in parts side by side
def test_a_download_that_does_not_end_is_named(
    serve: Callable[[Answer], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int
) -> None:
    ends = threading.Event()

    def drops() -> Iterator[bytes]:
        yield b"1"
        ends.wait()

    def answer(number: int, request: Request) -> Response:
        return Response(() if request.method == "HEAD" else drops(), headers={"Content-Length": str(size)})

    monkeypatch.setattr(bucket, "ANSWERS_IN", 0.2)
    monkeypatch.setattr(bucket, "SLOWEST", 2**30)
    monkeypatch.setattr(storing, "ATTEMPTS", 2)
    serve(answer)
    try:
        with pytest.raises(OSError, match=r"not done within 0\.2 s .* \(2 attempts\): s3://bucket/store/a\.tar; run"):
            Storage("s3://bucket/store").download("a.tar", tmp_path / "a.tar")
    finally:
        ends.set()


def test_an_object_above_the_bound_is_refused_by_the_size_that_is_announced(
    serve: Callable[[Answer], list[str]],
) -> None:
    ends = threading.Event()

    def drops() -> Iterator[bytes]:
        yield b"1"
        ends.wait()

    asked = serve(lambda *_: Response(drops(), headers={"Content-Length": str(2**40)}))
    try:
        with pytest.raises(ValueError, match=r"file of 1,099,511,627,776 bytes"):
            ImageSource(("s3://bucket/images",)).read("a.jpg")
    finally:
        ends.set()
    assert len(asked) == 1


def test_an_object_whose_size_is_not_announced_is_read(serve: Callable[[Answer], list[str]]) -> None:
    serve(lambda *_: Response(iter([b"12", b"3"]), headers={"Connection": "close"}))
    assert ImageSource(("s3://bucket/images",)).read("a.jpg") == b"123"


@pytest.mark.parametrize(
    ("offset", "length", "part"), [(1, 2, b"12"), (3, 5, b"3"), (4, 5, b""), (9, 5, b""), (1, 0, b"")]
)
def test_a_part_behind_the_end_is_as_short_on_s3_as_on_a_disk(
    s3: dict[str, str], tmp_path: Path, offset: int, length: int, part: bytes
) -> None:
    for storage in (Storage(tmp_path), Storage("s3://chaos/parts")):
        storage.replace("a", b"0123")
        assert storage.read_range("a", offset, length) == part
        with storage.open("a") as file:
            file.seek(offset)
            assert file.read(length) == part


@pytest.mark.parametrize("kind", ["endpoint", "profile"])
def test_settings_of_s3_that_are_wrong_here_are_no_fault_of_an_image(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv(
        *{"endpoint": ("AWS_ENDPOINT_URL", "not an address"), "profile": ("AWS_PROFILE", "nobody")}[kind]
    )
    with pytest.raises(OSError, match=r"(Invalid endpoint|could not be found).*s3://bucket/images/a\.jpg"):
        ImageSource(("s3://bucket/images",)).read("a.jpg")


@pytest.mark.parametrize("root", ["s3://", "s3:///images"])
def test_an_address_without_a_bucket_is_refused(root: str) -> None:
    with pytest.raises(ValueError, match=f"'{root}' names no bucket; give s3://bucket/prefix"):
        Storage(root)


def test_an_address_that_cannot_be_is_named_at_once(serve: Callable[[Answer], list[str]]) -> None:
    asked = serve(lambda *_: Response(b"1"))
    with pytest.raises(OSError, match=r"Invalid bucket name.*s3://my bucket/store\.json; correct the address"):
        Storage("s3://my bucket").read("store.json")
    assert asked == []


@pytest.mark.parametrize(
    ("ask", "right"),
    [
        (lambda storage: storage.publish_bytes("a", b"1"), "s3:PutObject"),
        (lambda storage: storage.replace("a", b"1"), "s3:PutObject"),
        (lambda storage: storage.delete("a"), "s3:DeleteObject"),
        (lambda storage: storage.list(), "s3:ListBucket"),
    ],
)
def test_a_403_names_the_right_that_is_missing(
    serve: Callable[[Answer], list[str]], ask: Callable[[Storage], object], right: str
) -> None:
    serve(lambda *_: refused("AccessDenied", 403, "Access Denied"))
    with pytest.raises(PermissionError, match=rf"Access Denied: s3://bucket/store.*; allow {right}$"):
        ask(Storage("s3://bucket/store"))


@pytest.mark.parametrize(("code", "said"), [("AccessDenied", "Allow s3:GetObject"), ("InternalError", "6 attempts")])
def test_an_archive_that_cannot_be_read_just_now_is_not_called_damaged(
    serve: Callable[[Answer], list[str]], code: str, said: str
) -> None:
    def answer(number: int, request: Request) -> Response:
        if request.method == "HEAD":
            return Response(headers={"Content-Length": "1000"})
        return refused(code, 403 if code == "AccessDenied" else 500)

    serve(answer)
    with pytest.raises(OSError, match=said):
        index_zips(("s3://bucket/images.zip",))


def test_missing_credentials_are_named_at_once(
    serve: Callable[[Answer], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve(lambda *_: Response(b"1"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match=r"no S3 credentials for s3://bucket/images/a\.jpg; set AWS_"):
        Storage("s3://bucket/images").read("a.jpg")


def test_too_many_open_files_end_the_job_and_are_no_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(b"1")
    source = ImageSource((str(tmp_path),))
    free = os.dup(0)
    os.close(free)
    pauses: list[float] = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(storing.time, "sleep", pauses.append)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))  # no descriptor is left
    try:
        with pytest.raises(OSError, match=r"Too many open files.*6 attempts"):
            source.read("a.jpg")

        def given_back(seconds: float) -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

        monkeypatch.setattr(storing.time, "sleep", given_back)
        assert source.read("a.jpg") == b"1"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(pauses) == storing.ATTEMPTS - 1


def test_permission_that_is_denied_ends_the_job_and_is_no_bad_image(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below/a.jpg").write_bytes(b"1")
    (tmp_path / "below").chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read everything
    try:
        with pytest.raises(PermissionError):
            ImageSource((str(tmp_path),)).read("below/a.jpg")
    finally:
        os.seteuid(user)
        (tmp_path / "below").chmod(0o755)
