"""The tool-use test of the OPD+ paper (arXiv 2606.01039): 68 of ToolAlpaca's requests (Apache-2.0), exact match.

One row::

    user    Your task is to answer the user's question using available tools. … searchAxolotlImages: Search for axolotl
            images … Use the following format: Thought: … Action: … Action Input: … Question: I'm looking for an axolotl
            that is wild in color and medium in size. …
    answer  [{"Action": "searchAxolotlImages", "Action_Input": "{\\"color\\": \\"wild\\", \\"gender\\": \\"\\", …}"}]

For evaluation only. A problem is shown in one of two ways: ``react`` is the row's own prompt, word for word, without
tools, and the calls are read from the text; ``tools`` gives the functions to the student as tools and the question
alone, and the calls are those of its first turn. The two are different tests: compare like with like.

Two verdicts: ``correct`` compares the calls one by one, in any order (``tooluse68_rules.match_calls``); the score
``original`` is what the paper's code says. The original cannot read nested JSON and merges the arguments of all calls:
it fails the right answer to two of the 68, and passes some wrong ones.

Test it alone: ``pytest tests/tasks/function_calls/test_tooluse68.py``
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from opd_env.errors import unknown
from opd_env.messages import Message, calls_of, user
from opd_env.tasks.base import Example, Grade, Task
from opd_env.tasks.data.rows import hub_rows, read_jsonl
from opd_env.tasks.function_calls.bfcl_task import JudgedTool
from opd_env.tasks.function_calls.tooluse68_rules import match_calls, original_verdict, read_actions, read_gold, written
from opd_env.tasks.registry import register_task
from opd_env.tools import Tool

ROW: Mapping[str, type] = {"prompt": str, "answer": str, "idx": int}
SOURCE = "datasets/tooluse/test.json of github.com/lasgroup/SDPO"
_FUNCTION = re.compile(r"^(\S+): (.*)\nParameters: (.*)$", re.MULTILINE)
_REQUIRED = "Required. "
_TYPES = {"Object": "object", "Array": "array"}
_ITEMS = ("string", "integer", "number", "boolean")


class Presentation(StrEnum):
    """How a problem is shown."""

    REACT = "react"
    """The row's own prompt; the answer is text with ``Action:`` and ``Action Input:`` lines (the paper)."""
    TOOLS = "tools"
    """The question, with the documented functions as tools of the chat format."""


@register_task("tooluse68")
class ToolUse68(Task):
    """Which functions to call, and with what, graded by exact match.

    Args:
        split: ``test``.
        path: the file ``test.json`` (one JSON object a line), or a folder that has it.
        hub_name: a data set on the Hugging Face hub with the same rows, instead of ``path``.
        presentation: ``react`` or ``tools``.

    Raises:
        ConnectionError: the hub cannot be reached.
        FileNotFoundError: there is no such file.
        ValueError: not one source, another split, an unknown presentation, or a broken row (file, line, reason).
    """

    version = "1"
    splits = ("test",)
    train_splits = ()
    licence = "Apache-2.0"

    def __init__(
        self,
        split: str = "test",
        *,
        path: str | Path | None = None,
        hub_name: str | None = None,
        presentation: str = Presentation.REACT,
    ) -> None:
        super().__init__(split)
        if presentation not in list(Presentation):
            raise ValueError(unknown("presentation", presentation, map(str, Presentation)))
        if (path is None) == (hub_name is None):
            raise ValueError(
                f"tooluse68 reads its rows from path= or hub_name=; give one of them (the paper's file is {SOURCE})"
            )
        self.presentation = Presentation(presentation)
        if hub_name is not None:
            self._rows = hub_rows(hub_name, None, split)
            for row in self._rows:
                _check(row)
        else:
            file = Path(str(path)).expanduser()
            self._rows = read_jsonl(file / f"{split}.json" if file.is_dir() else file, ROW, _check)

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> Example:
        """The example at ``index``, in the order of the file; its difficulty is the number of calls."""
        row = self._rows[index]
        gold = json.loads(row["answer"])
        shown = row["prompt"] if self.presentation is Presentation.REACT else question_of(row["prompt"])
        return Example(
            id=str(row["idx"]),
            messages=(user(shown),),
            answer=row["answer"],
            difficulty=len(gold),
            metadata={"functions": functions_of(row["prompt"])},
        )

    def tools_of(self, example: Example) -> Sequence[Tool]:
        """The documented functions, none with ``react``. A well-formed call of one ends the episode."""
        if self.presentation is Presentation.REACT:
            return []
        return [
            JudgedTool(**function, function=_accept, ends_episode=True, deterministic=True)
            for function in example.metadata["functions"]
        ]

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        """Right when the calls of the first turn are the gold ones."""
        text, malformed = str(turns[0]["content"]) if turns else "", ""
        if self.presentation is Presentation.TOOLS:
            calls = calls_of(turns[0]) if turns else ()
            # A turn without a call ends the episode. A second turn follows only on a call, so there was one.
            malformed = "the call was malformed" if not calls and len(turns) > 1 else ""
            text = written(calls)
        else:
            try:
                calls = read_actions(text)
            except ValueError as error:
                calls, malformed = (), str(error)
        reason = malformed or match_calls(calls, read_gold(example.answer))
        return Grade(
            correct=not reason,
            extracted=written(calls),
            reason=reason,
            scores={
                "original": float(original_verdict(text, example.answer)),
                "called": float(bool(calls)),
                "abstained": float(not calls and not malformed),
                "malformed": float(bool(malformed)),
            },
        )


def question_of(prompt: str) -> str:
    """What the user asks: the text after the last ``Question:`` that starts a line."""
    return prompt.rpartition("\nQuestion:")[2].strip()


def functions_of(prompt: str) -> list[dict[str, Any]]:
    """The functions that a prompt documents: ``name``, ``description`` and ``parameters`` (a JSON Schema)."""
    functions = []
    for name, description, documented in _FUNCTION.findall(prompt):
        properties = json.loads(documented)
        functions.append(
            {
                "name": name,
                "description": description,
                "parameters": {
                    "type": "object",
                    "properties": {parameter: _schema(text) for parameter, text in properties.items()},
                    "required": [parameter for parameter, text in properties.items() if text.startswith(_REQUIRED)],
                },
            }
        )
    return functions


def _schema(text: str) -> dict[str, Any]:
    """``"Required. Array[string]. The charts."`` as a JSON Schema; the text stays as the description."""
    kind, _, inner = text.removeprefix(_REQUIRED).partition(".")[0].rstrip("]").partition("[")
    schema: dict[str, Any] = {"type": _TYPES.get(kind, kind), "description": text}
    if kind == "Array" and inner in _ITEMS:
        schema["items"] = {"type": inner}
    return schema


def _check(row: Mapping[str, Any]) -> None:
    read_gold(row["answer"])
    if not functions_of(row["prompt"]) or not question_of(row["prompt"]):
        raise ValueError("the prompt documents no function, or asks no question")


def _accept(**arguments: Any) -> str:
    return "done"
