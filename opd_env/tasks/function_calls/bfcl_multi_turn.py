"""The multi-turn problems of the Berkeley Function Calling Leaderboard v4 (Apache-2.0): users who ask several times.

One problem, and the calls of its gold answer::

    user       Move 'final_report.pdf' within document directory to 'temp' directory in document. …
    assistant  cd(folder="document"), mkdir(dir_name="temp"), mv(source="final_report.pdf", destination="temp")
    user       Perform a detailed search using grep to identify sections … pertaining to 'budget analysis'.
    assistant  cd(folder="temp"), grep(file_name="final_report.pdf", pattern="budget analysis")

Categories: ``base``; ``miss_func``, where a function is withheld until the user adds it; ``miss_param``, where the user
leaves out what a call needs and says it one message later. A turn without a call hands over to the user.

The rules are those of the official checker (``bfcl-eval`` 2026.3.23, ``multi_turn_checker.py``). The student's calls
and the gold calls are run side by side on the back ends (``bfcl_backends``). After every user turn that asks for
something, there must have been a call, all public state must be equal, and every answer that the gold calls got in
this turn must be among all answers that the student's calls got so far. Two things differ: a call that cannot be read
is answered with an error and may be repeated, where the official harness goes on to the next user turn; and the text
``name(`` inside an argument stays as it is, where the harness may rewrite it.

Budgets: a problem takes up to 8 user turns and the schemas of up to 40 functions; the leaderboard allows 20 calls a
user turn. ``opd-env eval --task bfcl_multi_turn --limits.max_turns 160 --limits.max_tool_calls 160
--limits.max_tokens 32768`` allows as much.

Test it alone: ``pytest tests/tasks/function_calls/test_bfcl_multi_turn.py``
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from opd_env.errors import unknown
from opd_env.messages import Message, ToolCall, assistant, calls_of, tool_message, user
from opd_env.tasks.base import Example, Grade, Task
from opd_env.tasks.data.rows import read_jsonl
from opd_env.tasks.function_calls.bfcl_backends import Backends, data_folder, functions_of
from opd_env.tasks.function_calls.bfcl_task import ANSWER, JudgedTool, json_schema
from opd_env.tools import Tool, ToolError, ToolErrorKind
from opd_env.tools.run.time_limit import run_with_limit

CATEGORIES = ("base", "miss_func", "miss_param")
ROW: Mapping[str, type] = {"id": str, "question": list, "initial_config": dict, "involved_classes": list}
ADDED = "I have updated some more functions you can choose from. What about now?"
"""What the official user says when functions are added."""
JUDGING_TIMEOUT_S = 10.0


class BFCLMultiTurn(Task):
    """Function calling over several user turns, judged by the state that the calls bring about.

    Args:
        split: ``test``.
        category: ``base``, ``miss_func`` or ``miss_param``.
        path: the folder with ``BFCL_v4_multi_turn_….json`` and ``possible_answer/``; None takes the one of the
            installed package ``bfcl-eval``, which is needed for its back ends anyway.

    Raises:
        FileNotFoundError: there is no such folder or file, or ``bfcl-eval`` is not installed.
        ValueError: another split, an unknown category, or a broken row (file, line, reason).
    """

    version = "4"
    splits = ("test",)
    train_splits = ()
    licence = "Apache-2.0"

    def __init__(self, split: str = "test", *, category: str = "base", path: str | Path | None = None) -> None:
        super().__init__(split)
        if category not in CATEGORIES:
            raise ValueError(unknown("category", category, CATEGORIES))
        self.category = f"multi_turn_{category}"
        folder = data_folder() if path is None else Path(path).expanduser()
        file = f"BFCL_v4_{self.category}.json"
        self._rows = read_jsonl(folder / file, ROW)
        answers = read_jsonl(folder / "possible_answer" / file, ANSWER)
        self._gold = {answer["id"]: answer["ground_truth"] for answer in answers}
        for row in self._rows:
            if len(self._gold.get(row["id"], ())) != len(row["question"]):
                raise ValueError(f"{folder / 'possible_answer' / file} has no answer of as many turns to {row['id']}")

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> Example:
        """The example at ``index``, in the order of the file; its difficulty is the number of user turns."""
        row = self._rows[index]
        withheld = row.get("missed_function", {})
        later = [
            _added(row["involved_classes"], withheld[str(turn)]) if str(turn) in withheld else messages[-1]["content"]
            for turn, messages in enumerate(row["question"])
        ][1:]
        gold = self._gold[row["id"]]
        return Example(
            id=row["id"],
            messages=tuple({"role": m["role"], "content": m["content"]} for m in row["question"][0]),
            answer=json.dumps(gold),
            difficulty=len(gold),
            metadata={
                "category": self.category,
                "classes": row["involved_classes"],
                "config": row["initial_config"],
                "withheld": sorted({name for names in withheld.values() for name in names}),
                "later": later,
                "gold": gold,
            },
        )

    def next_user(self, example: Example, turns: Sequence[Message]) -> Message | None:
        """The next of the problem's messages."""
        spoken = sum(message["role"] == "user" for message in turns)
        later = example.metadata["later"]
        return user(later[spoken]) if spoken < len(later) else None

    def tools_of(self, example: Example) -> list[Tool]:
        """The functions of the example's back ends, in a state of their own that they share for one episode."""
        episode = _Episode(example.metadata["classes"], example.metadata["config"])
        return [
            JudgedTool(
                name=document["name"],
                description=document["description"],
                parameters=json_schema(document["parameters"]),
                function=_runner(document["name"]),
                state=lambda: episode,
                mutates_state=True,
                listed=document["name"] not in example.metadata["withheld"],
            )
            for document in functions_of(example.metadata["classes"])
        ]

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        """Right when the calls of every user turn brought about what the gold calls do."""
        done: list[list[ToolCall]] = [[]]
        for message in turns:
            if message["role"] == "user":
                done.append([])
            else:
                done[-1] += calls_of(message)
        gold = example.metadata["gold"]
        passed, reason = 0, "the calls could not be judged in time"
        with suppress(TimeoutError):  # only calls that were hard to run in the episode too
            passed, reason = run_with_limit(
                lambda: judge(example.metadata["classes"], example.metadata["config"], done, gold), JUDGING_TIMEOUT_S
            )
        return Grade(
            correct=not reason,
            extracted=json.dumps([[{call.name: call.arguments} for call in calls] for calls in done]),
            reason=reason,
            scores={"turns_passed": passed / len(gold)},
        )

    def expert(self, example: Example) -> list[Message]:
        """The gold calls, one a turn; where there are none, the student says so."""
        backends = Backends(example.metadata["classes"], example.metadata["config"])
        conversation = []
        for texts in example.metadata["gold"]:
            for text in texts:
                call = read_call(text)
                arguments = backends.named(call.name, *call.args, **call.keywords)
                answer = backends.execute(call.name, **arguments)
                conversation.append(assistant("", [ToolCall(call.name, arguments)]))
                conversation.append(tool_message(call.name, answer))
            conversation.append(assistant("Done." if texts else "I cannot do that yet."))
        return conversation


class GoldCall(NamedTuple):
    """One call of a gold answer."""

    name: str
    args: list[Any]
    keywords: dict[str, Any]


def read_call(text: str) -> GoldCall:
    """Reads a call in Python's notation, such as ``cd(folder='document')``; its arguments are literals.

    Raises:
        ValueError: it is something else.
    """
    try:
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            keywords = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in call.keywords}
            return GoldCall(call.func.id, [ast.literal_eval(value) for value in call.args], keywords)
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"the gold answer {text[:80]!r} is not a call with literal arguments")


def judge(
    classes: Sequence[str],
    config: Mapping[str, Any],
    done: Sequence[Sequence[ToolCall]],
    gold: Sequence[Sequence[str]],
) -> tuple[int, str]:
    """Runs what the student called and what the gold answer calls side by side.

    Args:
        classes: the back ends.
        config: their initial state.
        done: the student's calls of every user turn, in order.
        gold: the gold calls of every user turn.

    Returns:
        How many user turns are right before the first that is wrong, and why that one is wrong ("" if none is).
    """
    ours, theirs = Backends(classes, config), Backends(classes, config)
    answers: list[str] = []
    for number, texts in enumerate(gold):
        where = f"user turn {number + 1}"
        if number >= len(done):
            return number, f"the episode ended before {where} of {len(gold)}"
        answers += [ours.execute(call.name, **call.arguments) for call in done[number]]
        wanted = [theirs.execute(call.name, *call.args, **call.keywords) for call in map(read_call, texts)]
        if not texts:
            continue  # the user asks for what cannot be done yet; a call is run, and shows in the state
        if not done[number]:
            return number, f"{where}: no call"
        if different := _different(ours.states(), theirs.states()):
            return number, f"{where}: other state of {', '.join(different)}"
        left = list(answers)
        for answer in wanted:
            if answer not in left:
                return number, f"{where}: no call was answered {answer[:200]}"
            left.remove(answer)
    return len(gold), ""


def _different(ours: Mapping[str, Mapping[str, Any]], theirs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the attributes that differ."""
    return [
        f"{name}.{attribute}"
        for name, attributes in theirs.items()
        for attribute, value in attributes.items()
        if not _equal(ours[name].get(attribute), value)
    ]


def _equal(ours: Any, theirs: Any) -> bool:
    try:
        return bool(ours == theirs)
    except RecursionError:  # a folder that was moved into itself
        return False


class _Episode:
    """The back ends of one episode, made at the first call of any of their functions."""

    def __init__(self, classes: Sequence[str], config: Mapping[str, Any]) -> None:
        self._coordinates = classes, config
        self._backends: Backends | None = None

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        if self._backends is None:
            self._backends = Backends(*self._coordinates)
        return self._backends.call(name, **arguments)

    def close(self) -> None:
        """Every function of the episode closes it; the first does."""
        self._backends = None


def _runner(name: str) -> Any:
    def run(state: _Episode, **arguments: Any) -> str:
        try:
            return state.call(name, arguments)
        except Exception as error:  # the functions check little: any argument may break them anywhere
            raise ToolError(ToolErrorKind.EXCEPTION, f"Error during execution: {error}") from error

    return run


def _added(classes: Sequence[str], names: Sequence[str]) -> str:
    """The user message that adds functions: their schemas, as the tool section of a prompt writes them."""
    schemas = [
        {"name": one["name"], "description": one["description"], "parameters": json_schema(one["parameters"])}
        for one in functions_of(classes)
        if one["name"] in names
    ]
    lines = [json.dumps({"type": "function", "function": schema}, ensure_ascii=False) for schema in schemas]
    return "\n".join([*lines, ADDED])
