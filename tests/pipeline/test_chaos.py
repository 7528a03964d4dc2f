"""What a store looks like after everything went wrong: actors, nodes and drivers killed, S3 that fails, frozen workers.

Moments are random, from seeds. Every build here must end with the bytes of one that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest

from fixtures.faulty_s3 import SHARES, FaultyS3
from pipeline.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
BUILD, VERIFY = "pipeline/build_shards.py", "pipeline/verify_shards.py"
IMAGES, SHARD_SIZE = 304, 8
SHARDS = IMAGES // SHARD_SIZE
WORKER = """
import json, os, signal, sys
from pipeline.build_shards import read_sources
from pipeline.config import BuildConfig, load_config
from pipeline.manifest import create_or_check, write_manifest
from pipeline.plan import row_of, shard_records, todo
from pipeline.storage import Storage
from pipeline.worker import ShardWorker

config = load_config(BuildConfig, None, sys.argv[2:])
dataset, spec = read_sources(config)
storage, worker = Storage(config.store), ShardWorker(config, spec)
create_or_check(storage, spec)

def freeze(*arguments, publish=worker.storage.publish, calls=[]):
    calls.append(arguments)
    if str(len(calls)) == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGSTOP)
    return publish(*arguments)

worker.storage.publish = freeze
for item in todo(storage, spec, spec.columns)[: None if sys.argv[1] == "all" else 1]:
    row = row_of(item, shard_records(dataset.records, spec, item.shard), [{}], sys.argv[1], sys.argv[1] == "all")
    print(json.dumps(worker(row)))
if sys.argv[1] == "all":
    write_manifest(storage, dataset.failures)
    storage.sweep_scratch()
"""
pytestmark = [pytest.mark.slow, pytest.mark.minutes(9)]  # of all of pipeline/


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """304 drawn images with captions, and a CLIP that takes some 10 ms for each."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from pipeline.demo_data import draw

    folder = tmp_path_factory.mktemp("chaos")
    draw(folder / "scenes", images=IMAGES, heldout=4, image_size=48)
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 4}
    CLIPVisionModel(CLIPVisionConfig(**shape, image_size=112, patch_size=14)).save_pretrained(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def options(data: Path) -> Callable[..., list[str]]:
    """options(store, key=value, ...): arguments of the build."""

    def of(store: Path | str, **more: object) -> list[str]:
        chosen = {
            "data": data / "scenes/chat.json",
            "images": data / "scenes/images",
            "store": store,
            "encoder": data / "clip",
            "blocks": "[4,12]",
            "compute": "float32",
            "shard_size": SHARD_SIZE,
            "batch_size": 4,
            "workers": 2,
            **more,
        }
        return [f"{name}={value}" for name, value in chosen.items()]

    return of


@pytest.fixture(scope="module")
def undisturbed(data: Path, options: Callable[..., list[str]]) -> Path:
    """The build by one worker in one process, without Ray."""
    return build_here(options(data / "undisturbed"))


@pytest.fixture(scope="module")
def undisturbed_short(data: Path, options: Callable[..., list[str]]) -> Path:
    """As `undisturbed`, of the first three shards."""
    return build_here(options(data / "short", limit=3 * SHARD_SIZE))


def build_here(arguments: list[str]) -> Path:
    """What the job does, one shard after the other."""
    command = [sys.executable, "-c", WORKER, "all", *arguments]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return Path(next(setting for setting in arguments if setting.startswith("store=")).removeprefix("store="))


@pytest.fixture(scope="module")
def faulty_s3(s3: dict[str, str]) -> Iterator[FaultyS3]:
    """The proxy; it does not fail until a test says so."""
    proxy = FaultyS3(s3["AWS_ENDPOINT_URL"], seed=3)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def cluster(new_cluster: Callable[..., Any], s3: dict[str, str], faulty_s3: FaultyS3) -> Iterator[Any]:
    """A head without CPUs and two nodes of one CPU each; S3, for its actors, is the faulty one."""
    own = new_cluster({**s3, "AWS_ENDPOINT_URL": faulty_s3.url})
    try:
        for cpus in (0, 1, 1):
            own.add(cpus)
        yield own
    finally:
        own.close()


STARTED: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def no_job_outlives_its_test() -> Iterator[None]:
    yield
    while STARTED:
        job = STARTED.pop()
        job.kill()
        job.wait()


def start(cluster: Any, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The job, in the background."""
    with log.open("ab") as out:
        environment = {**os.environ, **cluster.environment, "RAY_ADDRESS": cluster.address}
        command = [sys.executable, BUILD, *arguments]
        STARTED.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))
    return STARTED[-1]


def wait_for_files(job: subprocess.Popen[bytes], count: Callable[[], int], wanted: int) -> None:
    while count() < wanted:
        assert job.poll() is None, f"it ended with {count()} files, waiting for {wanted}"
        time.sleep(0.01)


def finish(cluster: Any, arguments: list[str], log: Path) -> str:
    """Run the same command until it ends well, as its messages say."""
    for _ in range(4):
        if start(cluster, arguments, log).wait() == 0:
            return log.read_text()
    raise AssertionError(log.read_text()[-6000:])


def assert_every_image_once(store: Path, data: Path) -> None:
    commits = [json.loads(path.read_text()) for path in sorted((store / "commits").glob("*.json"))]
    stored = sorted(image for commit in commits for image in commit["images"])
    assert stored == sorted(record["image"] for record in json.loads((data / "scenes/chat.json").read_text()))
    assert len(stored) == len(set(stored)) == IMAGES


def copy_from_s3(s3: dict[str, str], prefix: str, target: Path) -> Path:
    """Every object below a prefix of the bucket `chaos`, past the proxy."""
    client = boto3.client("s3", endpoint_url=s3["AWS_ENDPOINT_URL"])
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="chaos", Prefix=f"{prefix}/"):
        for entry in page.get("Contents", []):
            path = target / entry["Key"].removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(client.get_object(Bucket="chaos", Key=entry["Key"])["Body"].read())
    return target


def test_files_pass_whole_through_an_s3_that_fails(
    faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", faulty_s3.url)
    storage, dice = Storage("s3://chaos/files"), random.Random(1)
    faulty_s3.failing = True
    for number in range(24):
        size = 40_000_000 if number == 0 else dice.randrange(100_000)  # the first is read in parts, side by side
        data = dice.randbytes(size)
        (tmp_path / "file").write_bytes(data)
        if not storage.publish(f"{number}.tar", tmp_path / "file"):
            assert faulty_s3.faults["lost answer"] > 0  # it was ours
        assert storage.read(f"{number}.tar") == data
        assert storage.read_range(f"{number}.tar", 10, 50) == data[10:60]
        storage.download(f"{number}.tar", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == data
        assert not storage.publish(f"{number}.tar", tmp_path / "back"), "what is there stays"
    assert len(storage.list()) == 24
    faulty_s3.failing = False
    assert faulty_s3.faults.keys() >= {"500", "503", "truncated", "damaged"}


def test_two_nodes_give_the_bytes_of_one(
    cluster: Any, options: Any, undisturbed: Path, contents: Any, tmp_path: Path
) -> None:
    job = start(cluster, options(tmp_path / "store"), tmp_path / "log")
    nodes: set[int] = set()
    while job.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            nodes |= {actor.ppid() for actor in cluster.actors()}
        time.sleep(0.1)
    assert job.returncode == 0, (tmp_path / "log").read_text()[-4000:]
    assert len(nodes) == 2
    assert contents(tmp_path / "store") == contents(undisturbed)


@pytest.mark.parametrize("seed", [0])
def test_an_actor_a_node_and_the_driver_killed_leave_the_bytes_of_an_undisturbed_build(
    cluster: Any, options: Any, undisturbed: Path, data: Path, contents: Any, run: Any, tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    store, log = tmp_path / "store", tmp_path / "log"
    # A shard is three tars and its commit record. Half of the shards are still to come at the last moment.
    moments = sorted(dice.sample(range(8, 4 * SHARDS // 2), 3))
    job = start(cluster, options(store), log)
    for moment, victim in zip(moments, ("actor", "node", "driver"), strict=True):
        # Only folders that stay are looked into: .scratch comes and goes.
        wait_for_files(job, lambda: len([*store.glob("[!.]*/*.tar"), *store.glob("commits/*.json")]), moment)
        assert job.poll() is None, "the job ended before it was disturbed"
        if victim == "actor":
            dice.choice(cluster.actors()).kill()
        elif victim == "node":
            cluster.kill(dice.choice(cluster.nodes[1:]))
        else:
            job.kill()
            job.wait()
    cluster.add(cpus=1)
    finish(cluster, options(store), log)
    assert_every_image_once(store, data)
    assert contents(store) == contents(undisturbed)
    assert "all right" in run(VERIFY, str(store))


def test_s3_that_fails_and_a_killed_driver_leave_the_bytes_of_an_undisturbed_build(
    cluster: Any,
    faulty_s3: FaultyS3,
    s3: dict[str, str],
    options: Any,
    undisturbed: Path,
    data: Path,
    contents: Any,
    run: Any,
    tmp_path: Path,
) -> None:
    client = boto3.client("s3")
    for path in (data / "scenes").rglob("*.*"):
        client.upload_file(str(path), "chaos", f"source/{path.relative_to(data / 'scenes')}")
    source = {"data": "s3://chaos/source/chat.json", "images": "s3://chaos/source/images"}
    arguments, log = options("s3://chaos/store", **source), tmp_path / "log"

    def commits() -> int:
        return int(client.list_objects_v2(Bucket="chaos", Prefix="store/commits/")["KeyCount"])

    faulty_s3.failing = True
    job = start(cluster, arguments, log)
    wait_for_files(job, commits, random.Random(5).randrange(3, SHARDS // 2))
    job.kill()
    job.wait()
    finish(cluster, arguments, log)
    verified = run(VERIFY, "s3://chaos/store", env={"AWS_ENDPOINT_URL": faulty_s3.url})
    faulty_s3.failing = False
    assert "all right" in verified
    missed = {kind for kind in SHARES if faulty_s3.faults[kind] == 0}
    assert missed <= {"hang"}, faulty_s3.faults
    copy = copy_from_s3(s3, "store", tmp_path / "copy")
    assert_every_image_once(copy, data)
    assert contents(copy) == contents(undisturbed)


@pytest.mark.parametrize(("where", "call"), [("local", 3), ("local", 5), ("s3", 3), ("s3", 5)])
def test_a_worker_frozen_while_it_publishes_changes_nothing_when_it_wakes_after_the_end(
    s3: dict[str, str],
    options: Any,
    undisturbed_short: Path,
    contents: Any,
    tmp_path: Path,
    where: str,
    call: int,
) -> None:
    """It is stopped before the second of its tars (its third file, after a claim), or before the commit record."""
    store = f"s3://chaos/frozen{call}" if where == "s3" else str(tmp_path / "frozen")
    arguments = options(store, limit=3 * SHARD_SIZE, workers=1)
    client = boto3.client("s3", endpoint_url=s3["AWS_ENDPOINT_URL"])

    def there() -> dict[str, object]:
        """Every published file, with what changes when it is written again."""
        if where == "local":
            files = [path for path in (tmp_path / "frozen").glob("[!.]*/*") if path.suffix in (".tar", ".json")]
            return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}
        found = client.list_objects_v2(Bucket="chaos", Prefix=f"frozen{call}/").get("Contents", [])
        return {entry["Key"]: (entry["LastModified"], entry["ETag"]) for entry in found}

    command = [sys.executable, "-c", WORKER, str(call), *arguments]
    worker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    STARTED.append(worker)
    while psutil.Process(worker.pid).status() != psutil.STATUS_STOPPED:
        assert worker.poll() is None
        time.sleep(0.05)
    build_here(arguments)
    before = there()
    worker.send_signal(signal.SIGCONT)
    rest, _ = worker.communicate()
    assert worker.returncode == 0
    assert json.loads(rest)["shard"] == 0
    assert {name: value for name, value in there().items() if name in before} == before
    target = copy_from_s3(s3, f"frozen{call}", tmp_path / "copy") if where == "s3" else tmp_path / "frozen"
    assert contents(target) == contents(undisturbed_short)


def test_two_jobs_at_once_build_one_store_and_share_the_work(
    cluster: Any, options: Any, undisturbed: Path, contents: Any, tmp_path: Path
) -> None:
    store, logs = tmp_path / "store", [tmp_path / "log0", tmp_path / "log1"]
    jobs = [start(cluster, options(store, workers=1), log) for log in logs]
    assert [job.wait() for job in jobs] == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
    assert contents(store) == contents(undisturbed)
    twice = [int(found) for log in logs for found in re.findall(r"(\d+) shard\(s\) were there", log.read_text())]
    assert sum(twice) <= len(jobs)


def end_of(job: subprocess.Popen[bytes], log: Path) -> str:
    """What the job says, once it has failed."""
    assert job.wait() != 0
    return log.read_text().rpartition("error: ")[2]


def test_a_stopped_worker_is_named_and_ended_and_the_build_goes_on(
    cluster: Any, options: Any, undisturbed: Path, contents: Any, tmp_path: Path
) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    job = start(cluster, options(store, hang_s=60), log)
    wait_for_files(job, lambda: len([*store.glob("commits/*.json")]), 2)
    victim = cluster.actors()[0]
    victim.send_signal(signal.SIGSTOP)
    assert job.wait() == 0, log.read_text()[-4000:]
    assert re.search(rf"\(process {victim.pid}\), .*, had not moved for \d+ s and was ended", log.read_text())
    assert contents(store) == contents(undisturbed)


def test_a_read_that_never_ends_is_named_with_its_sample_and_the_same_command_resumes(
    cluster: Any, faulty_s3: FaultyS3, options: Any, undisturbed: Path, data: Path, contents: Any, tmp_path: Path
) -> None:
    client = boto3.client("s3")
    for path in (data / "scenes/images").rglob("*.*"):
        client.upload_file(str(path), "chaos", f"stalled/{path.name}")
    commit = json.loads((undisturbed / "commits" / "00001.json").read_text())
    arguments = options(tmp_path / "store", images="s3://chaos/stalled", hang_s=60)
    faulty_s3.stalled = commit["images"][5]
    said = end_of(start(cluster, arguments, tmp_path / "log"), tmp_path / "log")
    assert f"in shard 1, at sample {commit['keys'][5]}, had not moved for" in said
    assert "this shard has hung 2 times" in said
    faulty_s3.stalled = ""
    finish(cluster, arguments, tmp_path / "log")
    assert contents(tmp_path / "store") == contents(undisturbed)


def test_a_build_whose_control_process_is_killed_says_so(new_cluster: Any, options: Any, tmp_path: Path) -> None:
    own = new_cluster({})
    try:
        node = own.add(cpus=1)
        job = start(own, options(tmp_path / "store", workers=1), tmp_path / "log")
        wait_for_files(job, lambda: len([*(tmp_path / "store").glob("commits/*.json")]), 1)
        next(each for each in own.processes(node) if each.name() == "gcs_server").kill()
        assert "Ray's control process (GCS) at " in end_of(job, tmp_path / "log")
    finally:
        own.close()
