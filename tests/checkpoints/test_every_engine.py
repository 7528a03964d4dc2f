"""Checkpoints of two ranks of every engine: flipped bits are noticed, hostile pickles refused, here and in a bucket."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from fixtures.hostile import mark_again, poison_metadata, poison_shard, poison_text, poison_torch_file
from training.checkpoints.mark import flaws, read_mark
from training.checkpoints.resume import newest_on_disk
from training.checkpoints.safe import refuse_code

pytestmark = [pytest.mark.slow, pytest.mark.minutes(3)]
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
BUCKET, STEPS = "engines", 6
FILES = {  # in which a pickle of PyTorch lies
    "ddp": ["composer.pt"],
    "fsdp": [".metadata", "values", "tensors"],
    "zero1": ["zero/mp_rank_00_model_states.pt", "zero/zero_pp_rank_1_mp_rank_00_optim_states.pt"],
    "zero2": ["composer.pt", "zero/mp_rank_00_model_states.pt", "zero/zero_pp_rank_1_mp_rank_00_optim_states.pt"],
    "zero3": ["zero/zero_pp_rank_1_mp_rank_00_model_states.pt", "zero/zero_pp_rank_0_mp_rank_00_optim_states.pt"],
}


def poison(checkpoint: Path, engine: str, place: str, command: str) -> None:
    if place.endswith(".pt"):
        poison_torch_file(checkpoint / place, command)
    elif place == ".metadata":
        poison_metadata(next(checkpoint.glob("ep*")), command)
    else:
        poison_shard(next(checkpoint.glob("ep*")), command, values=place == "values")
    mark_again(checkpoint, engine, ranks=2)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, settings: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """job(run, engine, prefix in the bucket): 6 steps of two ranks, a checkpoint after each second one."""
    folder = tmp_path_factory.mktemp("engines")

    def make(name: str, engine: str, prefix: str, **more: Any) -> dict[str, Any]:
        changes = {"parallelism": engine, "steps": STEPS, "checkpoint.interval": "2ba"}
        changes["checkpoint.remote"] = f"s3://{BUCKET}/{prefix}"
        return {"config": settings(folder / name, 1, changes), "ranks": 2} | more

    return make


@pytest.fixture(scope="module")
def runs(
    job: Callable[..., Any], s3: dict[str, str], run_jobs: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folders named for engines, stopped on their way; `whole` was not."""
    boto3.client("s3", endpoint_url=s3["AWS_ENDPOINT_URL"]).create_bucket(Bucket=BUCKET)
    jobs = [job(engine, engine, engine, signal=signal.SIGTERM, at=2) for engine in ENGINES]
    jobs.append(job("whole", "ddp", "whole"))
    codes = run_jobs(tmp_path_factory.mktemp("first"), jobs)
    for each, code in zip(jobs, codes, strict=True):
        expected = [128 + signal.SIGTERM] * 2 if "signal" in each else [0, 0]
        assert code == expected, Path(each["config"]["run"], "output").read_text()[-3000:]
    return Path(jobs[0]["config"]["run"]).parent


def newest(run: Path) -> Path:
    found = newest_on_disk(run / "checkpoints")
    assert found is not None
    return found[0]


def copied(checkpoint: Path, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint, folder / checkpoint.name))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_flipped_bit_is_noticed(runs: Path, engine: str, tmp_path: Path) -> None:
    checkpoint = copied(newest(runs / engine), tmp_path)
    mark = read_mark(checkpoint)
    assert mark is not None and not flaws(checkpoint, mark)
    assert not list(checkpoint.rglob("*.py"))  # DeepSpeed's scripts are no data
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    rng = random.Random(0)
    for number in range(20):
        path = files[number % len(files)]
        data = path.read_bytes()
        bit = rng.randrange(8 * len(data))
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        with pytest.raises(OSError, match="no checkpoint in"):
            newest_on_disk(tmp_path)
        path.write_bytes(data)
    assert newest_on_disk(tmp_path) == (checkpoint, mark)


@pytest.mark.parametrize(("engine", "place"), [(engine, place) for engine in ENGINES for place in FILES[engine]])
def test_a_hostile_pickle_is_refused_wherever_it_lies(runs: Path, engine: str, place: str, tmp_path: Path) -> None:
    checkpoint = copied(newest(runs / engine), tmp_path)
    refuse_code(checkpoint, engine)
    poison(checkpoint, engine, place, f"touch {tmp_path / 'ran'}")
    name = place if "." in place else ".metadata"
    with pytest.raises(ValueError, match=rf"{name} is not loaded.*posix\.system"):
        refuse_code(checkpoint, engine)
    assert not (tmp_path / "ran").exists()


def test_runs_refuse_a_bucket_with_code_in_it_and_go_on_after_a_flipped_bit(
    runs: Path,
    job: Callable[..., Any],
    s3: dict[str, str],
    run_jobs: Callable[..., Any],
    read_log: Callable[..., Any],
    tmp_path: Path,
) -> None:
    client = boto3.client("s3", endpoint_url=s3["AWS_ENDPOINT_URL"])
    attacks = [(engine, place) for engine in ("ddp", "fsdp", "zero2") for place in FILES[engine][-2:]]
    jobs = []
    for number, (engine, place) in enumerate(attacks):
        checkpoint = copied(newest(runs / engine), tmp_path / str(number))
        poison(checkpoint, engine, place, f"touch {tmp_path / 'ran'}")
        for path in checkpoint.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), BUCKET, f"hostile-{number}/{path.relative_to(checkpoint.parent)}")
        jobs.append(job(f"hostile-{number}", engine, f"hostile-{number}"))
    poisoned = newest(runs / "ddp")  # once: with other bytes than its mark says it is no sound one any more
    poison_text(poisoned / "composer.pt", f"touch {tmp_path / 'ran'}")
    mark_again(poisoned, "ddp", ranks=2)
    for engine in ENGINES[1:]:
        path = max(path for path in newest(runs / engine).rglob("*") if path.suffix in (".pt", ".distcp"))
        path.write_bytes(path.read_bytes()[:-9] + b"\xff" + path.read_bytes()[-8:])
    jobs += [job(engine, engine, engine) for engine in ENGINES]
    codes = run_jobs(tmp_path / "again", jobs)
    for number, (_, place) in enumerate(attacks):
        said = (runs / f"hostile-{number}" / "output").read_text()
        assert 0 not in codes[number] and 1 in codes[number], said[-3000:]
        assert (place if "." in place else ".metadata") + " is not loaded" in said
        assert "posix.system" in said and "Traceback" not in said
    assert not (tmp_path / "ran").exists()
    usual = {line["step"]: line["loss"] for line in read_log(runs / "whole")}
    for engine, code in zip(ENGINES, codes[len(attacks) :], strict=True):
        said = (runs / engine / "output").read_text()
        assert code == [0, 0], said[-3000:]
        assert engine == "ddp" or "has other bytes than were written" in said
        log = read_log(runs / engine)
        assert [line["step"] for line in log] == list(range(1, STEPS + 1))  # none twice
        assert {line["step"]: line["loss"] for line in log} == pytest.approx(usual, rel=1e-5)
