r"""Answers in ``\boxed{…}``: by text after a light normalisation, and by mathematical value.

Worked example::

    grade_math(r"So it is \boxed{\dfrac12}.", r"\frac{1}{2}").correct        # True

Test it alone: ``pytest tests/tasks/test_math500.py``
"""

from __future__ import annotations

import re

from opd_env.tasks.base import Grade
from opd_env.tools import ToolError

_box = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{")
_brace = re.compile(r"(?<!\\)[{}]")
_layout = re.compile(r"\\(?:left|right)(?![a-z])|\\[!,;: ]|\\displaystyle|[\s$~]")
_short_fraction = re.compile(r"\\frac(\w)(\w)")


def grade_math(answer: str | None, gold: str) -> Grade:
    r"""Whether the last ``\boxed{…}`` of a message equals ``gold`` as text (``exact``) or as a value (``math_verify``).

    Raises:
        ImportError: ``math-verify`` is not installed.
    """
    from opd_env.tasks.graders.equivalence import equivalent

    if answer is None:
        return Grade(correct=False, reason="the episode ended without a final answer")
    found = last_boxed(answer)
    if found is None:
        return Grade(correct=False, reason=r"no \boxed{…} in the answer")
    exact = normalise(found) == normalise(gold)
    try:
        same_value = equivalent(gold, found)
        problem = ""
    except ToolError as error:
        same_value = False
        problem = f"; math-verify: {error.message}"
    correct = exact or same_value
    return Grade(
        correct=correct,
        extracted=found[:200],
        reason="" if correct else f"read {found[:80]}, expected {gold}{problem}",
        scores={"exact": float(exact), "math_verify": float(same_value)},
    )


def last_boxed(text: str) -> str | None:
    r"""What the last ``\boxed{…}`` (or ``\fbox{…}``) with balanced braces holds. Linear in the length of the text.

    Example:
        >>> last_boxed(r"So \boxed{1}, no: \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
    """
    starts = {match.end() for match in _box.finditer(text)}
    closing: list[int] = []  # positions of the `}` that are still open, read from the back
    for match in reversed(list(_brace.finditer(text))) if starts else ():
        if match[0] == "}":
            closing.append(match.start())
        elif closing:
            end = closing.pop()
            if match.end() in starts:
                return text[match.end() : end].strip()
    return None


def normalise(answer: str) -> str:
    r"""The text of an answer without what only concerns its layout.

    Example:
        >>> normalise(r"\left( 3, \dfrac12 \right)")
        '(3,\\frac{1}{2})'
    """
    text = answer.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").replace(r"\%", "").replace("%", "")
    text = re.sub(r"\\text(?:rm|bf|it)?\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^\{?\\circ\}?", "", text)
    text = _short_fraction.sub(r"\\frac{\1}{\2}", _layout.sub("", text))
    return text.removesuffix(".")
