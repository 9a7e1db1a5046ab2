"""Reads the final number out of free text and compares it exactly with the gold answer.

Worked example::

    grade_number("48/2 = 24, so the answer is 1,224.50 dollars.", "1224.5").correct     # True
    grade_number(r"\\boxed{\\frac{3}{4}}", "0.75").correct                                # True
    grade_number("The answer is 41.", "42")
    # Grade(correct=False, extracted='41', reason='read 41, expected 42')

Which number is *the* number:

1. The number directly after the last marker: ``####``, ``\\boxed{`` or the word ``answer``
   (``answer is``, ``Answer:``, ``<answer>``). Only spaces, ``$``, brackets, quotes and Markdown may
   stand between, and the number must not begin a sum (``Answer: 6 * 7 = 42``).
2. Without one, the last number of the text.

What a number is: digits, with commas between groups of three, a decimal part, an exponent, a fraction
``3/4`` or ``\\frac{3}{4}``; a minus sign counts when it is not a subtraction (``10-3`` ends in 3).
Currency signs, percent signs and units are not read: ``25%`` is 25. Digits glued to a word (``B12``,
``km2``) or an exponent (``km^2``) are no numbers. A fraction that divides out (``48/2``) is a division
left undone and is never right: the student has to say 24.

Values are compared as exact rationals: 18 equals 18.0, and 0.1 is one tenth. Any text is safe: the time
is linear in its length, and a number of more than 100 characters or with an exponent of more than two
digits is not evaluated.

Test it alone: ``pytest tests/tasks/graders/test_answers.py``
"""

from __future__ import annotations

import re
import string
from collections import Counter, deque
from collections.abc import Sequence
from fractions import Fraction

from opd_env.tasks.base import Grade

MAX_NUMBER_CHARS = 100
MAX_EXPONENT_DIGITS = 2
MAX_TEXT_CHARS = 200
"""Characters of a text answer that a grade keeps."""

# Possessive quantifiers (`++`, `?+`) never give characters back: linear time, and no half-read number.
_DECIMAL = r"""
    (?: (?>[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))++ | [0-9]++) (?:\.[0-9]++)?+   # 1,234.5 or 1234.5
      | \.[0-9]++                                                          # .5
    ) (?:[eE][-+]?[0-9]++)?+
"""
_NUMBER = rf"""
    (?: (?<![A-Za-z0-9_.)}}%])[-+−]\$?+ )?+     # a sign, unless it subtracts from what stands before
    (?: \\[dt]?frac\{{-?[0-9]++\}}\{{[0-9]++\}}
      | (?<![A-Za-z0-9^])(?<![A-Za-z0-9]_) {_DECIMAL} (?:/[0-9]++(?!\.[0-9]))?+
    )
"""
_MARKER = r"(?: \#\#\#\# | \\boxed\s?\{ | \banswer(?:\s(?:is|was))? )"
_BETWEEN = r"(?: [\s:=*_~(\"'`{>\[$€£¥] | \\[(\[$] ){0,16}+"
_NOT_A_SUM = r"(?! [ \t]{0,4} (?: [-+*/^×÷−x] | \\times | \\div ) [ \t]{0,4} \$? [0-9(] )"

_number = re.compile(rf"({_NUMBER})", re.VERBOSE)
_marked_number = re.compile(rf"{_MARKER} {_BETWEEN} ({_NUMBER}) {_NOT_A_SUM}", re.VERBOSE | re.IGNORECASE)
_article = re.compile(r"\b(?:a|an|the)\b")
_marked_text = re.compile(r"(?:\banswer(?:\*\*)?:|\banswer is:?|<answer>)[\s*]*([^\n<]*)", re.IGNORECASE)
_fraction = re.compile(r"\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}")


def find_number(text: str) -> str | None:
    """The number that ``text`` gives as its answer, as written there; None when there is none.

    The rules are at the top of this module. Linear in the length of the text.
    """
    for pattern in (_marked_number, _number):
        last = deque(pattern.finditer(text), maxlen=1)
        if last:
            return last[0].group(1)
    return None


def number_value(number: str) -> Fraction | None:
    """The exact value of what ``find_number`` returned.

    None for what is not a value: a number too long to evaluate, a division by zero.
    """
    if len(number) > MAX_NUMBER_CHARS:
        return None
    plain = _fraction.sub(r"\1/\2", number).replace("−", "-").replace(",", "").replace("$", "")
    plain = plain.replace("--", "")
    exponent = plain.lower().partition("/")[0].partition("e")[2].lstrip("+-")
    if len(exponent) > MAX_EXPONENT_DIGITS:
        return None
    top, _, bottom = plain.partition("/")
    try:
        return Fraction(top) / Fraction(bottom or 1)
    except ZeroDivisionError:
        return None


def grade_number(answer: str | None, gold: str) -> Grade:
    """Whether the final number of ``answer`` equals ``gold`` exactly.

    Args:
        answer: the student's final message; None when there was none.
        gold: a number in any of this module's notations, such as ``"1,234.5"``, ``"3/4"`` or ``"#### 18"``.

    Returns:
        A grade whose ``extracted`` is the number in one canonical notation (``1234.5``, ``1/3``), so that
        equal answers are equal strings.

    Raises:
        ValueError: ``gold`` holds no number that can be evaluated, which is a fault of the data.
    """
    gold_number = find_number(gold)
    expected = None if gold_number is None else number_value(gold_number)
    if expected is None:
        raise ValueError(
            f"the gold answer {gold[:80]!r} holds no number; expected one such as '42', '3/4' or '#### 18'"
        )
    if answer is None:
        return Grade(correct=False, reason="the episode ended without a final answer")
    number = find_number(answer)
    if number is None:
        return Grade(correct=False, reason="no number in the answer")
    value = number_value(number)
    if value is None:
        return Grade(
            correct=False,
            extracted=number[:MAX_NUMBER_CHARS],
            reason="the number is too long to read or divides by zero",
        )
    if value.denominator == 1 and ("/" in number or "frac" in number):
        return Grade(correct=False, extracted=number, reason=f"{number} is a division left undone")
    extracted = canonical(value)
    if value != expected:
        return Grade(correct=False, extracted=extracted, reason=f"read {extracted}, expected {canonical(expected)}")
    return Grade(correct=True, extracted=extracted)


def grade_text(answer: str | None, golds: Sequence[str]) -> Grade:
    """Whether the short answer that a message gives is one of ``golds``: exact match and F1 as in SQuAD and HotpotQA.

    The short answer is the first line after the last ``Answer:``, ``answer is`` or ``<answer>``, or the whole
    message when it has none of them. Both sides are compared in lower case, without punctuation and articles.

    Args:
        answer: the student's final message; None when there was none.
        golds: the accepted answers.

    Returns:
        A grade that is correct on an exact match; ``exact`` and ``f1`` (the best over ``golds``) are its scores.
    """
    if answer is None:
        return Grade(correct=False, reason="the episode ended without a final answer")
    last = deque(_marked_text.finditer(answer), maxlen=1)
    found = (last[0].group(1) if last else answer).strip(" \t\n*_`")
    exact = any(normalise_text(found) == normalise_text(gold) for gold in golds)
    scores = {"exact": float(exact), "f1": max(_f1(found, gold) for gold in golds)}
    reason = "" if exact else f"read {found[:80]!r}, expected {golds[0]!r}"
    return Grade(correct=exact, extracted=found[:MAX_TEXT_CHARS], reason=reason, scores=scores)


def normalise_text(text: str) -> str:
    """Lower case, without punctuation, articles and repeated spaces (the rules of SQuAD's evaluation script).

    Example:
        >>> normalise_text("The  Beatles!")
        'beatles'
    """
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(_article.sub(" ", plain).split())


def _f1(found: str, gold: str) -> float:
    """Harmonic mean of precision and recall over words."""
    ours, theirs = normalise_text(found).split(), normalise_text(gold).split()
    common = (Counter(ours) & Counter(theirs)).total()
    if {"yes", "no", "noanswer"} & {" ".join(ours), " ".join(theirs)} and ours != theirs:
        return 0.0
    return 2 * common / (len(ours) + len(theirs)) if common else float(ours == theirs)


def canonical(value: Fraction) -> str:
    """One notation per value: an integer, a decimal where it ends, else a fraction in lowest terms.

    Example:
        >>> canonical(Fraction(5, 2)), canonical(Fraction(-4)), canonical(Fraction(1, 3))
        ('2.5', '-4', '1/3')
    """
    twos, fives, rest = 0, 0, value.denominator
    while rest % 2 == 0:
        twos, rest = twos + 1, rest // 2
    while rest % 5 == 0:
        fives, rest = fives + 1, rest // 5
    if rest != 1:
        return str(value)
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    sign = "-" if value < 0 else ""
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)
