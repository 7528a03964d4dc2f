"""Which arms of an ablation differ: paired differences, and intervals that hold together for all that are compared.

An arm's score depends on two draws: the questions, and the seed that it was trained with. Both are random here, as
readers and cases are where diagnostic methods are compared by several readers each, and the model is the one of that
field: arms x seeds x questions, every arm with every seed and every question.

- Questions: each score is linearised by the delete-one jackknife (Dorfman, Berbaum, Metz 1992), so accuracy, F1 and
  MME's sums are treated alike. Questions about one image are one cluster. Differences are paired by question.
- Seeds: what remains of a score beside its arm's and its seed's mean is the noise of training. A few seeds tell its
  size badly, so it is pooled over the arms: (arms - 1)(seeds - 1) degrees of freedom. Questions make a part of it that
  is known well: the whole is taken to be no less. Arms may differ in noise: a comparison's variance is no less than its
  own seeds show. An arm with several times the others' noise makes errors likelier still; the table shows each seed.
- Variance of a difference (Obuchowski, Rockette 1995; Hillis 2007): 2 MS(arm x seed) / seeds + max(0, covariance
  over questions between two seeds). With one seed there is no first term: the interval holds for that seed only.
- Many comparisons: the 95% quantile of the largest |t| of the family ("max-t": Hothorn, Bretz, Westfall 2008) replaces
  1.96. It is drawn from the model itself, correlations included. The variances are drawn too, from what their degrees
  of freedom leave open (generalized intervals: Weerahandi 1993), so it is as wide as few seeds ask for.
- Arms that answer (nearly) all questions alike leave no variance to estimate, and could still differ on what was not
  asked: no interval is narrower than what n questions without any difference exclude (the "rule of three": Hanley,
  Lippman-Hand 1983), shared out over the family.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.benchmarks.metrics import Scored
from training.release.table import Comparison

Array = NDArray[np.float64]
FEWEST = 20  # clusters: below that no normal approximation holds
DRAWS = 4000
FOUND = 0.8  # how often a difference that `missed` names would have been found


class Scores(NamedTuple):
    """One score of every arm with every seed, made of the same clusters of questions.

    Attributes:
        name: what the table calls it; `category` of its questions, None for all of them.
        values: (arms, seeds).
        parts: {cluster: (arms, seeds)}; the covariance of `values` over questions is their sum of products.
        units: questions.
    """

    name: str
    category: str | None
    values: Array
    parts: Mapping[str, Array]
    units: int


def scores_of(
    name: str, category: str | None, runs: Sequence[Sequence[Scored]], images: Mapping[str, str | None]
) -> Scores:
    """The scores of runs over the units that all of them have.

    Args:
        runs: of each arm, one for each seed.
        images: the image of a unit, by the unit's name: units of one image are one cluster.
    """
    flat = [scored for seeds in runs for scored in seeds]
    shared = [unit for unit in flat[0].units if all(unit in scored.units for scored in flat)]
    same = [Scored(of.what, {unit: of.units[unit] for unit in shared}, of.statistic) for of in flat]
    shape = (len(runs), len(runs[0]))
    columns = [scored.jackknife() for scored in same]
    clusters: dict[str, Array] = defaultdict(lambda: np.zeros(shape))
    for unit in shared:
        clusters[f"{name} {images.get(unit) or unit}"] += np.reshape([column[unit] for column in columns], shape)
    count, units = len(clusters), len(shared)
    # The jackknife corrects for the units that are independent; clusters are fewer.
    scale = math.sqrt(count / (count - 1) * (units - 1) / units) if count > 1 else 1.0
    values = np.reshape([scored.statistic(scored.counts()) for scored in same] if shared else [0.0] * len(flat), shape)
    return Scores(name, category, values, {cluster: scale * part for cluster, part in clusters.items()}, units)


class _Family(NamedTuple):
    """Estimates for K scores and C pairs of arms.

    Attributes:
        differences: (K, C), means over seeds. by_seed: (K, C, S).
        residuals: (K, A, S), what is left of a score beside its arm and its seed.
        over_questions: (K, C), the part of a difference's variance that more seeds do not lessen.
        floor: (K,), the variance of one arm with one seed that questions alone make: `residuals` have no less.
        covariance: (K * C, K * C) of the differences, of that part.
        clusters: (K,)
    """

    differences: Array
    by_seed: Array
    residuals: Array
    over_questions: Array
    floor: Array
    covariance: Array
    clusters: NDArray[np.int64]


def compare(
    scores: Sequence[Scores], pairs: Sequence[tuple[int, int]], arms: Sequence[str], draws: int = DRAWS, seed: int = 0
) -> list[Comparison]:
    """Every pair of arms on every score: one family, whose intervals hold together at 95%.

    Args:
        pairs: numbers of two arms; the difference is the first one's score minus the second one's.
        arms: names by number.
        draws: of the largest |t|.
        seed: of these draws.
    """
    told = [each for each in scores if len(each.parts) >= FEWEST]
    few = [each for each in scores if len(each.parts) < FEWEST]
    family = _estimate(told, pairs) if told and pairs else None
    found = []
    if family is not None:
        half, missed, from_seeds = _simultaneous(family, pairs, draws, seed)
        least, least_missed = _least(family.clusters, len(told) * len(pairs))
        half, missed = np.maximum(half, least[:, None]), np.maximum(missed, least_missed[:, None])
        for k, each in enumerate(told):
            for c, (one, other) in enumerate(pairs):
                middle = float(family.differences[k, c])
                found.append(
                    Comparison(
                        score=each.name,
                        category=each.category,
                        arms=(arms[one], arms[other]),
                        difference=middle,
                        by_seed=tuple(map(float, family.by_seed[k, c])),
                        interval=(middle - float(half[k, c]), middle + float(half[k, c])),
                        missed=float(missed[k, c]),
                        from_seeds=float(from_seeds[k, c]),
                        units=each.units,
                        clusters=len(each.parts),
                    )
                )
    found += [_too_few(each, arms[one], arms[other], one, other) for each in few for one, other in pairs if each.units]
    return found


def _too_few(scores: Scores, one: str, other: str, i: int, j: int) -> Comparison:
    """A difference of which nothing more can be said."""
    by_seed = scores.values[i] - scores.values[j]
    return Comparison(
        score=scores.name,
        category=scores.category,
        arms=(one, other),
        difference=float(by_seed.mean()),
        by_seed=tuple(map(float, by_seed)),
        units=scores.units,
        clusters=len(scores.parts),
    )


def _estimate(scores: Sequence[Scores], pairs: Sequence[tuple[int, int]]) -> _Family:
    """Differences, and what their variances are made of."""
    ones, others = (list(side) for side in zip(*pairs, strict=True))
    values = np.stack([each.values for each in scores])  # (K, A, S)
    seeds = values.shape[2]
    row = {name: n for n, name in enumerate(dict.fromkeys(name for each in scores for name in each.parts))}
    means = np.zeros((len(row), len(scores), len(pairs)))  # of each cluster's part in the differences, over seeds
    over_questions, once = np.zeros((2, len(scores), len(pairs)))
    for k, each in enumerate(scores):
        parts = np.stack(list(each.parts.values()))  # (clusters, A, S)
        apart = parts[:, ones] - parts[:, others]  # (clusters, C, S)
        mean = apart.mean(-1)
        means[[row[name] for name in each.parts], k] = mean
        whole, single = (mean**2).sum(0), (apart**2).sum(0).mean(-1)  # variances: of the mean, of one seed
        # The covariance between two seeds, from the variance of their mean.
        over_questions[k] = np.maximum(0.0, (seeds * whole - single) / (seeds - 1)) if seeds > 1 else whole
        once[k] = np.maximum(0.0, single - over_questions[k]) / 2  # of the two arms of a difference
    flat = means.reshape(len(row), -1)
    covariance = flat.T @ flat
    old, new = np.diag(covariance), over_questions.reshape(-1)
    scale = np.sqrt(np.divide(new, old, out=np.zeros_like(new), where=old > 0))
    by_arm, by_seed = values.mean(2, keepdims=True), values.mean(1, keepdims=True)
    apart = values[:, ones] - values[:, others]
    return _Family(
        differences=apart.mean(-1),
        by_seed=apart,
        residuals=values - by_arm - by_seed + values.mean((1, 2), keepdims=True),
        over_questions=over_questions,
        floor=once.mean(1),
        covariance=covariance * np.outer(scale, scale),
        clusters=np.array([len(each.parts) for each in scores]),
    )


def _simultaneous(family: _Family, pairs: Sequence[tuple[int, int]], draws: int, seed: int) -> tuple[Array, ...]:
    """Half widths of the intervals, the differences that would have been found with 80% power, and shares of seeds.

    Each is (K, C).
    """
    ones, others = (list(side) for side in zip(*pairs, strict=True))
    scores, arms, seeds = family.residuals.shape
    rng: Any = np.random.default_rng(seed)
    shape = (draws, scores, len(pairs))
    # Over questions: what a chi-square says of a variance from so many clusters makes normal draws those of a t.
    errors = rng.multivariate_normal(np.zeros(len(family.covariance)), family.covariance, draws, method="eigh")
    errors = errors.reshape(shape) / np.sqrt(_chi_square(rng, family.clusters - 1, draws))[:, :, None]
    variance = family.over_questions
    if freedom := (arms - 1) * (seeds - 1):
        residuals = family.residuals.reshape(scores, -1)
        square = (residuals**2).sum(1) / freedom  # (K,), the noise of one arm with one seed
        # Its size in each draw: what the residuals leave open, but no less than questions alone make it.
        size = np.maximum(square / _chi_square(rng, np.full(scores, freedom), draws), family.floor)
        noise = rng.multivariate_normal(np.zeros(scores), _correlation(residuals), (draws, arms, seeds), method="eigh")
        apart = (noise[:, ones] - noise[:, others]).mean(2).transpose(0, 2, 1)  # (draws, K, C)
        errors = errors + np.sqrt(size)[:, :, None] * apart
        variance = variance + 2 / seeds * np.maximum(square, family.floor)[:, None]
    deviation = np.broadcast_to(np.sqrt(variance), shape)
    largest = np.divide(np.abs(errors), deviation, out=np.zeros(shape), where=deviation > 0).max((1, 2))
    if seeds > 1:  # no less than the comparison's own seeds show: the noise of two arms may be more than that of all
        variance = np.maximum(variance, family.over_questions + family.by_seed.var(-1, ddof=1) / seeds)
    half = float(np.quantile(largest, 0.95)) * np.sqrt(variance)
    by_questions = family.over_questions + 2 / seeds * family.floor[:, None] * (seeds > 1)
    share = np.divide(variance - by_questions, variance, out=np.zeros_like(variance), where=variance > 0)
    return half, half + np.quantile(errors, FOUND, axis=0), np.maximum(share, 0.0)


def _least(clusters: NDArray[np.int64], family: int) -> tuple[Array, Array]:
    """What so many clusters, all answered alike by two arms, leave open, in points; and what they would have found.

    Each is (K,), by the number of clusters of each score; `family` comparisons hold together.
    """
    least = 1 - (0.05 / family) ** (1 / clusters)
    found = least + statistics.NormalDist().inv_cdf(FOUND) * np.sqrt(least * (1 - least) / clusters)
    return 100 * least, 100 * found


def _chi_square(rng: Any, freedom: NDArray[np.int64], draws: int) -> Array:
    """(draws, K): each by its degrees of freedom."""
    drawn: Array = rng.chisquare(freedom, (draws, len(freedom))) / freedom
    return drawn


def _correlation(residuals: Array) -> Array:
    """(K, K), of rows (K, n); a row of zeros is correlated with nothing."""
    length = np.sqrt((residuals**2).sum(1))
    row = np.divide(residuals, length[:, None], out=np.zeros_like(residuals), where=length[:, None] > 0)
    correlation: Array = row @ row.T
    np.fill_diagonal(correlation, 1.0)
    return correlation
