"""Every scorer on cases worked out by hand, each of the official code's traps among them."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.benchmarks.metrics import (
    CONTRACTIONS,
    Scored,
    bootstrap,
    evalai,
    f1,
    gqa_answer,
    mean_percent,
    mme_answer,
    mme_total,
    option_letter,
    pope_answer,
    science_qa_choice,
    vqa_accuracy,
    vqa_eval,
)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Cat.", "cat"),
        ("Yes", "yes"),
        ("a dog and an apple", "dog and apple"),
        ("none", "0"),
        ("Ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the one entry that goes the other way
        ("Im", "im"),  # its key has a capital, which lower-casing has removed
        ("the dog's", "dog 's"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("no. 5", "no 5"),
        ("12.", "12"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("stop-sign", "stop sign"),
        ("well - known", "well known"),
        ("what?!", "what"),
        ("\tone\ntwo ", "1 2"),
        (" ", ""),
        ("caffè", "caffè"),
        ("." * 33 + "x", ".x"),  # re.UNICODE is passed as the count: 32 are removed
    ],
)
def test_the_evalai_normaliser(text: str, normalised: str) -> None:
    assert evalai(text) == normalised


def test_contractions_have_the_official_size() -> None:
    assert len(CONTRACTIONS) == 114
    assert CONTRACTIONS["y'allll"] == "y'all'll"
    assert CONTRACTIONS["'ow'sat"] == "'ow's'at"
    assert "shed" not in CONTRACTIONS
    assert "wed" not in CONTRACTIONS


@pytest.mark.parametrize(("said", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_each_person_out_once(said: int, accuracy: float) -> None:
    people = ["Cat"] * said + ["dog"] * (10 - said)
    assert vqa_accuracy("the cat", people) == pytest.approx(accuracy)


def people(*answers: str, ids: bool = True) -> list[dict[str, object]]:
    rows = [{"answer": answer, "answer_confidence": "yes"} for answer in answers]
    return [{**row, "answer_id": n} for n, row in enumerate(rows, 1)] if ids else rows


def test_the_official_code_normalises_only_where_people_disagree() -> None:
    same, differ = people(*["no"] * 10), people(*["no"] * 9, "yes")
    assert vqa_eval("No", same) == 0.0
    assert vqa_eval("no", same) == 1.0
    assert vqa_eval("No", differ) == pytest.approx(1.0)
    assert vqa_accuracy("No", ["no"] * 10) == 1.0


def test_the_official_code_leaves_out_equal_records_all_at_once_where_they_have_no_id() -> None:
    said = ["cup"] * 4 + ["mug"] * 6
    assert vqa_eval("cup", people(*said)) == pytest.approx(1.0)
    # Without ids, leaving out one "cup" leaves none: 6 of 10 people grant the full point.
    assert vqa_eval("cup", people(*said, ids=False)) == pytest.approx(0.6)
    assert vqa_eval("cup", people(*["cup"] * 10, ids=False)) == 0.0


def test_gqa_compares_strings() -> None:
    assert gqa_answer("Yes.") == "yes"
    assert gqa_answer("on the left...") == "on the left"
    assert gqa_answer("a cat") != gqa_answer("cat")
    assert gqa_answer("yes. ") == "yes. "


@pytest.mark.parametrize(
    ("text", "choices", "index"),
    [
        ("B", 3, 1),
        ("B. dog", 3, 1),
        ("B.dog", 3, None),
        ("b", 3, None),
        ("(B)", 3, None),
        ("The answer is C.", 3, 2),
        ("I think. The answer is C, or so", 3, 2),
        ("The answer is C", 3, None),
        ("The answer is A. The answer is B.", 3, None),
        ("D", 3, None),
        ("E. x", 5, 4),
        ("", 2, None),
    ],
)
def test_science_qa_letters(text: str, choices: int, index: int | None) -> None:
    assert science_qa_choice(text, choices) == index


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("No", "no"),
        ("no, there is not", "no"),
        ("Yes. No", "yes"),
        ("There is not a dog.", "no"),
        ("NO", "yes"),
        ("none", "yes"),
        ("No,", "no"),
        ("", "yes"),
        ("I see.no", "yes"),
    ],
)
def test_pope_reads_the_first_sentence(text: str, answer: str) -> None:
    assert pope_answer(text) == answer


def test_f1_of_yes() -> None:
    assert f1({("yes", "yes"): 3, ("yes", "no"): 1, ("no", "yes"): 2, ("no", "no"): 9}) == pytest.approx(100 * 2 / 3)
    assert f1({("no", "yes"): 4}) == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("Nope", "no"),
        ("  yes", "other"),
        ("well yes", "other"),
        ("I know", "other"),
        ("", "other"),
    ],
)
def test_mme_looks_at_four_characters(text: str, answer: str) -> None:
    assert mme_answer(text) == answer


def test_mme_adds_accuracy_and_accuracy_plus_of_each_category() -> None:
    counts = {"count": {(2, 2): 1, (1, 2): 1}, "color": {(2, 2): 3}}
    assert mme_total(counts) == pytest.approx(75 + 50 + 200)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(b)", None),
        ("B. a red car", "B"),
        ("a red car", "B"),
        ("A or B", None),
        ("A or B: a tree", "C"),
        ("Z, a tree", None),
        ("car", None),
        ("D", None),
        ("", None),
    ],
)
def test_mmbench_letters(text: str, letter: str | None) -> None:
    assert option_letter(text, {"A": "a blue car", "B": "A red car", "C": "a tree"}) == letter


def test_the_interval_holds_the_score_and_is_the_same_for_the_same_seed() -> None:
    half = {"": {1.0: 50, 0.0: 50}}
    low, high = bootstrap(half, mean_percent, seed=0)
    assert 38 <= low <= 43  # two standard errors of 5
    assert 57 <= high <= 62
    assert (low, high) == bootstrap(half, mean_percent, seed=0)
    assert (low, high) != bootstrap(half, mean_percent, seed=1)
    assert bootstrap({"": {1.0: 7}}, mean_percent, seed=0) == (100.0, 100.0)


def test_two_runs_are_compared_question_by_question() -> None:
    first = Scored("", {str(n): ("", float(n % 2 == 0)) for n in range(100)})
    second = Scored("", {str(n): ("", float(n % 2 == 0 and n > 20)) for n in range(50, -1, -1)})
    pair = first.against(second)
    assert pair["units"] == 51
    assert pair["units_that_differ"] == 11
    assert pair["difference"] == pytest.approx(100 * 11 / 51)
    assert pair["interval"][0] > 0
    assert first.against(first)["interval"] == (0.0, 0.0)


def test_the_order_of_rows_does_not_matter() -> None:
    units = {str(n): (f"part{n % 3}", float(n % 5 == 0)) for n in range(60)}
    shuffled = list(units.items())
    random.Random(0).shuffle(shuffled)
    assert Scored("", units).report() == Scored("", dict(shuffled)).report()


TEXTS = st.text(max_size=30)


@settings(max_examples=100)
@given(TEXTS)
def test_space_around_an_answer_does_not_change_it_for_evalai(text: str) -> None:
    assert evalai(f"  {text}\n") == evalai(text.strip())


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["cat", "Cat", "dog", "猫", "naïve"]), min_size=10, max_size=10), TEXTS)
def test_vqa_accuracy_does_not_depend_on_the_order_of_people(said: list[str], text: str) -> None:
    assert 0.0 <= vqa_accuracy(text, said) <= 1.0
    assert vqa_accuracy("cat", said) == vqa_accuracy("cat", sorted(said))
    rows = people(*said)
    assert vqa_eval("cat", rows) == pytest.approx(vqa_eval("cat", rows[::-1]))


@settings(max_examples=100)
@given(TEXTS)
def test_any_text_is_read_somehow(text: str) -> None:
    assert pope_answer(text) in ("yes", "no")
    assert mme_answer(text) in ("yes", "no", "other")
    assert science_qa_choice(text, 4) in (None, 0, 1, 2, 3)
    assert option_letter(text, {"A": "x", "B": "y"}) in (None, "A", "B")
    assert isinstance(gqa_answer(text), str)
