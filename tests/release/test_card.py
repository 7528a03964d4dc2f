"""The card: what others wrote is text in it, never markup."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.config import TrainConfig
from training.release.card import CardFiles, _scores, _table, escaped, stage_before, trained

HOSTILE = "</td><script>alert(1)</script> ![x](https://evil.example/a.png) `code` a|b\n# Title [link](javascript:x)"


def test_a_text_of_others_is_one_line_without_markup() -> None:
    line = escaped(HOSTILE)
    assert "\n" not in line
    assert "<" not in line
    assert "https://" not in line
    assert not re.search(r"(?<!\\)[\[\]`|]", line)
    assert escaped("openai/clip-vit_large [v1]") == r"openai/clip-vit_large \[v1\]"


def test_settings_scores_and_names_of_others_stay_in_their_cells(
    tmp_path: Path, settings: Callable[..., dict[str, Any]]
) -> None:
    config = settings(tmp_path, 1, {"model.llm": HOSTILE, "project": HOSTILE})
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    scores = tmp_path / "own.scores.json"
    categories = {HOSTILE: {"accuracy": 0.5, "questions": 2}}
    scores.write_text(json.dumps({"accuracy": 0.5, "questions": 2, "categories": categories}))
    card = "\n\n".join([*trained(tmp_path), *_scores([scores])])
    rows = [line for line in card.split("\n") if line.startswith("|")]
    assert sum("alert(1)" in row for row in rows) == 3
    assert "\n# Title" not in card
    for row in rows:
        outside = re.sub(r"(?<!\\)`[^`]*`", "", row)  # markup within code is text
        assert "<script" not in outside
        assert not re.search(r"(?<!\\)\]\(", outside)


def test_a_bar_is_escaped_once() -> None:
    assert _table({"a": "x|y", "b": escaped("x|y")}).endswith("| a | x\\|y |\n| b | x\\|y |")


def test_a_file_that_holds_no_scores_is_named(tmp_path: Path) -> None:
    path = tmp_path / "own.scores.json"
    for text in ("[1]", '{"accuracy": "<b>", "questions": 1}', '{"accuracy": 0.5, "questions": "<b>"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no scores"):
            _scores(CardFiles(scores=(path,)).scores)


@pytest.mark.parametrize(
    ("files", "place"),
    [
        (["run/config.json", "run/connector/connector.json"], "run"),  # the end of a run
        (["run/config.json", "run/connector/config.json"], "run/connector"),  # exported of a checkpoint
        (["run/config.json", "run/model.safetensors"], None),  # a model's own config.json is no run's
    ],
)
def test_the_stage_before_is_the_run_that_the_connector_is_of(
    tmp_path: Path, settings: Callable[..., dict[str, Any]], files: list[str], place: str | None
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    config = settings(tmp_path, 1, {"model.connector_from": str(tmp_path / "run" / "connector")})
    found = stage_before(TrainConfig.model_validate(config))
    assert found == (None if place is None else tmp_path / place)
