"""Whether two mathematical expressions are equal, by ``math-verify`` in a process that can be killed.

``math-verify`` parses LaTeX with a grammar and simplifies with sympy. It uses ``signal.alarm`` for its own time
limit, so it fails outside a main thread, and a hostile answer holds it for seconds. Here it runs as a tool in a
process of its own (``opd_env.tools.run.process``), which is killed after ``TIMEOUT_S``; the next comparison gets a
new one. Importing this module needs the extra ``math``.

Worked example::

    equivalent(r"\\frac{1}{2}", "0.5")       # True
    equivalent("3", "9" * 500)               # False
    equivalent("3", "2^{2^{2^{2^{2^2}}}}")   # ToolError (timeout)

Test it alone: ``pytest tests/tasks/test_math500.py``
"""

from __future__ import annotations

import logging

from math_verify import parse, verify

from opd_env.tools import Toolbox, ToolError, ToolErrorKind, tool

TIMEOUT_S = 2.0
MAX_CHARS = 1_000
"""Longer answers are not compared."""

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off


@tool(name="math_verify", timeout_s=TIMEOUT_S, isolation="process", deterministic=True)
def _compare(gold: str, answer: str) -> bool:
    """Compares two LaTeX expressions.

    Args:
        gold: the right one.
        answer: the other.
    """
    # In this order: verify(gold, answer) is not symmetric.
    expected = parse(f"${gold}$", parsing_timeout=None)
    found = parse(rf"\boxed{{{answer}}}", parsing_timeout=None)
    return bool(verify(expected, found, timeout_seconds=None))


def equivalent(gold: str, answer: str) -> bool:
    """Whether ``answer`` equals ``gold``, both LaTeX without ``$``. Safe to call from any thread.

    Raises:
        ToolError: kind ``timeout`` when the comparison took longer than ``TIMEOUT_S``, ``exception`` when it
            failed or its process died, ``schema`` when the answer is longer than ``MAX_CHARS``.
    """
    if len(answer) > MAX_CHARS:
        raise ToolError(ToolErrorKind.SCHEMA, f"the answer has {len(answer)} characters, more than {MAX_CHARS}")
    with Toolbox([_compare]) as toolbox:
        result = toolbox.call("math_verify", {"gold": gold, "answer": answer})
    if result.error is not None:
        raise ToolError(result.error, result.content)
    return result.content == "true"
