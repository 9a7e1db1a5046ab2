"""The calculator is exact, reads what models write, and costs nothing whatever it is given."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.tools import Toolbox, ToolErrorKind
from opd_env.tools.builtin.calculator import MAX_BITS, CalculatorError, calculator, evaluate, format_number


def answer(expression: str) -> str:
    return format_number(evaluate(expression))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("6*7", "42"),
        ("48+48/2", "72"),
        ("(12 + 3) * 4 / 5", "12"),
        ("0.1 + 0.2", "0.3"),
        ("1/8", "0.125"),
        ("-1/8", "-0.125"),
        ("1/3", "0.3333333333"),
        ("-2/3", "-0.6666666667"),
        ("2000/3", "666.6666666667"),
        ("1/3000", "0.0003333333333"),
        ("1/2**20", "0.00000095367431640625"),
        ("1/2**50", "0.0000000000000008881784197"),
        ("(10**12 + 1/3) - 10**12", "0.3333333333"),
        ("123456789012345678901234567890 + 1", "123456789012345678901234567891"),
        ("0.12345678901234567890 * 10**20", "12345678901234567890"),
        ("2**10", "1024"),
        ("2**-3", "0.125"),
        ("2**3**2", "512"),
        ("-2**2", "-4"),
        ("(-2)**2", "4"),
        ("0**0", "1"),
        ("1**10**9", "1"),
        ("7 // 2", "3"),
        ("-7 // 2", "-4"),
        ("7.5 // 2", "3"),
        ("7 % 3", "1"),
        ("-7 % 3", "2"),
        ("7 % (3)", "1"),
        ("--5", "5"),
        ("+5 - -5", "10"),
        (".5 + 5.", "5.5"),
        ("007 + 00.5", "7.5"),
        ("100 - 001", "99"),
        ("1,000 * 3", "3000"),
        ("1,234,567.5 / 2", "617283.75"),
        ("$5 * 3 + $ 1,000", "1015"),
        ("6×7÷2−1", "20"),
        (" 1\n+\t2 ", "3"),
        ("0", "0"),
        ("-0.0", "0"),
    ],
)
def test_results_are_exact_and_written_plainly(expression: str, expected: str) -> None:
    assert answer(expression) == expected


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("1/0", "division by zero"),
        ("1 // 0.0", "division by zero"),
        ("1 % (1 - 1)", "division by zero"),
        ("0**-1", "division by zero"),
        ("2^3", r"write a power as 2\*\*3"),
        ("6*7=42", "leave the '=' out"),
        ("3 x 4", r"write \* to multiply"),
        ("20%", "write 20% as 20/100"),
        ("20% * 5", "write 20% as 20/100"),
        ("(20%)", "write 20% as 20/100"),
        ("5 % -3", "write 20% as 20/100"),
        ("1,00", "groups of three digits"),
        ("1,0000", "groups of three digits"),
        ("1,000,00", "groups of three digits"),
        ("0.1,000", "groups of three digits"),
        ("5$", "leave the '\\$' out"),
        ("2(3 + 4)", r"write \* between"),
        ("(1)(2)", r"write \* between"),
        ("2**0.5", "exponent 0.5 is not a whole number"),
        ("1 2", "no arithmetic expression"),
        ("1.2.3", "no arithmetic expression"),
        ("5 +", "no arithmetic expression"),
        ("()", "no arithmetic expression"),
        ("(1", "no arithmetic expression"),
        ("1 / / 2", "no arithmetic expression"),
        ("1e5", "cannot read 'e'"),
        ("1_000", "cannot read '_'"),
        ("0x10", r"write \* to multiply"),
        ("1 << 9", "cannot read '<'"),
        ("~1", "cannot read '~'"),
        ("1 if 1 else 2", "cannot read 'i'"),
        ("__import__('os')", "cannot read '_'"),
        ("[1]", "cannot read '\\['"),
        ("'a' * 3", 'cannot read "\'"'),
        ("1; 2", "cannot read ';'"),
        ("1 # 2", "cannot read '#'"),
        ("٣ + 4", "cannot read '٣'"),
        ("５ + 4", "cannot read '５'"),
        ("x²", r"write \* to multiply"),
        ("½", "cannot read '½'"),
        ("1\x00", r"cannot read '\\x00'"),
        ("\ud800", "cannot read"),
    ],
)
def test_anything_else_is_an_error_that_says_what_to_do(expression: str, told: str) -> None:
    with pytest.raises(CalculatorError, match=told):
        evaluate(expression)


HEAVY = [
    "9**9**9",
    "10**(10**8)",
    "(-3)**(10**6)",
    "(1/3)**(10**6)",
    "2**-(10**9)",
    "2**(10**400)",
    "99999**99999**99999",
    "*".join(["9" * 90] * 10) + "**9",
    "(" * 400 + "1" + ")" * 400,
    "(" * 1000,
    "-" * 999 + "1",
    "-+" * 499 + "1",
    "1" * 100_000,
    "1+" * 50_000 + "1",
    "(" * 100_000,
    "1/" * 499 + "1",
    "1/7+" * 249 + "1",
    "1.000001*" * 110 + "1",
    "7/11*" * 199 + "1",
    "+".join(f"1/{n}" for n in range(101, 290)),
    "1/" + "3" * 990,
    "**".join(["2"] * 300),
]


@pytest.mark.parametrize("expression", HEAVY, ids=range(len(HEAVY)))
def test_no_expression_takes_long(expression: str) -> None:
    def seconds() -> float:
        start = time.process_time()
        with suppress(CalculatorError):
            answer(expression)
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 1.0


def test_the_largest_values_are_still_written() -> None:
    largest = 2**MAX_BITS - 1
    assert answer("2**4095 + (2**4095 - 1)") == str(largest)
    with pytest.raises(CalculatorError, match="too large"):
        evaluate("2**4095 + 2**4095")
    assert answer("1 / (2**4095 + (2**4095 - 1))").startswith("0.000")


def test_errors_reach_the_student_without_the_exceptions_name() -> None:
    toolbox = Toolbox(["calculator"])
    assert toolbox.call("calculator", {"expression": "6*7"}).content == "42"
    result = toolbox.call("calculator", {"expression": "1/0"})
    assert result.error is ToolErrorKind.EXCEPTION
    assert result.content == '{"error":"exception","message":"division by zero"}'
    assert toolbox.call("calculator", {"expression": 42}).error is ToolErrorKind.SCHEMA
    assert calculator("2+2") == "4"


numbers = st.integers(0, 10**6).map(str) | st.decimals(0, 1000, places=3).map(str)
expressions = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%", " + ", " * "]), inner).map("".join),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"-({text})"),
    ),
    max_leaves=8,
)


def python_value(expression: str) -> Fraction | None:
    """What Python itself computes when every number is a Fraction; None for a division by zero."""
    exact = re.sub(r"[\d.]+", lambda number: f"F('{number[0]}')", expression)
    try:
        return Fraction(eval(exact, {"F": Fraction}))
    except ZeroDivisionError:
        return None


@given(expressions)
def test_it_agrees_with_python_on_fractions(expression: str) -> None:
    expression = expression.replace("%-", "%0-")  # "20%-5" may be meant as a percentage, and is refused
    expected = python_value(expression)
    if expected is None:
        with pytest.raises(CalculatorError, match="division by zero"):
            evaluate(expression)
    else:
        assert evaluate(expression) == expected


@given(st.integers(-(10**9), 10**9), st.integers(0, 12))
def test_decimals_that_end_are_written_in_full(numerator: int, places: int) -> None:
    value = Fraction(numerator, 10**places)
    text = format_number(value)
    assert Fraction(text) == value
    assert "e" not in text
    assert text.count(".") == (value.denominator != 1)


@given(st.fractions())
def test_rounding_keeps_ten_places_or_ten_significant_digits(value: Fraction) -> None:
    error = abs(Fraction(format_number(value)) - value)
    assert error <= Fraction(1, 2 * 10**10)
    assert error <= abs(value) / (2 * 10**9)


@given(st.text(alphabet="0123456789+-*/%(),.$^= xeé×", max_size=30) | st.text(max_size=30))
def test_any_text_gives_a_number_or_a_calculator_error(text: str) -> None:
    try:
        value = evaluate(text)
    except CalculatorError:
        return
    assert isinstance(value, Fraction)
    assert evaluate(format_number(value)) == Fraction(format_number(value))
