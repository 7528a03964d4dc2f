"""Programs that know nothing of this project read a store: tar, webdataset, Ray Data. And people, through the page."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from pipeline.manifest import read_manifest, spread
from pipeline.shard import image_member
from pipeline.storage import Storage

INSPECT = "pipeline/inspect_shards.py"
READ_WITH_RAY = """
import json, sys, ray
ray.init(log_to_driver=False)
rows = ray.data.read_webdataset(sys.argv[1], decoder=False).take_all()
print(json.dumps({row["__key__"]: len(row["block02.bf16"]) for row in rows}))
"""


def test_tar_lists_every_member(store: Path) -> None:
    listed = []
    for path in sorted((store / "block02").glob("*.tar")):
        listed += subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True).stdout.split()
    assert listed == [f"{number:09d}.block02.bf16" for number in range(60)]


def test_webdataset_reads_features_and_records(store: Path) -> None:
    shapes = {}
    for sample in wds.WebDataset([str(p) for p in sorted((store / "block04").glob("*.tar"))], shardshuffle=False):
        numbers = np.frombuffer(sample["block04.bf16"], np.uint16)
        shapes[sample["__key__"]] = len(numbers)
    assert shapes == {f"{number:09d}": 16 * 32 for number in range(60)}
    records = wds.WebDataset([str(p) for p in sorted((store / "samples").glob("*.tar"))], shardshuffle=False).decode()
    assert all(sample["json"]["key"] == sample["__key__"] for sample in records)


def test_webdataset_joins_two_columns_by_their_keys(store: Path) -> None:
    urls = [str(store / name / "00000.tar") for name in ("samples", "block02")]
    first, second = (list(wds.WebDataset([url], shardshuffle=False)) for url in urls)
    assert [sample["__key__"] for sample in first] == [sample["__key__"] for sample in second]


def test_ray_data_reads_the_tars(store: Path, ray_address: str, run: Any) -> None:
    output = run("-c", READ_WITH_RAY, str(store / "block02"))
    rows = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert rows == {f"{number:09d}": 16 * 32 * 2 for number in range(60)}


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.JPG", "jpg"), ("a.webp", "webp"), ("a", "a"), ("a.json", "img"), ("a.b c", "img"), ("a." + "x" * 300, "img")],
)
def test_a_stored_image_s_member_ends_as_its_file_where_a_tar_can_hold_that(name: str, suffix: str) -> None:
    assert image_member("000000007", name) == f"000000007.{suffix}"


@pytest.mark.slow  # a build
def test_source_images_can_be_kept_and_are_read_with_the_record(
    run: Any, call: Any, settings: Any, scenes: Path, tmp_path: Path
) -> None:
    run("pipeline/build_shards.py", *settings(tmp_path / "store", limit=5, store_images=True))
    path = tmp_path / "store/samples/00000.tar"
    samples = list(wds.WebDataset([str(path)], shardshuffle=False))
    assert len(samples) == 5
    for sample in samples:
        name = json.loads(sample["json"])["image"]
        assert sample["jpg"] == (scenes / "images" / name).read_bytes()
    call(INSPECT, str(tmp_path / "store"), "--html", str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 5


def test_the_page_shows_samples_heat_maps_and_failures(
    run: Any, call: Any, settings: Any, scenes: Path, own_data: Any, tmp_path: Path
) -> None:
    records = json.loads((scenes / "chat.json").read_text())[:4]
    records[0]["conversations"][1]["value"] = "<script>alert(1)</script> & more"
    missing = {**records[1], "id": "gone", "image": "missing.jpg"}
    text = {"id": "text", "conversations": records[2]["conversations"]}
    data = own_data([*records, missing, text])
    run("pipeline/build_shards.py", *settings(tmp_path / "store", data=data))
    call(INSPECT, str(tmp_path / "store"), "--html", str(tmp_path / "page.html"), "--images", str(scenes / "images"))
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png") == 4 * 2
    assert page.count("data:image/jpeg") == 4
    assert "missing image" in page
    assert "text only" in page
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert not re.search(r'(src|href)="https?:', page), "the page needs nothing beside itself"


def test_a_store_that_is_not_complete_says_what_to_do(store: Path, call: Any, tmp_path: Path) -> None:
    (tmp_path / "store.json").write_bytes((store / "store.json").read_bytes())
    output = call(INSPECT, str(tmp_path), "--html", str(tmp_path / "page.html"), fails=True)
    assert "build_shards.py again" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("more", "said"),
    [(["--html", "{}/no/folder/page.html"], "error: [Errno 2]"), (["--html", "{}", "--samples", "-1"], "is -1; give")],
)
def test_a_page_that_cannot_be_made_is_named(
    store: Path, call: Any, tmp_path: Path, more: list[str], said: str
) -> None:
    assert said in call(INSPECT, str(store), *(word.format(tmp_path) for word in more), fails=True)


def test_a_page_without_samples_is_made(store: Path, call: Any, tmp_path: Path) -> None:
    call(INSPECT, str(store), "--html", str(tmp_path / "page.html"), "--samples", "0")
    page = (tmp_path / "page.html").read_text()
    assert "block02" in page and "data:image/png" not in page


def test_rows_to_look_at_are_spread_over_the_manifest(store: Path) -> None:
    table = read_manifest(Storage(store))
    rows = table.to_pylist()
    assert spread(table, 3) == [rows[0], rows[len(rows) // 3], rows[2 * (len(rows) // 3)]]
    assert spread(table, 10**6) == rows
    assert spread(table, 0) == spread(table.slice(0, 0), 4) == []


@pytest.mark.parametrize("column", ["block02", "block04"])
def test_the_manifest_points_at_every_payload(store: Path, column: str) -> None:
    storage = Storage(store)
    for row in read_manifest(storage).to_pylist()[::7]:
        data = storage.read_range(f"{column}/{row['shard']:05d}.tar", row[f"{column}.offset"] - 512, 512)
        assert data[:100].rstrip(b"\0").decode() == f"{row['key']}.{column}.bf16"
