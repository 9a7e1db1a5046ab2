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

from collections.abc import Mapping, Sequence
from pathlib import Path

from opd_env.messages import Message, user
from opd_env.tasks.base import Example, Grade, Task
from opd_env.tasks.data.rows import hub_rows, read_jsonl
from opd_env.tasks.graders.boxed import grade_math
from opd_env.tasks.registry import register_task

HUB_NAME = "HuggingFaceH4/MATH-500"
FIELDS: Mapping[str, type] = {"problem": str, "answer": str, "level": int, "subject": str, "unique_id": str}
INSTRUCTION = r"Put your final answer into \boxed{}."


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
