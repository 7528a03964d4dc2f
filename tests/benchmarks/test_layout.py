"""Official files that are not there, of another layout, or damaged: named when a benchmark is opened."""

import io
import shutil
from pathlib import Path

import pytest
from openpyxl import load_workbook

from fixtures.official_files import opened
from training.benchmarks import BENCHMARKS, open_benchmark


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_files_are_named_with_where_they_are_had(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)needs, in .*\(from (https://|you)") as error:
        open_benchmark(name, tmp_path)
    if name == "pope":
        assert str(error.value).count("coco/coco_pope_") == 3


def test_an_image_outside_the_folder_is_not_read(data: Path) -> None:
    gqa = opened(data, "gqa")
    for name in ("../../../secret.jpg", "/etc/hostname"):
        with pytest.raises(ValueError, match="not a file within"):
            gqa.image(name)


def test_names_and_splits_are_checked(data: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'vizwiz'"):
        open_benchmark("viswiz", data)
    with pytest.raises(ValueError, match=r"no split 'dev'.*val, test-dev, test"):
        open_benchmark("vqav2", data, "dev")


def test_files_of_another_layout_are_named(tmp_path: Path) -> None:
    (tmp_path / "testdev_balanced_questions.json").write_text('{"201": {"imageId": "n1"}}')
    with pytest.raises(ValueError, match=r"files of gqa .* not in the official layout: KeyError 'question'"):
        open_benchmark("gqa", tmp_path)
    (tmp_path / "testdev_balanced_questions.json").write_text("[1")
    with pytest.raises(ValueError, match=r"testdev_balanced_questions.json is not JSON"):
        open_benchmark("gqa", tmp_path)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "said"),
    [
        ("vizwiz", "val.json", '"answer": "', '"said": "', "KeyError 'answer'"),
        ("textvqa", "TextVQA_0.5.1_val.json", '"nokia", ', "7.5, ", "people answered '7.5' to question 'What brand"),
        ("textvqa", "TextVQA_0.5.1_val.json", "34603", "34602", "question 2 has the id '34602' of an earlier one"),
        (
            "vqav2",
            "v2_OpenEnded_mscoco_val2014_questions.json",
            '"image_id": ',
            '"image_id": "x", "x": ',
            "invalid lit",
        ),
        ("pope", "coco/coco_pope_random.json", '"image": "', '"image": 5, "x": "', "question 1 has the image '5'"),
        ("pope", "coco/coco_pope_random.json", "a dog1", "a \\ud800", "surrogates not allowed"),
        ("scienceqa", "problems.json", '"answer": 1', '"answer": 2', "problem 4 has 2 choices, and the answer 2"),
        ("scienceqa", "problems.json", '"answer": 1', '"answer": "B"', "problem 4 has 2 choices, and the answer 'B'"),
    ],
)
def test_what_cannot_be_asked_or_scored_is_named_when_the_files_are_opened(
    data: Path, tmp_path: Path, name: str, file: str, old: str, new: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data / name, tmp_path / name)
    (path,) = (tmp_path / name).rglob(file)
    change(path, old, new)
    monkeypatch.chdir(tmp_path / name)
    for folder in (tmp_path, Path()):  # "." stands in most messages
        with pytest.raises(
            ValueError, match=f"^the files of {name} .* in {tmp_path}.* not in the official layout: .*{said}"
        ):
            open_benchmark(name, folder)


def test_a_table_with_control_characters_makes_the_servers_spreadsheet(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "mmbench", tmp_path / "mmbench")
    change(tmp_path / "mmbench" / "mmbench_dev_20230712.tsv", "comment", "com\x01ment\x02s")
    bench = open_benchmark("mmbench", tmp_path)
    _, made = bench.server_file({})  # type: ignore[misc]
    assert "comments" in [cell.value for cell in load_workbook(io.BytesIO(made)).active[1]]
