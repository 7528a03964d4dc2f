"""Which checkpoint is the best, which are kept for it, and when a run has waited long enough for a better one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.checkpoints.history import HISTORY, History, Measured

NAN = float("nan")


def history(*losses: float) -> History:
    found = History("these")
    found.measured = [Measured(step, loss, 0.5) for step, loss in enumerate(losses, 1)]
    return found


@pytest.mark.parametrize(
    ("losses", "best"),
    [([3, 2, 1], 3), ([1, 2, 3], 1), ([2, 1, 1], 2), ([NAN, 2, float("inf"), 1, NAN], 4), ([NAN], None), ([], None)],
)
def test_the_best_is_the_lowest_that_is_a_number_the_earlier_of_equals(losses: list[float], best: int | None) -> None:
    found = history(*losses).best
    assert (None if found is None else found.step) == best


@pytest.mark.parametrize(
    ("losses", "over"),
    [
        ([3, 2, 1], False),
        ([3, 2, 2], False),
        ([3, 2, 2, 4], True),
        ([NAN, NAN], True),
        ([3, NAN, NAN], True),
        ([], False),
    ],
)
def test_a_run_is_over_after_so_many_evaluations_without_a_lower_loss(losses: list[float], over: bool) -> None:
    assert history(*losses).over(2) is over
    assert not history(*losses).over(None)


@pytest.mark.parametrize(
    ("whole", "kept"),
    [
        ([], {1, 3, 4}),  # none is saved yet: each may be on its way
        ([1], {1, 3, 4}),
        ([1, 3], {3, 4}),
        ([1, 3, 4, 5], {4}),  # 5 is newer, and not better
        ([1, 4], {4}),
    ],
)
def test_the_best_of_before_stays_until_the_best_of_now_is_whole(whole: list[int], kept: set[int]) -> None:
    names = [f"ba{step:08d}" for step in whole]
    assert history(3, 4, 2, 1, 5).kept(names) == {f"ba{step:08d}" for step in kept}


def test_it_is_taken_up_from_a_checkpoint_and_not_from_one_of_other_examples(tmp_path: Path) -> None:
    history(3.0, 2.0, NAN).write(tmp_path)
    for examples in ("these", ""):
        found = History(examples)
        assert found.take_up(tmp_path)
        assert repr(found.measured) == repr(history(3.0, 2.0, NAN).measured)
        assert found.examples == "these"
    other = History("others")
    assert not other.take_up(tmp_path)
    assert (other.examples, other.measured) == ("others", [])
    assert other.take_up(tmp_path / "of a run that measured nothing")


@pytest.mark.parametrize("text", ["", "[]", '{"measured": [[1, 2]], "examples": ""}', json.dumps({"measured": []})])
def test_a_damaged_one_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / HISTORY).write_text(text)
    with pytest.raises(ValueError, match=f"{HISTORY} is damaged .* an older one is taken"):
        History().take_up(tmp_path)
