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

from pipeline import storage as storing
from pipeline.images import ImageSource, MissingImageError
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
            threading.Thread(target=server.serve_forever).start()
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
