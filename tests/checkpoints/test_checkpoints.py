"""Stopped by a scheduler, killed while writing, on an empty disk with a bucket that failed: a run goes on."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

pytestmark = [pytest.mark.slow, pytest.mark.minutes(2)]
BUCKET, COMPLAINT = "checkpoints", "is not uploaded yet"


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, Any]]:
    """`environment` for S3 clients, `open()` starts the server: until then nothing answers at its address."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"

    def open_it() -> Any:
        import boto3

        server.start()
        client = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="some/run/another.txt", Body=b"stays")
        return client

    yield {"environment": environment, "open": open_it}
    server.stop()


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    settings: Callable[..., Any],
    run_jobs: Callable[..., Any],
    bucket: dict[str, Any],
) -> Path:
    """What each test looks at, made by two calls; between them a checkpoint is damaged and a disk lost."""
    folder = tmp_path_factory.mktemp("runs")

    def job(name: str, changes: dict[str, Any] | None = None, ranks: int = 2, **more: Any) -> dict[str, Any]:
        return {
            "config": settings(folder / name, 2, {"checkpoint.interval": "3ba", **(changes or {})}),
            "ranks": ranks,
        } | more

    remote = {"checkpoint.remote": f"s3://{BUCKET}/some/run", "checkpoint.autoresume": False}
    kill = {"signal": signal.SIGKILL, "at": 8}
    late = {**remote, "checkpoint.remote": f"s3://{BUCKET}/late", "steps": 3}
    first = [
        job("whole"),
        job("term", signal=signal.SIGTERM, at=5, rank=1),
        job("usr1", {"parallelism": "zero2"}, signal=signal.SIGUSR1, at=5),
        job("damaged", **kill),
        job("unmarked", {"parallelism": "fsdp"}, **kill),
        job("late", {**late, "checkpoint.remote_patience_s": 0.1}),
        job("bucket", remote, signal=signal.SIGTERM, at=9),
    ]
    # The bucket does not answer until the last run has complained of it.
    ended = threading.Event()
    waiting = threading.Thread(target=_open_when, args=(folder / "bucket" / "output", bucket, ended))
    waiting.start()
    try:
        codes = run_jobs(folder, first, bucket["environment"])
    finally:
        ended.set()
        waiting.join()
    (folder / "codes.json").write_text(json.dumps(codes))
    newest = max((folder / "damaged" / "checkpoints").glob("ba*"))
    with (newest / "composer.pt").open("r+b") as file:
        file.truncate(1000)
    (max((folder / "unmarked" / "checkpoints").glob("ba*")) / "complete.json").unlink()
    shutil.copytree(folder / "usr1", folder / "other-ranks")
    config = json.loads((folder / "other-ranks" / "config.json").read_text())
    (folder / "other-ranks" / "config.json").write_text(json.dumps(config | {"run": str(folder / "other-ranks")}))
    shutil.copytree(folder / "bucket", folder / "before-loss")
    shutil.rmtree(folder / "bucket")
    again = [
        job("term"),
        job("usr1", {"parallelism": "zero2"}),
        job("damaged"),
        job("unmarked", {"parallelism": "fsdp"}),
        job("other-ranks", {"parallelism": "zero2"}, ranks=1),
        job("bucket", {**remote, "checkpoint.autoresume": True}),
        job("late", {**late, "checkpoint.autoresume": True}),
    ]
    codes = run_jobs(folder / "again", again, bucket["environment"])
    (folder / "codes-again.json").write_text(json.dumps(codes))
    return folder


def _open_when(output: Path, bucket: dict[str, Any], ended: threading.Event) -> None:
    while not (output.exists() and COMPLAINT in output.read_text()) and not ended.wait(0.05):
        pass
    bucket["client"] = bucket["open"]()


def losses(log: list[dict[str, float]]) -> dict[float, float]:
    return {line["step"]: line["loss"] for line in log}


def test_a_signal_to_one_rank_saves_and_ends_all_with_128_and_its_number(
    runs: Path, read_log: Callable[..., Any]
) -> None:
    codes = json.loads((runs / "codes.json").read_text())
    assert codes[1] == [128 + signal.SIGTERM] * 2, (runs / "term" / "output").read_text()[-3000:]
    assert codes[2] == [128 + signal.SIGUSR1] * 2, (runs / "usr1" / "output").read_text()[-3000:]
    for name in ("term", "usr1"):
        log = (runs / name / "output").read_text()
        assert "stopped   by signal" in log
        assert losses(read_log(runs / name)).keys() == set(range(1, 21))  # it went on to the end
        # no step was lost: none is printed twice
        steps = [line.split("/")[0] for line in log.splitlines() if line.startswith("step ")]
        assert len(steps) == len(set(steps)) == 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["term", "usr1", "damaged", "unmarked"])
def test_the_rest_of_the_run_is_as_if_nothing_had_happened(runs: Path, read_log: Callable[..., Any], name: str) -> None:
    codes = json.loads((runs / "codes-again.json").read_text())
    assert codes[:4] == [[0, 0]] * 4, (runs / name / "output").read_text()[-3000:]
    assert losses(read_log(runs / name)) == pytest.approx(losses(read_log(runs / "whole")), rel=1e-5)


def test_the_newest_checkpoints_are_kept(runs: Path) -> None:
    for name in ("whole", "term", "damaged", "unmarked"):
        kept = sorted(path.name for path in (runs / name / "checkpoints").iterdir())
        assert kept[-1] == "ba00000020"
        assert len(kept) == 2, name


def test_zero_refuses_another_number_of_ranks(runs: Path) -> None:
    assert json.loads((runs / "codes-again.json").read_text())[4] == [1]
    said = (runs / "other-ranks" / "output").read_text()
    assert "was saved by zero2 on 2 ranks, this run is zero2 on 1" in said
    assert "Traceback" not in said.split("this run is zero2 on 1")[0][-500:]


def test_a_bucket_that_failed_has_the_last_checkpoint_in_the_end_and_an_empty_disk_goes_on_from_it(
    runs: Path, read_log: Callable[..., Any], bucket: dict[str, Any]
) -> None:
    codes = json.loads((runs / "codes.json").read_text()), json.loads((runs / "codes-again.json").read_text())
    assert codes[0][6] == [128 + signal.SIGTERM] * 2, (runs / "before-loss" / "output").read_text()[-3000:]
    assert COMPLAINT in (runs / "before-loss" / "output").read_text()
    assert codes[1][5] == [0, 0], (runs / "bucket" / "output").read_text()[-3000:]
    before, after = losses(read_log(runs / "before-loss")), losses(read_log(runs / "bucket"))
    assert min(after) == max(before) + 1 >= 10  # none of its steps was repeated
    found = bucket["client"].list_objects_v2(Bucket=BUCKET, Prefix="some/run/")["Contents"]
    kept: dict[str, set[str]] = {}
    assert "some/run/another.txt" in {entry["Key"] for entry in found}
    for entry in found:
        folder, _, name = entry["Key"].removeprefix("some/run/").partition("/")
        if name:
            kept.setdefault(folder, set()).add(name)
    whole = sorted(name for name, names in kept.items() if "complete.json" in names)
    assert whole[-1] == max(kept) == "ba00000020", kept
    assert all("composer.pt" in kept[name] for name in whole), kept
    # Two are kept, of others nothing, also not of uploads that were slow, and so were overtaken.
    assert len(whole) <= 2 and whole == sorted(kept), kept


def test_a_run_whose_bucket_failed_at_the_end_brings_it_its_last_checkpoint_with_the_same_command(
    runs: Path, bucket: dict[str, Any]
) -> None:
    codes = json.loads((runs / "codes.json").read_text()), json.loads((runs / "codes-again.json").read_text())
    said = (runs / "late" / "output").read_text()
    assert codes[0][5][0] == 1 and codes[1][6] == [0, 0], said[-3000:]
    assert "did not take the last checkpoint within 0.1 s" in said
    assert said.split("trained   all 3 steps are done")[1].count("done      loss") == 1
    found = bucket["client"].list_objects_v2(Bucket=BUCKET, Prefix="late/")["Contents"]
    assert {"late/ba00000003/composer.pt", "late/ba00000003/complete.json"} == {entry["Key"] for entry in found}
