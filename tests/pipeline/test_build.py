"""The build job as a user runs it: what goes in comes out, once, whatever happens on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import webdataset as wds

from pipeline.codec import from_payload
from pipeline.encoder import Encoder
from pipeline.encoders.decode import load_image
from pipeline.manifest import read_manifest, read_store
from pipeline.schema import tar_path
from pipeline.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
BUILD = "pipeline/build_shards.py"
Settings = Callable[..., list[str]]
Run = Callable[..., str]
Contents = Callable[[Path], dict[str, bytes]]


def test_a_store_holds_every_image_once_with_all_its_conversations(
    settings: Settings, run: Run, scenes: Path, tmp_path: Path
) -> None:
    run(BUILD, *settings(tmp_path / "store", data=scenes / "instruct.json"))
    source: dict[str, list[str]] = {}
    for record in json.loads((scenes / "instruct.json").read_text()):
        source.setdefault(record["image"], []).append(json.dumps(record["conversations"]))
    stored: dict[str, list[str]] = {}
    for path in sorted((tmp_path / "store" / "samples").iterdir()):
        for sample in wds.WebDataset(str(path), shardshuffle=False, empty_check=False):
            record = json.loads(sample["json"])
            assert record["image"] not in stored
            stored[record["image"]] = [json.dumps(c["turns"]) for c in record["conversations"]]
    assert stored == source


def test_cached_features_are_those_of_live_clip(store: Path, scenes: Path, clip: Path) -> None:
    storage = Storage(store)
    spec = read_store(storage)
    live = Encoder(str(clip), None, spec.columns, spec.compute)
    rows = read_manifest(storage).to_pylist()
    assert len(rows) == 60
    batch = rows[:8]  # as the job batched them: other batch sizes differ in the last bit
    pixels = [live.pixels(load_image((scenes / "images" / row["image"]).read_bytes()), "pad") for row in batch]
    features = live(torch.stack([torch.from_numpy(p) for p in pixels]))
    for column in spec.columns:
        for row, expected in zip(batch, features[column.name], strict=True):
            name = tar_path(column.name, row["shard"])
            payload = storage.read_range(name, row[f"{column.name}.offset"], row[f"{column.name}.size"])
            got = from_payload(
                torch.frombuffer(bytearray(payload), dtype=torch.uint8)[None], column, "bf16", torch.bfloat16
            )
            assert torch.equal(got[0], expected.bfloat16())


def test_running_again_does_nothing_and_says_so(store: Path, settings: Settings, call: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*.tar")}
    assert "0 to do" in call(BUILD, *settings(store))
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.tar")} == before


@pytest.mark.slow  # a Ray of its own
def test_the_same_settings_give_the_same_bytes_with_one_worker(
    store: Path, settings: Settings, run: Run, contents: Contents, tmp_path: Path
) -> None:
    folder = tmp_path / "longer-than-the-path-of-a-socket-may-be" / ("x" * 60)
    folder.mkdir(parents=True)
    environment = {"RAY_ADDRESS": "", "TMPDIR": str(folder)}  # a local Ray
    run(BUILD, *settings(tmp_path / "store", workers=1, decode_threads=1), env=environment)
    assert contents(tmp_path / "store") == contents(store)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("aspect=square", "aspect: 'pad' there, 'square' now"),
        ("seed=3", "seed: 0 there, 3 now (the samples would come in another order)"),
        ("codec=fp16", "codec: 'bf16' there, 'fp16' now"),
    ],
)
def test_another_build_on_the_same_store_is_refused_by_name(
    store: Path, settings: Settings, call: Run, setting: str, said: str
) -> None:
    output = call(BUILD, *settings(store), setting, fails=True)
    assert f"- {said}\n" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_worker_s_own_reason_ends_the_build(settings: Settings, run: Run, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "block02").touch()  # where a folder should come
    said = run(BUILD, *settings(tmp_path / "store"), fails=True)
    assert f"File exists: '{tmp_path}/store/block02' (worker on " in said.rpartition("error: shard 0: ")[2]
    assert "UDF failed" not in said and "Traceback" not in said


def test_faults_are_recorded_with_a_reason_and_the_job_goes_on(
    scenes: Path, settings: Settings, run: Run, own_data: Callable[..., Path], tmp_path: Path
) -> None:
    good = json.loads((scenes / "chat.json").read_text())[:6]
    data = own_data(
        [
            *good,
            {**good[0], "image": "missing.jpg"},
            {**good[0], "image": "truncated.jpg"},
            {**good[0], "image": "empty.jpg"},
            {**good[0], "image": "../outside.jpg"},
            {"id": "no-conversations", "image": good[0]["image"]},
            {"id": "text", "conversations": good[1]["conversations"]},
        ]
    )
    for record in good:
        shutil.copy(scenes / "images" / record["image"], tmp_path / "images")
    whole = (scenes / "images" / good[0]["image"]).read_bytes()
    (tmp_path / "images" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images" / "empty.jpg").touch()
    run(BUILD, *settings(tmp_path / "store", data=data, images=tmp_path / "images"))
    failures = [json.loads(line) for line in (tmp_path / "store" / "failures.jsonl").read_text().splitlines()]
    reasons = {failure["source"]: failure["reason"] for failure in failures}
    assert reasons["missing.jpg"].startswith("missing image: ")
    assert "truncated" in reasons["truncated.jpg"]
    assert reasons["empty.jpg"] == "empty file"
    assert "leaves the image folder" in reasons["data.json#9"]
    assert reasons["data.json#10"] == "no conversations: found None, expected a list of turns"
    assert len(failures) == 5
    kinds = {failure["source"]: failure["kind"] for failure in failures}
    assert (kinds["missing.jpg"], kinds["empty.jpg"], kinds["data.json#9"]) == ("missing image", "image", "record")
    manifest = read_manifest(Storage(tmp_path / "store"))
    assert len(manifest) == 7
    text = manifest.column("image").to_pylist().index(None)
    assert manifest.column("block02.size").to_pylist()[text] == 0


def test_too_many_failures_stop_the_job(
    scenes: Path, settings: Settings, run: Run, own_data: Callable[..., Path], tmp_path: Path
) -> None:
    good = json.loads((scenes / "chat.json").read_text())[0]
    data = own_data([{**good, "image": f"missing{i}.jpg"} for i in range(20)])
    output = run(BUILD, *settings(tmp_path / "store", data=data, images=tmp_path / "images"), fails=True)
    assert "max_failures" in output
    assert "missing image" in output
    assert "Traceback" not in output
    assert (tmp_path / "store" / "failures.jsonl").read_text().count("missing image") >= 11


def test_too_many_bad_records_bind_no_store_to_the_data_as_they_are(
    scenes: Path, settings: Settings, call: Run, own_data: Callable[..., Path], tmp_path: Path
) -> None:
    good = json.loads((scenes / "chat.json").read_text())[0]
    data = own_data([good, *[{"id": "empty"}] * 11])
    output = call(BUILD, *settings(tmp_path / "store", data=data), fails=True)
    assert "error: 11 records are unusable, 10 are allowed (max_failures); correct them in the data" in output
    assert "data.json#1: no conversations" in output
    assert not (tmp_path / "store").exists()


def test_a_store_without_a_shard_may_be_deleted_where_its_settings_are_corrected(
    store: Path, settings: Settings, call: Run, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    shutil.copy(store / "store.json", tmp_path / "store")
    output = call(BUILD, *settings(tmp_path / "store"), "codec=fp16", fails=True)
    assert "of another build (it has no shard yet: if no other build works on it, delete it); take another" in output


@pytest.mark.parametrize("setting", ["data", "images"])
@pytest.mark.parametrize("value", ["[]", "['']"])
def test_no_path_is_a_mistake_in_the_settings(
    settings: Settings, call: Run, tmp_path: Path, setting: str, value: str
) -> None:
    output = call(BUILD, *settings(tmp_path / "store"), f"{setting}={value}", fails=True)
    assert f"- {setting}: expected a path or several, none of them empty (found {value}" in output


@pytest.mark.slow  # a second build; test_dataset.py reads zips without one
def test_a_zip_is_read_without_unpacking(
    store: Path, scenes: Path, settings: Settings, run: Run, contents: Contents, tmp_path: Path
) -> None:
    shutil.make_archive(str(tmp_path / "images"), "zip", scenes / "images")
    run(BUILD, *settings(tmp_path / "store", images=tmp_path / "images.zip"))
    assert contents(tmp_path / "store") == contents(store)


def test_blocks_are_added_without_touching_what_is_there(
    store: Path, settings: Settings, run: Run, call: Run, contents: Contents, tmp_path: Path
) -> None:
    shutil.copytree(store, tmp_path / "store")
    before = contents(tmp_path / "store")
    run(BUILD, *settings(tmp_path / "store", blocks="[2,3,4]", cls="[4]"))
    after = contents(tmp_path / "store")
    assert {name for name in before if before[name] != after[name]} == {"manifest.parquet"}
    assert {name.partition("/")[0] for name in after.keys() - before.keys()} == {
        "block03",
        "cls04",
        "columns",
        "commits",
    }
    assert "cls04.size" in read_manifest(Storage(tmp_path / "store")).column_names
    assert "0 to do" in call(BUILD, *settings(tmp_path / "store"))


@pytest.mark.parametrize(
    ("option", "value"), [("rate", "0"), ("rate", "nan"), ("step-time", "inf"), ("batch", "-3"), ("price", "-1")]
)
def test_a_plan_by_numbers_that_cannot_be_is_refused(
    settings: Settings, call: Run, tmp_path: Path, option: str, value: str
) -> None:
    output = call(BUILD, *settings(tmp_path / "store"), "--plan", f"--{option}", value, fails=True)
    assert f"--{option} is {value}" in output
    assert "Traceback" not in output


def test_the_plan_writes_nothing(settings: Settings, call: Run, tmp_path: Path) -> None:
    output = call(BUILD, *settings(tmp_path / "store"), "--plan")
    assert "images         60 (not found: 0)" in output
    assert "4 to do" in output
    assert not (tmp_path / "store").exists()


def test_the_plan_shows_names_that_are_asked_for_beside_names_that_are_there(
    settings: Settings, call: Run, scenes: Path, tmp_path: Path
) -> None:
    (tmp_path / "above/images").mkdir(parents=True)
    (tmp_path / "above/images/coco").symlink_to(scenes / "images")
    output = call(BUILD, *settings(tmp_path / "store", images=tmp_path / "above"), "--plan")
    assert "images         60 (not found: 60)" in output
    assert re.search(rf"asked for '\S+\.jpg', .*; {tmp_path}/above holds 'images/coco/\S+\.jpg'", output)


def test_every_mistake_in_the_settings_is_named_at_once(settings: Settings, call: Run, tmp_path: Path) -> None:
    output = call(BUILD, *settings(tmp_path / "store"), "shard_sise=3", "codec=bf15", fails=True)
    assert "did you mean 'shard_size'?" in output
    assert "bf15" in output
    assert "Traceback" not in output


def test_a_block_that_clip_lacks_is_named(settings: Settings, call: Run, tmp_path: Path) -> None:
    output = call(BUILD, *settings(tmp_path / "store", blocks="[2,9]"), fails=True)
    assert "blocks [9]" in output
    assert "4 blocks" in output


def test_a_store_of_another_format_version_is_refused(
    store: Path, settings: Settings, call: Run, tmp_path: Path
) -> None:
    shutil.copytree(store, tmp_path / "store")
    spec = json.loads((store / "store.json").read_text())
    (tmp_path / "store" / "store.json").write_text(json.dumps({**spec, "format_version": 9}))
    output = call(BUILD, *settings(tmp_path / "store"), fails=True)
    assert "format version 9" in output
    assert "Traceback" not in output


def test_help_and_mistakes_are_answered_without_loading_the_heavy_libraries() -> None:
    code = (
        "import sys, runpy; sys.argv = ['build_shards.py', 'shard_sise=1']\n"
        "try: runpy.run_path('pipeline/build_shards.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'composer', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_killed_job_resumed_leaves_the_bytes_of_an_undisturbed_one(
    store: Path, settings: Settings, run: Run, contents: Contents, tmp_path: Path
) -> None:
    target = tmp_path / "store"
    command = [sys.executable, BUILD, *settings(target, batch_size=1)]
    reference = tmp_path / "reference"
    run(BUILD, *settings(reference, batch_size=1))
    job = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while job.poll() is None and not any((target / "commits").glob("*.json")):
            time.sleep(0.02)
    finally:
        with suppress(ProcessLookupError):  # nothing of it runs any more
            os.killpg(job.pid, signal.SIGKILL)  # the driver and its local Ray at once
        job.wait()
    assert any((target / "commits").glob("*.json")), "it ended without a shard"
    run(BUILD, *settings(target, batch_size=1))
    assert contents(target) == contents(reference)
