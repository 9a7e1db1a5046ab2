"""The single-turn Python problems of the Berkeley Function Calling Leaderboard v4 (Apache-2.0), as a task.

One problem brings its own functions and asks for calls, which are judged and not run::

    user       Find the area of a triangle with a base of 10 units and height of 5 units.
    functions  calculate_triangle_area(base: integer, height: integer, unit: string)
    right      calculate_triangle_area(base=10, height=5)          # or with unit="units"

For evaluation only. As on the leaderboard, the first turn alone counts, and ``opd_env.tasks.bfcl`` has the rules.
A well-formed call ends the episode. Three scores tell what the first turn did: ``called``, ``abstained`` or
``malformed``; ``needs_tool`` tells what was wanted. The official rule for ``irrelevance`` takes a malformed call for
none; here it is an error.

Test it alone: ``pytest tests/tasks/function_calls/test_bfcl_task.py``
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_env.errors import unknown
from opd_env.messages import Message, calls_of
from opd_env.tasks.base import Example, Grade, Task
from opd_env.tasks.bfcl import CATEGORIES, match_calls
from opd_env.tasks.data.rows import read_jsonl
from opd_env.tasks.function_calls.bfcl_backends import data_folder
from opd_env.tools import Tool, ToolError, ToolErrorKind

ROW: Mapping[str, type] = {"id": str, "question": list, "function": list}
ANSWER: Mapping[str, type] = {"id": str, "ground_truth": list}
JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
"""BFCL's types that JSON Schema calls otherwise."""


class JudgedTool(Tool):
    """Takes any arguments: BFCL's rules judge them, and accept some that do not fit the schema."""

    def check(self, arguments: object) -> dict[str, Any]:
        """See ``Tool.check``."""
        if not isinstance(arguments, Mapping):
            raise ToolError(
                ToolErrorKind.NOT_AN_OBJECT, f"the arguments are a {type(arguments).__name__}, expected an object"
            )
        return dict(arguments)


class BFCL(Task):
    """Function calling, judged by the leaderboard's rules.

    Every problem has functions of its own: ``tools_of`` gives them.

    Args:
        split: ``test``.
        category: ``simple_python``, ``multiple``, ``parallel``, ``parallel_multiple``, ``irrelevance``, or one of
            these with ``live_`` before it, or ``live_relevance``.
        path: the folder with ``BFCL_v4_….json`` and ``possible_answer/``; None takes the one of the installed
            package ``bfcl-eval``.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: another split, an unknown category, or a broken row (file, line, reason).
    """

    version = "4"
    splits = ("test",)
    train_splits = ()
    licence = "Apache-2.0"

    def __init__(self, split: str = "test", *, category: str = "simple_python", path: str | Path | None = None) -> None:
        super().__init__(split)
        if category not in CATEGORIES:
            raise ValueError(unknown("category", category, CATEGORIES))
        self.category = category
        folder = Path(path).expanduser() if path is not None else data_folder()
        file = f"BFCL_v4_{category}.json"
        self._rows = read_jsonl(folder / file, ROW, _check_row)
        self._gold: dict[str, list[Any]] = {}
        if "relevance" not in category:
            answers = read_jsonl(folder / "possible_answer" / file, ANSWER)
            self._gold = {answer["id"]: answer["ground_truth"] for answer in answers}
            for row in self._rows:
                if row["id"] not in self._gold:
                    raise ValueError(f"{folder / 'possible_answer' / file} has no answer to {row['id']}")

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> Example:
        """The example at ``index``, in the order of the file."""
        row = self._rows[index]
        gold = self._gold.get(row["id"], [])
        return Example(
            id=row["id"],
            messages=tuple({"role": m["role"], "content": m["content"]} for m in row["question"][0]),
            answer=json.dumps(gold),
            metadata={"category": self.category, "functions": row["function"], "gold": gold},
        )

    def tools_of(self, example: Example) -> list[Tool]:
        """The example's functions. A well-formed call of one ends the episode."""
        return [
            JudgedTool(
                name=function["name"],
                description=function["description"],
                parameters=json_schema(function["parameters"]),
                function=_accept,
                ends_episode=True,
                deterministic=True,
            )
            for function in example.metadata["functions"]
        ]

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        """Right when the calls of the first turn are."""
        calls = calls_of(turns[0]) if turns else ()
        # A turn without a call ends the episode. A second turn follows only on a call, so there was one.
        malformed = not calls and len(turns) > 1
        verdict = match_calls(example.metadata["functions"], calls, example.metadata["gold"], self.category)
        return Grade(
            correct=verdict.valid and not malformed,
            extracted=json.dumps([{call.name: call.arguments} for call in calls]),
            reason="the call was malformed" if malformed else "; ".join(verdict.errors),
            scores={
                "called": float(bool(calls)),
                "abstained": float(not calls and not malformed),
                "malformed": float(malformed),
                "needs_tool": float("irrelevance" not in self.category),
            },
        )


def json_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A function's ``parameters`` in the types of JSON Schema, at every depth."""
    schema = dict(parameters)
    schema["type"] = JSON_TYPES.get(schema["type"], schema["type"])
    if "properties" in schema:
        schema["properties"] = {name: json_schema(value) for name, value in schema["properties"].items()}
    if "items" in schema:
        schema["items"] = json_schema(schema["items"])
    return schema


def _accept(**arguments: Any) -> str:
    return "done"


def _check_row(row: Mapping[str, Any]) -> None:
    if len(row["question"]) != 1:
        raise ValueError(f"{len(row['question'])} turns in 'question', expected one")
