"""Which arms differ: intervals that hold together over questions and seeds, and what they would have missed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ConfigError, load_config
from training.benchmarks.metrics import Scored, bootstrap, mean_f1, mme_total
from training.release.table import Comparison
from training.sweep.comparisons import Scores, compare, scores_of
from training.sweep.plan import AblationConfig

TABLE3 = Path(__file__).resolve().parents[2] / "training" / "ablations" / "table3.yaml"
ARMS = ("A", "B", "C", "D", "E", "F")


def hits(values: np.ndarray) -> Scored:
    """Right and wrong answers, one question each."""
    return Scored("", {str(n): ("", float(value)) for n, value in enumerate(values)})


def simulated(rng: np.random.Generator, arms: int, seeds: int, noise: float, better: float = 0.0) -> list[Scores]:
    """All questions and two categories of them, answered by equally good arms; the second is better by `better`.

    A question is harder for some arms than for others, a seed is luckier on some questions, and `noise` of training
    moves all answers of an arm with a seed.
    """
    shape, questions = (arms, seeds), 240
    ease = rng.random(questions) + rng.normal(0, 0.1, (arms, 1, questions)) + rng.normal(0, noise, (*shape, 1))
    ease += better * (np.arange(arms) == 1)[:, None, None]
    right = 100.0 * (ease + rng.normal(0, 0.2, (*shape, questions)) > 0.5)
    found = []
    for name, chosen in (("all", slice(None)), ("even", slice(0, None, 2)), ("odd", slice(1, None, 2))):
        part = right[:, :, chosen]
        count = part.shape[2]
        apart = (part - part.mean(2, keepdims=True)) / (count * (count - 1)) ** 0.5
        clusters = {str(n): apart[:, :, i] for i, n in enumerate(range(questions)[chosen])}
        found.append(Scores(name, None, part.mean(2), clusters, count))
    return found


def pairs_of(arms: int) -> list[tuple[int, int]]:
    return [(n, 0) for n in range(1, arms)] + [(2, 1)] * (arms > 2)


@pytest.mark.parametrize(
    ("arms", "seeds", "noise"), [(6, 3, 0.0), (6, 3, 0.1), (4, 2, 0.03), (2, 3, 0.1), (2, 2, 0.02), (3, 1, 0.0)]
)
def test_of_equally_good_arms_at_most_one_table_in_twenty_tells_any_two_apart(
    arms: int, seeds: int, noise: float
) -> None:
    rng, tables = np.random.default_rng(arms), 300
    wrong = 0
    for number in range(tables):
        found = compare(simulated(rng, arms, seeds, noise), pairs_of(arms), ARMS, draws=500, seed=number)
        wrong += any(each.told_apart for each in found)
    assert wrong / tables <= 0.05 + 2.6 * (0.05 * 0.95 / tables) ** 0.5  # 99% of 300 draws at 5% are below


@pytest.mark.parametrize(("arms", "seeds", "noise"), [(6, 3, 0.05), (3, 1, 0.0)])
def test_a_difference_that_is_said_to_be_found_is_found_in_four_tables_of_five(
    arms: int, seeds: int, noise: float
) -> None:
    rng, tables = np.random.default_rng(5), 200

    def first(better: float, number: int) -> Comparison:
        scores = simulated(rng, arms, seeds, noise, better)[:1]
        return compare(scores, pairs_of(arms), ARMS, draws=500, seed=number)[0]

    missed = np.mean([first(0.0, number).missed for number in range(tables)])
    # `better` moves a probability by itself, as ease is spread evenly: points are 100 times as many.
    found = [first(float(missed) / 100, number) for number in range(tables)]
    moved = np.mean([each.difference for each in found])
    assert moved == pytest.approx(missed, rel=0.1)
    assert 0.7 <= np.mean([each.told_apart for each in found]) <= 0.9


def test_one_seed_that_differs_from_the_others_is_no_finding_however_many_questions_there_are() -> None:
    rng = np.random.default_rng(0)
    good, bad = rng.random(2000) < 0.8, rng.random(2000) < 0.5
    runs = [[hits(good), hits(good), hits(bad)], [hits(good)] * 3]
    (both,) = compare([scores_of("accuracy", None, runs, {})], [(0, 1)], ARMS)
    assert both.by_seed[:2] == (0.0, 0.0)
    assert both.difference == pytest.approx(both.by_seed[2] / 3)
    assert not both.told_apart
    assert both.from_seeds > 0.95
    (alone,) = compare([scores_of("accuracy", None, [[hits(bad)], [hits(good)]], {})], [(0, 1)], ARMS)
    assert alone.told_apart
    assert alone.from_seeds == 0


def test_questions_about_one_image_tell_no_more_than_one_question() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.random(60) < 0.5, rng.random(60) < 0.5
    single = scores_of("accuracy", None, [[hits(one)], [hits(other)]], {})
    five = [[hits(np.repeat(one, 5))], [hits(np.repeat(other, 5))]]
    images = {str(n): f"{n // 5}.png" for n in range(300)}
    (expected,), (found,), (blind,) = (
        compare([scores], [(0, 1)], ARMS)
        for scores in (single, scores_of("accuracy", None, five, images), scores_of("accuracy", None, five, {}))
    )
    assert (found.units, found.clusters, expected.clusters) == (300, 60, 60)
    assert found.interval == pytest.approx(expected.interval)
    assert blind.interval[1] - blind.interval[0] < 0.5 * (found.interval[1] - found.interval[0])


def test_more_comparisons_make_wider_intervals() -> None:
    scores = simulated(np.random.default_rng(0), 6, 3, 0.02)[:1]
    widths = []
    for pairs in ([(1, 0)], pairs_of(6)):
        low, high = compare(scores, pairs, ARMS)[0].interval or (0.0, 0.0)
        widths.append(high - low)
    assert 1.1 < widths[1] / widths[0] < 2.0


@pytest.mark.parametrize("few", [0, 1])
def test_answers_all_alike_leave_open_what_was_not_asked(few: int) -> None:
    """The rule of three: none of 150 questions tells two arms apart, so a difference of 3 in 150 may still be there."""
    values = np.ones(150)
    values[:few] = 0
    runs = [[hits(values)] * 3, [hits(np.ones(150))] * 3]
    (one,) = compare([scores_of("all", None, runs, {})], [(1, 0)], ARMS)
    assert one.difference == pytest.approx(100 * few / 150)
    assert one.interval is not None and one.missed is not None
    assert one.interval[1] - one.difference == pytest.approx(100 * 3 / 150, rel=0.02)
    assert one.missed > one.interval[1] - one.difference and not one.told_apart


def test_what_is_told_in_words() -> None:
    found = {"score": "accuracy", "arms": ("A", "B"), "by_seed": (3.0,), "units": 90, "clusters": 90}
    told = Comparison(**found, difference=3.0, interval=(1.0, 5.0), missed=2.5)
    assert told.verdict == "A is better by 3.0 [1.0, 5.0]"
    told = Comparison(**found, difference=-3.0, interval=(-5.0, -1.0), missed=2.5)
    assert told.verdict == "B is better by 3.0 [1.0, 5.0]"
    told = Comparison(**found, difference=1.0, interval=(-1.0, 3.0), missed=2.5)
    assert told.verdict.startswith("not told apart: differences beyond [-1.0, +3.0] are excluded")
    assert told.verdict.endswith("one of 2.5 would have been found with 80% power")
    few = [[hits(np.ones(4))], [hits(np.zeros(4))]]
    (told,) = compare([scores_of("accuracy", None, few, {})], [(0, 1)], ARMS)
    assert (told.difference, told.interval) == (100.0, None)
    assert told.verdict == "too few questions: 4 independent ones"
    same = [[hits(np.ones(40))], [hits(np.ones(40))]]
    (told,) = compare([scores_of("accuracy", None, same, {})], [(0, 1)], ARMS)
    assert not told.told_apart
    assert compare([scores_of("accuracy", None, [[hits(np.ones(0))]] * 2, {})], [(0, 1)], ARMS) == []


def _f1(rng: np.random.Generator) -> Scored:
    units = {}
    for n in range(300):
        truth = "yes" if rng.random() < 0.5 else "no"
        said = truth if rng.random() < 0.8 else "yes"
        units[str(n)] = (("random", "popular", "adversarial")[n % 3], (said, truth))
    return Scored("", units, mean_f1)


def _mme(rng: np.random.Generator) -> Scored:
    return Scored("", {str(n): ("ab"[n % 2], (int(rng.integers(0, 3)), 2)) for n in range(200)}, mme_total)


@pytest.mark.parametrize("made", [lambda rng: hits(rng.random(200) < 0.7), _f1, _mme], ids=["accuracy", "f1", "mme"])
def test_every_kind_of_score_has_the_variance_that_resampling_finds(made) -> None:
    scored = made(np.random.default_rng(0))
    deviation = sum(value**2 for value in scored.jackknife().values()) ** 0.5
    low, high = bootstrap(scored.counts(), scored.statistic, seed=0, resamples=2000)
    assert deviation == pytest.approx((high - low) / (2 * 1.96), rel=0.08)


def test_every_arm_is_compared_with_the_first_one_and_those_it_names_each_pair_once() -> None:
    first, second, third = "{name: A}", "{name: B, against: [A, C]}", "{name: C, against: [B]}"
    arms = f"arms=[{first}, {second}, {third}]".replace("name", "connector: {}, name")
    config = load_config(AblationConfig, TABLE3, [arms])
    assert config.pairs() == [(1, 0), (1, 2), (2, 0)]


@pytest.mark.parametrize(("name", "hint"), [("STFF", "did you mean 'STF'"), ("MBTF", "")])
def test_an_arm_is_compared_with_other_arms_only(name: str, hint: str) -> None:
    arms = f"arms=[{{name: STF, connector: {{}}}}, {{name: MBTF, connector: {{}}, against: [{name}]}}]"
    with pytest.raises(ConfigError, match=f"arm 'MBTF', against '{name}': no other arm; .*{hint}"):
        load_config(AblationConfig, TABLE3, [arms])
