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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from opd_env.errors import unknown
from opd_env.messages import Message, ToolCall, calls_of, user
from opd_env.tasks.base import Example, Grade, Task
from opd_env.tasks.data.rows import hub_rows, read_jsonl
from opd_env.tasks.function_calls.bfcl_task import JudgedTool
from opd_env.tasks.registry import register_task
from opd_env.tools import Tool

_OPTIONAL = "[Optional]"
_MARK = re.compile(r"^[ \t]*Action( Input)?:", re.MULTILINE)
_SPACE = re.compile(r"\s*")
_ORIGINAL_ACTION = re.compile(r"Action:\s*(\w+)")
_ORIGINAL_INPUT = re.compile(r"Action Input:\s*\{")


@dataclass(frozen=True)
class GoldCall:
    """A call that the answer should hold."""

    call: ToolCall
    optional: bool
    """The data mark one call ``[Optional]``: right with it and without it."""


def read_gold(answer: str) -> list[GoldCall]:
    """The gold calls of a row.

    Raises:
        ValueError: the answer is not a list of ``Action`` and ``Action_Input``, a JSON object written as a string.
    """
    try:
        rows = json.loads(answer)
        calls = [(row["Action"], json.loads(row["Action_Input"])) for row in rows]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"'answer' is no JSON list of objects with Action and Action_Input, a JSON object in a string ({error})"
        ) from None
    for name, arguments in calls:
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ValueError(f"the gold call {name!r} has arguments {arguments!r}; expected a name and a JSON object")
    return [
        GoldCall(ToolCall(name.removeprefix(_OPTIONAL), arguments), optional=name.startswith(_OPTIONAL))
        for name, arguments in calls
    ]


def read_actions(text: str) -> tuple[ToolCall, ...]:
    """The calls that a text writes, each as a line ``Action: name`` and a JSON object after ``Action Input:``.

    Markers count where they start a line, outside the JSON. What follows a JSON object on its line is passed over.
    Time is linear in the length of the text.

    Raises:
        ValueError: a marker without its partner, an action without a name, or an input that is no JSON object.
    """
    calls: list[ToolCall] = []
    name, position = "", 0
    while (mark := _MARK.search(text, position)) is not None:
        if not mark[1]:
            if name:
                raise ValueError(f"action {name!r} has no Action Input")
            end = text.find("\n", mark.end())
            position = len(text) if end < 0 else end
            name = text[mark.end() : position].strip()
            if not name:
                raise ValueError("an Action without a name")
        else:
            if not name:
                raise ValueError("an Action Input without an Action before it")
            arguments, position = _json_object(text, mark.end(), name)
            calls.append(ToolCall(name, arguments))
            name = ""
    if name:
        raise ValueError(f"action {name!r} has no Action Input")
    return tuple(calls)


def match_calls(calls: Sequence[ToolCall], gold: Sequence[GoldCall]) -> str:
    """Compares calls as JSON values, in any order; numbers by value, so 1 equals 1.0 but not true.

    Returns:
        An empty string when every required call is made, as often as it is asked for, and no other than optional
        ones; else one sentence on what is missing or too much.
    """
    try:
        made = Counter(_canonical(call) for call in calls)
    except RecursionError:
        return "an argument is nested too deeply"
    required = Counter(_canonical(one.call) for one in gold if not one.optional)
    optional = Counter(_canonical(one.call) for one in gold if one.optional)
    missing, surplus = required - made, made - required - optional
    faults = [f"missing {call}" for call in sorted(missing)] + [f"too much: {call}" for call in sorted(surplus)]
    return "; ".join(faults)


def original_verdict(text: str, answer: str) -> bool:
    r"""The rule of ``verl/utils/reward_score/feedback/tooluse.py`` in github.com/lasgroup/SDPO.

    Names are ``Action:\s*(\w+)`` wherever that stands, compared as a multiset. Inputs are what lies between
    ``Action Input:\s*{`` and the next ``}``; those that are JSON are merged into one object, later keys winning, and
    compared with the merged gold inputs by Python's ``==``. So nested objects are never read.
    """
    gold = json.loads(answer)
    expected: dict[str, Any] = {}
    for row in gold:
        expected |= json.loads(row["Action_Input"])
    merged: dict[str, Any] = {}
    position = 0
    while (mark := _ORIGINAL_INPUT.search(text, position)) is not None:
        end = text.find("}", mark.end())
        if end < 0:
            break
        position = end + 1
        try:
            merged |= json.loads(text[mark.end() - 1 : position])
        except (ValueError, RecursionError):
            continue
    return Counter(_ORIGINAL_ACTION.findall(text)) == Counter(row["Action"] for row in gold) and merged == expected


def written(calls: Sequence[ToolCall]) -> str:
    """Calls as the paper's format writes them; one that cannot be written is left out."""
    lines = []
    for call in calls:
        try:
            lines.append(f"Action: {call.name}\nAction Input: {json.dumps(call.arguments, ensure_ascii=False)}")
        except RecursionError:
            continue
    return "\n".join(lines)


def _json_object(text: str, start: int, name: str) -> tuple[dict[str, Any], int]:
    space = _SPACE.match(text, start)
    begin = start if space is None else space.end()
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"the input of action {name!r} is not JSON: {why}") from None
    if not isinstance(value, dict):
        raise ValueError(f"the input of action {name!r} is a {type(value).__name__}, expected a JSON object")
    return value, end


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON value")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _canonical(call: ToolCall) -> str:
    """Equal for equal calls."""
    return f"{call.name}({json.dumps(_plain(call.arguments), sort_keys=True, ensure_ascii=False)})"


def _plain(value: Any) -> Any:
    """Whole floats as ints, at every depth."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


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
