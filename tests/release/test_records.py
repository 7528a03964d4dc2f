"""What a run wrote of itself is read in one place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.release.records import IN_EVERY_LINE, LAST, amend_log, final_loss, read_log


def test_a_line_that_a_killed_process_left_unfinished_is_skipped(tmp_path: Path) -> None:
    lines = [dict.fromkeys(IN_EVERY_LINE, 1.0) | {"step": step, "loss": 1.0 / step} for step in (1, 2)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    assert read_log(tmp_path) == lines


@pytest.mark.parametrize("damaged", ['{"step": 1, "lo', "3", '{"step": 1, "loss": "low"}', "\0\0", ""])
def test_another_line_that_is_damaged_is_named(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "log.jsonl").write_text(f"{damaged}\n{json.dumps(dict.fromkeys(IN_EVERY_LINE, 1.0))}\n")
    with pytest.raises(ValueError, match=r"log.jsonl:1 is damaged .* delete this line"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    ("values", "lacking"),
    [
        ({"heldout_loss": 2.0}, "heldout_accuracy"),
        ({"heldout_loss": None, "heldout_accuracy": 0.5}, "heldout_loss"),
        ({"questions_right": "most"}, "questions_right"),
        ({"loss_store0": [1]}, "loss_store0"),
    ],
)
def test_what_only_some_lines_have_is_whole_and_a_number_too(
    tmp_path: Path, values: dict[str, object], lacking: str
) -> None:
    line = dict.fromkeys(IN_EVERY_LINE, 1.0)
    (tmp_path / "log.jsonl").write_text(f"{json.dumps(line | values)}\n{json.dumps(line)}\n")
    with pytest.raises(ValueError, match=rf"log.jsonl:1 is damaged .* has not the numbers {lacking}\)"):
        read_log(tmp_path)


def test_a_run_that_has_not_begun_has_no_lines(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    with pytest.raises(ValueError, match="let it train first"):
        final_loss([])


def test_the_final_loss_is_the_mean_of_the_last_steps() -> None:
    lines = [{"loss": float(step)} for step in range(100)]
    assert final_loss(lines) == pytest.approx(sum(range(100 - LAST, 100)) / LAST)
    assert final_loss(lines[:2]) == 0.5


def test_values_come_into_the_line_of_their_step_and_nowhere_else(tmp_path: Path) -> None:
    amend_log(tmp_path, 1, {"heldout_loss": 2.0})  # no log, as on a new disk
    assert not (tmp_path / "log.jsonl").exists()
    lines = [dict.fromkeys(IN_EVERY_LINE, 1.0) | {"step": step} for step in (1, 2)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    amend_log(tmp_path, 2, {"questions_right": 0.5})
    amend_log(tmp_path, 3, {"questions_right": 1.0})
    assert read_log(tmp_path) == [lines[0], {**lines[1], "questions_right": 0.5}]
