"""An exact calculator: rational numbers all the way, and bounded work whatever the expression.

Worked example::

    evaluate("0.1 + 0.2") == Fraction(3, 10)
    format_number(evaluate("1,000 * 3 / 8"))     # '375'
    format_number(Fraction(2, 3))                # '0.6666666667'
    evaluate("9**9**9")                          # CalculatorError: the result ... is too large

What is read: whole and decimal numbers, ``+ - * / // % **``, the sign ``-`` and brackets, with Python's meaning and
precedence (``//`` rounds down, ``%`` takes the sign of the divisor). Because models write them: ``× ÷ −`` as
operators, commas between groups of three digits (``1,000``), and ``$`` before a number. Anything else is an error
that says what to write instead: what may be a percentage (``20%``, ``20% - 5``; a remainder by a negative number
takes brackets, ``7 % (-3)``), ``^``, ``=``, names, other digits than 0-9.

How numbers are written: whole ones as ``42``; a decimal expansion that ends within 20 places in full, as ``0.125``;
any other value rounded (half to even) to 10 places, or to 10 significant digits when it is smaller than 1.

Test it alone: ``pytest tests/tools/builtin/test_calculator.py``
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from opd_env.tools.contract import tool
from opd_env.tools.tool_error import ToolError, ToolErrorKind

MAX_CHARS = 1000
"""Longest expression."""
MAX_BITS = 4096
"""Largest numerator and denominator of every intermediate value: about 1,200 digits."""
MAX_EXACT_PLACES = 20
ROUNDED_DIGITS = 10

_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_TYPOGRAPHY = str.maketrans({"×": "*", "÷": "/", "−": "-", "\t": " ", "\n": " ", "\r": " "})
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", re.ASCII)
_DOLLARS = re.compile(r"\$ *(?=[\d.(])", re.ASCII)
_LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)", re.ASCII)
_PERCENTAGE = re.compile(r"% *(?:[^ \d.(]|$)", re.ASCII)
_FOREIGN = re.compile(r"[^0-9.+\-*/%() ]")
_ADVICE = {
    "^": "write a power as 2**3",
    "=": "leave the '=' out",
    "x": "write * to multiply",
    "X": "write * to multiply",
    ",": "a comma may only stand between groups of three digits, as in 1,000",
    "$": "leave the '$' out",
}


class CalculatorError(ValueError):
    """The expression cannot be evaluated; the message tells a student why."""


def evaluate(expression: str) -> Fraction:
    """The exact value of an arithmetic expression.

    Raises:
        CalculatorError: it is no arithmetic expression, divides by zero, or goes beyond the limits of this module.
    """
    if len(expression) > MAX_CHARS:
        raise CalculatorError(f"the expression has {len(expression)} characters; the limit is {MAX_CHARS}")
    text = _normalise(expression)
    try:
        return _value(ast.parse(text, mode="eval").body, text)
    except ZeroDivisionError:
        raise CalculatorError("division by zero") from None
    except SyntaxError:
        raise CalculatorError(
            f"{text[:100]!r} is no arithmetic expression; expected something like (12 + 3) * 4"
        ) from None
    except (RecursionError, MemoryError):
        raise CalculatorError("the expression is nested too deeply") from None


def format_number(value: Fraction) -> str:
    """Writes a number as the module's docstring says."""
    if value.denominator == 1:
        return str(value.numerator)
    places = _decimal_places(value.denominator)
    if places is None or places > MAX_EXACT_PLACES:
        places = ROUNDED_DIGITS + _leading_zeros(value)
    digits = str(abs(round(value * 10**places))).rjust(places + 1, "0")
    whole, decimals = digits[:-places], digits[-places:].rstrip("0")
    return ("-" if value < 0 else "") + whole + (f".{decimals}" if decimals else "")


@tool(timeout_s=2.0, deterministic=True)
def calculator(expression: str) -> str:
    """Evaluates an arithmetic expression.

    Args:
        expression: numbers, + - * / // % ** and brackets, such as (12 + 3) * 4 / 5
    """
    try:
        return format_number(evaluate(expression))
    except CalculatorError as error:
        raise ToolError(ToolErrorKind.EXCEPTION, str(error)) from error


def _normalise(expression: str) -> str:
    """The expression in the characters of ``_FOREIGN`` alone."""
    text = expression.translate(_TYPOGRAPHY).strip(" ")
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    text = _LEADING_ZEROS.sub("", _DOLLARS.sub("", text))
    if not text:
        raise CalculatorError("the expression is empty")
    if foreign := _FOREIGN.search(text):
        advice = _ADVICE.get(foreign[0], "use only numbers, + - * / // % ** and brackets")
        raise CalculatorError(f"cannot read {foreign[0]!r}: {advice}")
    if _PERCENTAGE.search(text):
        raise CalculatorError("'%' is the remainder of a division, as in 7 % 3; write 20% as 20/100")
    return text


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant():
            # The written digits, not node.value: that is a float, and 0.1 is no float.
            return _bounded(Fraction(text[node.col_offset : node.end_col_offset]))
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, text)
        case ast.UnaryOp(op=ast.UAdd()):
            return _value(node.operand, text)
        case ast.BinOp(op=ast.Pow()):
            return _power(_value(node.left, text), _value(node.right, text))
        case ast.BinOp() if type(node.op) in _OPERATIONS:
            operation = _OPERATIONS[type(node.op)]
            return _bounded(Fraction(operation(_value(node.left, text), _value(node.right, text))))
        case ast.Call():
            raise CalculatorError("write * between a number and a bracket")
        case _:
            raise CalculatorError(f"{text[:100]!r} is no arithmetic expression; expected something like (12 + 3) * 4")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise CalculatorError(f"the exponent {format_number(exponent)[:40]} is not a whole number")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if (bits - 1) * abs(exponent.numerator) > MAX_BITS:  # before computing it: 9**9**9 must cost nothing
        raise _too_large()
    return _bounded(Fraction(base**exponent.numerator))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _too_large()
    return value


def _too_large() -> CalculatorError:
    return CalculatorError(f"the result of a step is too large (over {MAX_BITS} bits)")


def _decimal_places(denominator: int) -> int | None:
    """Places after the point of a fraction in lowest terms; None when they never end."""
    twos = (denominator & -denominator).bit_length() - 1
    rest, fives = denominator >> twos, 0
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    return max(twos, fives) if rest == 1 else None


def _leading_zeros(value: Fraction) -> int:
    """Zeros between the point and the first other digit; 0 for values of at least 1."""
    value, zeros = abs(value), 0
    while value < 1 and value.numerator * 10 ** (zeros + 1) < value.denominator:
        zeros += 1
    return zeros
