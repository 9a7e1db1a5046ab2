"""MATH-500: 500 competition problems with LaTeX answers (Hendrycks et al. 2021; Lightman et al. 2023), MIT licence.

One row::

    problem   Convert the point $(0,3)$ in rectangular coordinates to polar coordinates. …
    answer    \\left( 3, \\frac{\\pi}{2} \\right)
    level     2

For evaluation only. An answer is what the last ``\\boxed{…}`` of the final message holds. Two graders judge it on
their own: ``exact`` compares the text after a light normalisation, ``math_verify`` the mathematical value; an
answer is correct when either says so, and both are among the scores, so that their disagreements can be listed.

Test it alone: ``pytest tests/tasks/test_math500.py``
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from opd_env.messages import Message, user
from opd_env.tasks.base import Example, Grade, Task
from opd_env.tasks.data.rows import hub_rows, read_jsonl
from opd_env.tasks.registry import register_task
from opd_env.tools import ToolError

HUB_NAME = "HuggingFaceH4/MATH-500"
FIELDS: Mapping[str, type] = {"problem": str, "answer": str, "level": int, "subject": str, "unique_id": str}
INSTRUCTION = r"Put your final answer into \boxed{}."

_box = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{")
_brace = re.compile(r"(?<!\\)[{}]")
_layout = re.compile(r"\\(?:left|right)(?![a-z])|\\[!,;: ]|\\displaystyle|[\s$~]")
_short_fraction = re.compile(r"\\frac(\w)(\w)")


@register_task("math500")
class Math500(Task):
    """Competition mathematics, graded by value.

    Args:
        split: ``test``.
        path: a JSONL file, or a folder with ``test.jsonl``; None loads ``HuggingFaceH4/MATH-500`` through
            ``datasets``.

    Raises:
        ImportError: ``math-verify`` is not installed.
        ConnectionError: no path, and the hub cannot be reached.
        FileNotFoundError: there is no such file.
        ValueError: another split, or a broken row (file, line, reason).
    """

    version = "1"
    splits = ("test",)
    train_splits = ()
    licence = "MIT"

    def __init__(self, split: str = "test", *, path: str | Path | None = None) -> None:
        super().__init__(split)
        try:
            import opd_env.tasks.graders.equivalence  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "task 'math500' needs the package math-verify; install it with: pip install 'opd-env[math]'"
            ) from error
        if path is None:
            self._rows = hub_rows(HUB_NAME, None, split)
        else:
            path = Path(path).expanduser()
            self._rows = read_jsonl(path / "test.jsonl" if path.is_dir() else path, FIELDS)

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> Example:
        """The example at ``index``, in the order of the file; its difficulty is the level from 1 to 5."""
        row = self._rows[index]
        return Example(
            id=row["unique_id"],
            messages=(user(f"{row['problem']}\n\n{INSTRUCTION}"),),
            answer=row["answer"],
            difficulty=row["level"],
            metadata={"subject": row["subject"]},
        )

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        """Right when the last boxed expression equals the gold answer, as text or as a value."""
        return grade_math(answer, example.answer)


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
