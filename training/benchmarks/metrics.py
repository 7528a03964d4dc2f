"""How the benchmarks score an answer, and how sure a score is. Neither torch nor any image is needed.

Every scorer follows the code that the published scores come from, with its quirks; where that code has a flaw, its
figure and the corrected one are two functions with two names.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NotRequired, TypedDict

# The VQA evaluation's contractions: each is recognised with any one of its apostrophes left out.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}
_NUMBERED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(n) for n, word in enumerate(_NUMBERED)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = 32  # the official code passes re.UNICODE, which is 32, where `re.sub` takes a count
_COMMAS_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")


@lru_cache(maxsize=100_000)  # people give the same answers over and over
def evalai(text: str) -> str:
    """The EvalAI answer normaliser: what LLaVA-1.5 applies to answers for VQAv2, VizWiz and TextVQA."""
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    words = words.replace("\n", " ").replace("\t", " ").strip()
    return _words(_punctuation(words, _COMMAS_IN_NUMBER))


def _punctuation(text: str, comma: re.Pattern[str]) -> str:
    """Marks beside a space vanish, others become one; all of them vanish where some number has a comma."""
    # A mark is judged by the whole text as it was given, not by what earlier marks have left of it.
    number = comma.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        result = result.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    return _PERIOD.sub("", result, count=_PERIODS_REMOVED)


def _words(text: str) -> str:
    """Numbers in digits, no articles, contractions with their apostrophe."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """VQA accuracy of `answer` against what people said, both normalised: the mean of min(1, n/3) over leaving one out.

    n is how many of the others gave the answer; it is 0, .3, .6, .9 or 1 for ten people.
    """
    said = [evalai(person) for person in people]
    same = said.count(evalai(answer))
    # Leaving out one who agrees leaves same - 1 of them, and that happens `same` times; else all stay.
    left_out = same * min(1.0, (same - 1) / 3) + (len(said) - same) * min(1.0, same / 3)
    return float(left_out / len(said))


def vqa_eval(answer: str, people: Sequence[Mapping[str, Any]]) -> float:
    """As the official `vqaEval` computes it, on the `answers` of an annotation file.

    It normalises only where people disagree, so "No" against ten "no" is 0; and leaving one answer out leaves out all
    records equal to it, which without an `answer_id` are many.
    """
    given = answer.replace("\n", " ").replace("\t", " ").strip()
    records = [dict(person) for person in people]
    for record in records:
        record["answer"] = record["answer"].replace("\n", " ").replace("\t", " ").strip()
    if len({record["answer"] for record in records}) > 1:
        for record in records:
            record["answer"] = _vqa_eval_text(record["answer"])
        given = _vqa_eval_text(given)
    scores = []
    for left_out in records:
        same = sum(other["answer"] == given for other in records if other != left_out)
        scores.append(min(1.0, same / 3))
    return float(sum(scores) / len(scores))


@lru_cache(maxsize=100_000)
def _vqa_eval_text(text: str) -> str:
    """The official script's normaliser: punctuation, then words."""
    return _words(_punctuation(text, _COMMA_IN_NUMBER))


def gqa_answer(text: str) -> str:
    """What LLaVA-1.5 hands to GQA's evaluation, which then compares strings: a final article or space counts."""
    return text.rstrip(".").lower()


def science_qa_choice(text: str, choices: int) -> int | None:
    """Index of the option that an answer names: "B", "B. ...", or one "The answer is B."; None otherwise."""
    letters = "ABCDE"
    if len(text) == 1 and text in letters:
        letter = text
    elif len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        letter = text[0]
    else:
        named = re.findall(r"The answer is ([A-Z]).", text)  # any character after it, as in LLaVA's code
        letter = named[0] if len(named) == 1 else ""
    return letters.index(letter) if letter and letter in letters[:choices] else None


def pope_answer(text: str) -> str:
    """`yes` or `no`: no if the first sentence, without commas, has the word No, no or not; everything else is yes."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def mme_answer(text: str) -> str:
    """`yes`, `no` or `other`: what the first four characters hold."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def option_letter(text: str, options: Mapping[str, str]) -> str | None:
    """The option an MMBench answer names, by the rules its server applies before it asks a language model.

    It is the one letter that stands by itself, or else the one option whose text occurs. None if neither is so, or if
    only Z stands by itself, which means none of the options.
    """
    words = set(re.sub(r"[.()\[\],:;!*#{}]", " ", text).split())
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1:
        return letters[0]
    if not letters and "Z" in words:
        return None
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


Counts = Mapping[str, Mapping[Any, float]]  # stratum -> outcome of a unit -> how many units have it


def mean_percent(counts: Counts) -> float:
    """100 times the mean of numeric outcomes."""
    units = sum(sum(of.values()) for of in counts.values())
    return float(100 * sum(value * n for of in counts.values() for value, n in of.items()) / units)


def mean_f1(counts: Counts) -> float:
    """100 times the F1 of `yes`, outcomes being (answer, truth), averaged over the strata (POPE's splits)."""
    return sum(f1(of) for of in counts.values()) / len(counts)


def f1(of: Mapping[tuple[str, str], float]) -> float:
    """100 times F1 of `yes`; 0 where no yes was right."""
    right = float(of.get(("yes", "yes"), 0))
    wrong = float(of.get(("yes", "no"), 0) + of.get(("no", "yes"), 0))
    return 100 * 2 * right / (2 * right + wrong) if right else 0.0


def mme_total(counts: Counts) -> float:
    """MME's score: accuracy plus accuracy+ of each stratum (category), in percent, summed.

    An outcome is (questions answered right, questions) of one image; accuracy+ counts images with all of them right.
    """
    total = 0.0
    for of in counts.values():
        questions = sum(asked * n for (_, asked), n in of.items())
        right = sum(hits * n for (hits, _), n in of.items())
        whole = sum(n for (hits, asked), n in of.items() if hits == asked)
        total += 100 * right / questions + 100 * whole / sum(of.values())
    return total


class ScoreReport(TypedDict):
    """A score, its 95% bootstrap interval and the number of its units; the score of no unit is None."""

    what: str
    score: float | None
    interval: tuple[float, float] | None
    units: int


class PairReport(TypedDict):
    """One run's score minus another's, with its 95% interval, over the units that both have."""

    difference: float | None
    interval: tuple[float, float] | None
    units: int
    units_that_differ: NotRequired[int]


@dataclass(frozen=True)
class Scored:
    """A score, and what it is made of.

    Attributes:
        what: the metric in words.
        units: the independent units (questions, images, circular groups): (stratum, outcome) by their name.
        statistic: from how often each outcome occurs to the score.
    """

    what: str
    units: Mapping[str, tuple[str, Hashable]]
    statistic: Callable[[Counts], float] = mean_percent

    def counts(self) -> dict[str, Counter[Hashable]]:
        """How often each outcome occurs, by stratum."""
        counts: dict[str, Counter[Hashable]] = defaultdict(Counter)
        for stratum, outcome in self.units.values():
            counts[stratum][outcome] += 1
        return dict(counts)

    def report(self, seed: int = 0) -> ScoreReport:
        """Score, interval and count, for a file of scores."""
        if not self.units:
            return {"what": self.what, "score": None, "interval": None, "units": 0}
        counts = self.counts()
        interval = bootstrap(counts, self.statistic, seed)
        return {"what": self.what, "score": self.statistic(counts), "interval": interval, "units": len(self.units)}

    def jackknife(self) -> dict[str, float]:
        """What each unit adds to the score, by the delete-one jackknife; the sum of squares is the score's variance.

        Units with the same outcome add the same, so each outcome is left out once, however many units have it.
        """
        counts: dict[str, dict[Any, float]] = {stratum: dict(of) for stratum, of in self.counts().items()}
        added: dict[tuple[str, Any], float] = {}
        for stratum, of in counts.items():
            size = sum(of.values())
            if size < 2:  # the only unit of its stratum: how much such units vary is not known
                added |= {(stratum, outcome): 0.0 for outcome in of}
                continue
            without = {}
            for outcome, n in of.items():
                without[outcome] = self.statistic({**counts, stratum: {**of, outcome: n - 1}})
            mean = sum(without[outcome] * n for outcome, n in of.items()) / size
            factor = ((size - 1) / size) ** 0.5
            added |= {(stratum, outcome): factor * (mean - value) for outcome, value in without.items()}
        return {unit: added[key] for unit, key in self.units.items()}

    def against(self, other: Scored, seed: int = 0) -> PairReport:
        """This score minus another run's on the units that both have, resampled in pairs."""
        shared = self.units.keys() & other.units.keys()
        pairs: dict[str, Counter[tuple[Hashable, Hashable]]] = defaultdict(Counter)
        for unit in shared:
            stratum, outcome = self.units[unit]
            pairs[stratum][outcome, other.units[unit][1]] += 1
        if not pairs:
            return {"difference": None, "interval": None, "units": 0}

        def difference(counts: Counts) -> float:
            return self.statistic(_side(counts, 0)) - self.statistic(_side(counts, 1))

        return {
            "difference": difference(pairs),
            "interval": bootstrap(pairs, difference, seed),
            "units": len(shared),
            "units_that_differ": sum(n for of in pairs.values() for (a, b), n in of.items() if a != b),
        }


def together(runs: Sequence[Scored]) -> Scored:
    """The mean score of several runs; a unit's outcome is the tuple of what each run made of it."""
    first = runs[0]
    shared = [unit for unit in first.units if all(unit in run.units for run in runs)]
    units = {unit: (first.units[unit][0], tuple(run.units[unit][1] for run in runs)) for unit in shared}

    def mean(counts: Counts) -> float:
        return sum(first.statistic(_side(counts, run)) for run in range(len(runs))) / len(runs)

    return Scored(first.what, units, mean)


def _side(counts: Counts, side: int) -> Counts:
    """One run's outcomes out of counts of pairs."""
    one: dict[str, dict[Any, float]] = {}
    for stratum, of in counts.items():
        one[stratum] = defaultdict(float)
        for pair, n in of.items():
            one[stratum][pair[side]] += n
    return one


def bootstrap(
    counts: Counts, statistic: Callable[[Counts], float], seed: int, resamples: int = 1000
) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile of `statistic` over units drawn anew, with replacement, in each stratum.

    Units with the same outcome are interchangeable, so a multinomial draw of the outcomes is the same as drawing units,
    however many there are; and the order of the rows does not matter.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    draws: dict[str, tuple[list[Any], Any]] = {}
    for stratum in sorted(counts):  # sorted, as the draws go on from one to the next: the same interval every time
        outcomes = sorted(counts[stratum], key=repr)
        sizes = np.array([counts[stratum][outcome] for outcome in outcomes], dtype=float)
        draws[stratum] = (outcomes, rng.multinomial(int(sizes.sum()), sizes / sizes.sum(), size=resamples))
    values = [
        statistic({stratum: _drawn(outcomes, drawn[i]) for stratum, (outcomes, drawn) in draws.items()})
        for i in range(resamples)
    ]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _drawn(outcomes: list[Any], sizes: Any) -> dict[Any, float]:
    """How often each outcome came in one draw; `sizes` are (outcomes,)."""
    return {outcome: int(n) for outcome, n in zip(outcomes, sizes, strict=True) if n}
