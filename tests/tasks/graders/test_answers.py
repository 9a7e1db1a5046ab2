"""The number grader: which number it reads, exact comparison, any text."""

from __future__ import annotations

import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.tasks.graders.answers import (
    MAX_NUMBER_CHARS,
    canonical,
    find_number,
    grade_number,
    grade_text,
    number_value,
)

READ = [
    ("The answer is 42.", "42"),
    ("The final answer is: **42**.", "42"),
    ("ANSWER: 42", "42"),
    ("<answer>42</answer>", "42"),
    ("Answer: _42_", "42"),
    ("The answer was $ 42.", "42"),
    ("#### 1,234", "1,234"),
    ("####-7", "-7"),
    (r"so it is \boxed{17}", "17"),
    (r"so it is $\boxed{ \frac{3}{4} }$", r"\frac{3}{4}"),
    (r"The answer is \(\boxed{1,200}\).", "1,200"),
    (r"\(-\dfrac{3}{4}\)", r"-\dfrac{3}{4}"),
    # The number after the last marker, not the last number.
    ("The answer is 42. That is 6 times 7.", "42"),
    ("The answer is 5. No, the answer is 6, as 2 + 4 says.", "6"),
    ("#### 12 eggs (of 16)", "12"),
    ("Answer:\n42", "42"),
    ("Answer: 42\n- 3 of them red", "42"),
    # A marker with a sum behind it, or with none, does not count.
    ("Answer: 6 * 7 = 42", "42"),
    (r"The answer is 6 \times 7 = 42", "42"),
    ("The answer is 6-7 = -1", "-1"),
    ("The answer to question 3 is easy: 42", "42"),
    ("My answers 7 and 8", "8"),
    # Without a marker: the last number.
    ("First 12, then 13", "13"),
    ("It costs $3.50", "3.50"),
    ("-$5", "-$5"),
    ("$-5", "-5"),
    ("It fell to −7 degrees", "−7"),
    ("10-3", "3"),
    ("(10)-3", "3"),
    ("10 - 3", "3"),
    ("pages 5-10", "10"),
    ("25%", "25"),
    (".5", ".5"),
    ("No.5", "5"),
    ("1e3 grams", "1e3"),
    ("3/4 of it", "3/4"),
    ("60 km/h", "60"),
    ("1,234,567.", "1,234,567"),
    ("1,2345", "2345"),
    ("1234,567", "567"),
    ("5km2", "5"),
    ("5 km^2", "5"),
    ("5 of vitamin B12", "5"),
    ("x_1 = 5 x_2", "5"),
    ("3/4.5", "4.5"),
    ("答案是42", "42"),
]


@pytest.mark.parametrize(("text", "number"), READ)
def test_the_number_that_is_read(text, number):
    assert find_number(text) == number


@pytest.mark.parametrize("text", ["", "none", "B12", "km^2", "$", "-", ".", ",", "####", "answer", "٤٢", "½"])
def test_a_text_without_a_number(text):
    assert find_number(text) is None
    assert grade_number(text, "42").reason == "no number in the answer"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("18", "18.0"),
        ("18.00", "18"),
        ("1,234.5", "1234.5"),
        ("0.75", "3/4"),
        (r"\boxed{\frac{6}{8}}", "0.75"),
        ("-0", "0"),
        ("1e3", "1000"),
        ("1/3", "2/6"),
        ("#### 72", "Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72"),
        ("0.1", "1/10"),
        ("The answer is 2,125.", "2,125"),
    ],
)
def test_equal_values_are_equal_however_they_are_written(answer, gold):
    assert grade_number(answer, gold).correct


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("18.01", "18"), ("0.33", "1/3"), ("-42", "42"), ("0.3333333333333333", "1/3"), ("25%", "0.25")],
)
def test_unequal_values_are_not_rounded_into_equality(answer, gold):
    assert not grade_number(answer, gold).correct


def test_a_verdict_says_what_was_read_and_what_was_expected():
    grade = grade_number("The answer is 1,041.50", "42")
    assert (grade.correct, grade.extracted, grade.reason) == (False, "1041.5", "read 1041.5, expected 42")
    assert grade_number("42", "42").reason == ""


def test_no_final_answer_is_wrong():
    grade = grade_number(None, "42")
    assert (grade.correct, grade.extracted) == (False, None)
    assert "without a final answer" in grade.reason


@pytest.mark.parametrize("answer", ["48/2", "The answer is 48/2.", r"\boxed{\frac{48}{2}}", "24/1"])
def test_a_division_left_undone_is_not_an_answer(answer):
    grade = grade_number(answer, "24")
    assert not grade.correct
    assert "left undone" in grade.reason


@pytest.mark.parametrize("gold", ["", "none", "1/0", "9" * (MAX_NUMBER_CHARS + 1)])
def test_a_gold_answer_without_a_value_is_a_fault_of_the_data(gold):
    with pytest.raises(ValueError, match="gold answer"):
        grade_number("42", gold)


@pytest.mark.parametrize("answer", ["1/0", "1e999999", "1e-999999", "9" * 101, "1/" + "9" * 200])
def test_a_number_that_cannot_be_evaluated_is_wrong(answer):
    grade = grade_number(answer, "42")
    assert not grade.correct
    assert len(grade.extracted) <= MAX_NUMBER_CHARS


@given(st.text() | st.text(alphabet="0123456789.,-+/$%^eE#\\{}()= answerboxdfci\n"))
def test_any_text_gets_a_verdict(text):
    number = find_number(text)
    assert number is None or number in text
    grade = grade_number(text, "42")
    assert grade.correct == (grade.reason == "")


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_two_values_have_one_notation_exactly_when_they_are_equal(left, right):
    assert (canonical(left) == canonical(right)) == (left == right)
    assert Fraction(canonical(left)) == left


@given(st.decimals(min_value=-(10**9), max_value=10**9, places=4))
def test_a_stated_decimal_is_graded_by_its_exact_value(value):
    for text in (f"The answer is {value}.", f"#### {value:,}", rf"\boxed{{{value}}}", f"It is {value}"):
        assert grade_number(text, str(value)).correct
        assert not grade_number(text, str(value + Decimal("0.0001"))).correct


@given(st.integers(0, 10**12))
def test_thousands_separators_do_not_matter(value):
    assert number_value(f"{value:,}") == number_value(str(value)) == value


HOSTILE = {
    "digits": "9" * 10**6,
    "groups": "1,234" * 200_000,
    "groups_with_a_bad_end": "1," + "234," * 250_000 + "5678",
    "single_commas": "1," * 500_000,
    "dots": "1." * 500_000,
    "fractions": "1/" * 500_000,
    "exponents": "1e" * 500_000,
    "minus_signs": "-" * 10**6,
    "spaces": "answer" + " " * 10**6,
    "markers": "####" * 250_000,
    "answer_is": "answer is " * 100_000,
    "sums": ("answer " + "1" * 500 + "+1") * 2_000,
    "boxes": "\\boxed{" * 140_000,
    "latex": "\\frac{" * 160_000,
    "long_latex": "\\frac{" + "1" * 10**6,
    "brackets": "answer" + "((((((((" * 120_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_megabyte_of_anything_is_read_in_linear_time(text):
    start = time.process_time()
    assert not grade_number(text, "42").correct
    assert time.process_time() - start < 60.0, "a quadratic search would take hours"


@pytest.mark.parametrize(
    ("answer", "exact", "f1"),
    [
        ("Because of that.\nAnswer: The Beatles", True, 1.0),
        ("**Answer:** Beatles.\nI am sure.", True, 1.0),
        ("The answer is: beatles", True, 1.0),
        ("Answer: Queen. No!\nAnswer:\n  the beatles", True, 1.0),
        ("<answer>The Beatles</answer> it is", True, 1.0),
        ("Beatles", True, 1.0),
        ("Answer: Beatles and Stones", False, 1 / 2),  # 1 of 3 words, 1 of 1
        ("Answer: Stones", False, 0.0),
        ("The Beatles\nAnswer:", False, 0.0),
        ("", False, 0.0),
    ],
)
def test_a_short_answer_is_compared_by_words(answer, exact, f1):
    grade = grade_text(answer, ["The Beatles"])
    assert (grade.correct, grade.scores) == (exact, {"exact": float(exact), "f1": pytest.approx(f1)})
    assert bool(grade.reason) != exact


def test_yes_and_no_earn_nothing_for_each_other():
    assert grade_text("Answer: yes it is", ["yes"]).scores == {"exact": 0.0, "f1": 0.0}
    assert grade_text("Answer: Yes!", ["no", "yes"]).correct
    assert not grade_text(None, ["yes"]).correct


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_gets_a_grade_and_f1_is_1_for_an_exact_match(answer, gold):
    grade = grade_text(answer, [gold])
    assert 0 <= grade.scores["f1"] <= 1
    assert grade.scores["f1"] == 1 or not grade.correct


def test_a_long_hostile_text_is_graded_in_linear_time():
    start = time.process_time()
    for text in ("answer:" * 30_000, "answer:" + " *" * 100_000, "answer is" * 20_000 + "\n" * 50_000):
        assert not grade_text(text, ["x"]).correct
    assert time.process_time() - start < 60
