"""Every LLaVA source becomes one record per image with all its conversations, in an order that never changes."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset import read_dataset
from pipeline.images import index_zips

Write = Callable[..., str]


def record(name: str | None, answer: str = "a cat", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "What is this?\n<image>"}, {"from": "gpt", "value": answer}]
    return {"id": answer, "conversations": turns, **({} if name is None else {"image": name}), **more}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(records, name): a JSON file of them, as a string."""

    def of(records: object, name: str = "data.json") -> str:
        (tmp_path / name).write_text(records if isinstance(records, str) else json.dumps(records))
        return str(tmp_path / name)

    return of


def images(dataset: Any) -> list[str | None]:
    return [record.image for record in dataset.records]


def test_conversations_of_one_image_are_one_record_across_files(write: Write) -> None:
    one = write([record("a.jpg", "one"), record("b.jpg", "two")], "one.json")
    two = write([record("a.jpg", "three"), record("./a.jpg", "four"), record("a.jpg", "one")], "two.json")
    dataset = read_dataset((one, two), seed=0, limit=None)
    assert sorted(images(dataset), key=str) == ["a.jpg", "b.jpg"]
    answers = {r.image: [c["turns"][1]["value"] for c in r.conversations] for r in dataset.records}
    assert answers == {"a.jpg": ["one", "three", "four"], "b.jpg": ["two"]}
    assert (dataset.conversations, dataset.merged, dataset.duplicates) == (4, 2, 1)


def test_text_only_records_are_kept_each_by_itself(write: Write) -> None:
    dataset = read_dataset((write([record(None, "x"), record("a.jpg"), record(None, "y")]),), seed=0, limit=None)
    assert sorted(images(dataset), key=str) == [None, None, "a.jpg"]


def test_json_lines_give_what_json_gives(write: Write) -> None:
    records = [record(f"{i}.jpg", f"answer\u2028{i}\x85") for i in range(20)]  # no ends of lines, to JSON
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n"
    as_list = read_dataset((write(records),), seed=3, limit=None)
    as_lines = read_dataset((write("\ufeff" + lines, "data.jsonl"),), seed=3, limit=None)
    assert as_list.digest == as_lines.digest
    assert as_list.records == as_lines.records


def test_the_order_depends_on_the_seed_alone_and_never_changes(write: Write) -> None:
    data = write([record(f"{i}.jpg", f"answer {i}") for i in range(10)])
    order = images(read_dataset((data,), seed=0, limit=None))
    assert order == [f"{i}.jpg" for i in (7, 4, 3, 9, 0, 5, 1, 2, 8, 6)]
    assert images(read_dataset((data,), seed=1, limit=None)) != order
    assert images(read_dataset((data,), seed=0, limit=4)) == order[:4]


def test_the_digest_is_that_of_the_records_not_of_seed_or_limit(write: Write) -> None:
    records = [record(f"{i}.jpg", f"answer {i}") for i in range(10)]
    digest = read_dataset((write(records),), seed=0, limit=None).digest
    assert read_dataset((write(records, "same.json"),), seed=5, limit=3).digest == digest
    changed = write([*records[:-1], record("9.jpg", "another answer")], "changed.json")
    assert read_dataset((changed,), seed=0, limit=None).digest != digest


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record("../../etc/passwd"), "leaves the image folder"),
        (record("/etc/passwd"), "leaves the image folder"),
        (record("s3://other/image.jpg"), "leaves the image folder"),
        (record("a\\..\\b.jpg"), "backslash, as Windows writes paths; write forward slashes"),
        (record("C:\\images\\b.jpg"), "backslash"),
        (record(7), "image is 7"),  # type: ignore[arg-type]
        ({"image": "a.jpg"}, "no conversations"),
        ({"image": "a.jpg", "conversations": [{"from": "dog", "value": "wau"}]}, "conversations"),
        ({"image": "a.jpg", "conversations": [{"from": "human", "value": None}]}, "conversations"),
        (["not", "a", "mapping"], "a record must be a mapping"),
    ],
)
def test_a_bad_record_is_a_failure_with_its_place_and_reason(write: Write, bad: Any, reason: str) -> None:
    dataset = read_dataset((write([record("good.jpg"), bad]),), seed=0, limit=None)
    assert images(dataset) == ["good.jpg"]
    assert [failure.source for failure in dataset.failures] == ["data.json#1"]
    assert reason in dataset.failures[0].reason


@pytest.mark.parametrize(
    "bad",
    [
        record("a.jpg", "Nice \ud83d"),
        record("\udc00.jpg"),
        {**record("a.jpg"), "id": "\ud83d"},
        record("://" + "n" * 1_000_000),
        {**record("a.jpg"), "conversations": [{"from": "human", "value": ["\ud83d"] * 10_000}]},
    ],
    ids=["text", "name", "id", "long name", "long value"],
)
def test_a_record_with_half_a_character_or_endless_text_is_a_short_failure(write: Write, bad: Any) -> None:
    dataset = read_dataset((write([bad, record("good.jpg")]),), seed=0, limit=None)
    assert images(dataset) == ["good.jpg"]
    assert len(dataset.failures[0].model_dump_json()) < 2_000


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, '{"a":' * 5_000 + "1" + "}" * 5_000, "9" * 5_000])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_record_that_is_too_much_for_the_parser_costs_that_record_only(write: Write, value: str, name: str) -> None:
    sound = [record("a.jpg", 'a [bracket], a \\ and a "quote"'), record("b.jpg")]
    lines = [json.dumps(sound[0]), f'{{"image": "c.jpg", "id": {value}}}', json.dumps(sound[1])]
    text = "\n".join(lines) if name == "data.jsonl" else f"[{','.join(lines)}]"
    dataset = read_dataset((write(text, name),), seed=0, limit=None)
    assert sorted(images(dataset), key=str) == ["a.jpg", "b.jpg"]
    assert [failure.source for failure in dataset.failures] == [f"{name}{':2' if name == 'data.jsonl' else '#1'}"]
    answers = {r.image: r.conversations[0]["turns"][1]["value"] for r in dataset.records}
    assert answers["a.jpg"] == sound[0]["id"]
    with pytest.raises(ValueError, match="its list does not end"):
        read_dataset((write(f"[{lines[1]},", "cut.json"),), seed=0, limit=None)


def test_a_broken_line_costs_that_line_only(write: Write) -> None:
    lines = json.dumps(record("a.jpg")) + "\n{broken\n" + json.dumps(record("b.jpg")) + "\n"
    dataset = read_dataset((write(lines, "data.jsonl"),), seed=0, limit=None)
    assert sorted(images(dataset), key=str) == ["a.jpg", "b.jpg"]
    assert dataset.failures[0].source == "data.jsonl:2"


@pytest.mark.parametrize(("text", "said"), [("[{]", "is not JSON"), ("no JSON at all", "neither a JSON list")])
def test_a_file_that_is_not_llava_data_is_named(write: Write, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.json.*{said}"):
        read_dataset((write(text),), seed=0, limit=None)


@pytest.mark.parametrize(
    ("pack", "said"),
    [
        (gzip.compress, "is not UTF-8 text: .*; unpack it"),
        (lzma.compress, "is not UTF-8 text: .*; unpack it"),
        (lambda data: data.decode().encode("utf-16"), "is not UTF-8 text: .*; save it as UTF-8"),
        (lambda data: b" \n", "is empty; copy it again, or leave it out"),
    ],
)
def test_a_file_of_other_bytes_is_named_with_its_cure(
    write: Write, tmp_path: Path, pack: Callable[[bytes], bytes], said: str
) -> None:
    path = Path(write([record("a.jpg")]))
    path.write_bytes(pack(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"data\.json {said}"):
        read_dataset((str(path),), seed=0, limit=None)


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json does not exist"):
        read_dataset((str(tmp_path / "nowhere.json"),), seed=0, limit=None)


@pytest.mark.slow  # a build; test_images.py reads the sources one by one
def test_a_mix_of_sources_builds_one_store(run: Any, settings: Any, scenes: Path, tmp_path: Path) -> None:
    """Two JSON files, a folder with subfolders, a zip and text-only records, as LLaVA-1.5's mix is."""
    names = [r["image"] for r in json.loads((scenes / "chat.json").read_text())][:12]
    for name in names[:6]:
        (tmp_path / "data/coco").mkdir(parents=True, exist_ok=True)
        shutil.copy(scenes / "images" / name, tmp_path / "data/coco" / name)
    with zipfile.ZipFile(tmp_path / "gqa.zip", "w") as archive:
        for name in names[6:]:
            archive.write(scenes / "images" / name, f"gqa/{name}")
    one = [record(f"coco/{n}", n) for n in names[:6]] + [record(None, "text")]
    two = "".join(json.dumps(record(f"gqa/{n}", n)) + "\n" for n in names[6:])
    (tmp_path / "one.json").write_text(json.dumps(one))
    (tmp_path / "two.jsonl").write_text(two)
    data, roots = f"[{tmp_path}/one.json, {tmp_path}/two.jsonl]", f"[{tmp_path}/data, {tmp_path}/gqa.zip]"
    said = run("pipeline/build_shards.py", *settings(tmp_path / "store", data=data, images=roots))
    assert "done: 13 samples, 0 failures" in said


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_what_may_have_no_end_is_refused_before_it_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "images.zip"
    path.symlink_to("/dev/zero") if kind == "device" else os.mkfifo(path)
    said = f"^{path} is a device, a pipe or a socket, which may have no end; give a file"
    with pytest.raises(ValueError, match=said):
        read_dataset((str(path),), seed=0, limit=None)
    with pytest.raises(ValueError, match=said):
        index_zips((str(path),))


def test_a_pipe_that_the_shell_hands_over_is_read_to_its_end(write: Write) -> None:
    data = write([record("a.jpg"), record("b.jpg")])
    out, into = os.pipe()
    os.write(into, Path(data).read_bytes())
    os.close(into)
    given = read_dataset((f"/dev/fd/{out}",), seed=0, limit=None)  # as bash writes <(command)
    os.close(out)
    assert given == read_dataset((data,), seed=0, limit=None)
