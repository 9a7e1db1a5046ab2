"""Generated word problems of one to three calculator steps, with the expert's tool calls.

One problem, and the expert's conversation about it::

    user       Ann has 12 boxes with 24 pens in each and gives 15 pens to Tom. How many pens are left?
    assistant  calculator(expression="12*24")
    tool       288
    assistant  calculator(expression="288-15")
    tool       273
    assistant  The answer is 273.

The words are few and the templates simple: the task is for models so small that they can learn nothing but
when to call, what to copy, and when to stop. The numbers are too large for them to work out without the tool.

Which split a problem belongs to is decided by a hash of its text, whatever the seed, so no question of one
split can turn up in another. No split repeats a question.

Test it alone: ``pytest tests/tasks/test_arithmetic.py``
"""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from opd_env.messages import Message, ToolCall, assistant, tool_message, user
from opd_env.tasks.base import Example, Grade, Task
from opd_env.tasks.data.splits import Drawn
from opd_env.tasks.graders.answers import grade_number
from opd_env.tasks.registry import register_task

SIZES = {"train": 20_000, "validation": 1_000, "test": 1_000}
LARGEST = 9_999
"""No operand and no result is larger."""

NAMES = ("Ann", "Ben", "Eva", "Ivan", "Lea", "Max", "Mia", "Noah", "Sam", "Tom")
THINGS = ("apples", "balls", "books", "cards", "coins", "eggs", "nuts", "pens", "roses", "stamps")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@dataclass(frozen=True)
class Kind:
    """One template. The steps are a chain: the first operand, then each operator with the next operand."""

    name: str
    operators: str
    """One character a step, so its length is the level: ``"*-"`` computes ``a*b``, then ``(a*b)-c``."""
    ranges: tuple[tuple[int, int], ...]
    """Lowest and highest value of the operands a, b, c, d, in this order."""
    text: str
    """Holds ``{name}``, ``{friend}``, ``{things}`` and the operands by letter."""


KINDS = (
    Kind("gain", "+", ((10, 999), (10, 999)),
         "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?"),
    Kind("give", "-", ((10, 999), (10, 999)),
         "{name} has {a} {things} and gives {b} {things} to {friend}. How many {things} are left?"),
    Kind("boxes", "*", ((10, 99), (10, 99)),
         "There are {a} boxes with {b} {things} in each. How many {things} are there?"),
    Kind("share", "/", ((20, 999), (2, 19)),
         "How many {things} does each of {b} friends get if {name} shares {a} {things}?"),
    Kind("boxes_give", "*-", ((10, 99), (10, 99), (10, 999)),
         "{name} has {a} boxes with {b} {things} in each and gives {c} {things} to {friend}. "
         "How many {things} are left?"),
    Kind("gain_share", "+/", ((10, 999), (10, 999), (2, 19)),
         "{name} has {a} {things}, gets {b} more and shares them with {c} friends. "
         "How many {things} does each friend get?"),
    Kind("sell_boxes", "-*", ((10, 99), (10, 99), (10, 99)),
         "A shop has {a} boxes and sells {b} of them. Each box holds {c} {things}. "
         "How many {things} are left?"),
    Kind("gain_give", "+-", ((10, 999), (10, 999), (10, 999)),
         "{name} has {a} {things}, gets {b} more and gives {c} {things} to {friend}. "
         "How many {things} does {name} have now?"),
    Kind("buy_boxes_give", "+*-", ((10, 49), (10, 49), (10, 99), (10, 999)),
         "{name} has {a} boxes and gets {b} more. Each box holds {c} {things}. "
         "{name} gives {d} {things} to {friend}. How many {things} are left?"),
    Kind("boxes_gain_share", "*+/", ((10, 99), (10, 99), (10, 999), (2, 19)),
         "{name} has {a} boxes with {b} {things} in each, gets {c} more and shares them with {d} friends. "
         "How many {things} does each friend get?"),
)  # fmt: skip
LEVELS = tuple(sorted({len(kind.operators) for kind in KINDS}))


@register_task("arithmetic")
class Arithmetic(Task):
    """Word problems, a pure function of (version, split, seed, levels, index).

    Args:
        split: ``train``, ``validation`` or ``test``.
        levels: how many steps a problem may take, out of 1, 2 and 3. The packaged models know 1 and 2.
        seed: another seed gives other problems of the same split.

    Raises:
        ValueError: there is no such split or level.
    """

    version = "1"
    licence = "Apache-2.0"
    tools = ("calculator",)
    splits = tuple(SIZES)

    def __init__(self, split: str = "train", *, levels: Sequence[int] = (1, 2), seed: int = 0) -> None:
        super().__init__(split)
        self.levels = tuple(levels)
        if not self.levels or not set(self.levels) <= set(LEVELS):
            raise ValueError(f"levels={list(levels)}: expected some of {list(LEVELS)}")
        self._drawn = (split, self.levels, seed)

    def __len__(self) -> int:
        return SIZES[self.split]

    def example(self, index: int) -> Example:
        """The example at ``index``; the kinds of problem take turns."""
        return _problems(*self._drawn)[index]

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        """Right when the answer's final number equals the gold one."""
        return grade_number(answer, example.answer)

    def expert(self, example: Example) -> list[Message]:
        """One calculator call a step, then the answer in one sentence."""
        conversation = []
        for expression, result in example.metadata["steps"]:
            conversation.append(assistant("", [ToolCall("calculator", {"expression": expression})]))
            conversation.append(tool_message("calculator", result))
        return [*conversation, assistant(f"The answer is {example.answer}.")]


def split_of(example_id: str) -> str:
    """The one split that a problem may appear in: a tenth each are for validation and for test."""
    bucket = int(example_id.rpartition("-")[2], 16) % 10
    return ("test", "validation")[bucket] if bucket < 2 else "train"


@lru_cache(maxsize=8)
def _problems(split: str, levels: tuple[int, ...], seed: int) -> Drawn[Example]:
    """Tasks of the same coordinates share their problems; a task itself holds none, so it is small to copy."""
    return Drawn(_draw_all(split, levels, seed))


def _draw_all(split: str, levels: tuple[int, ...], seed: int) -> Iterator[Example]:
    """The problems of a split without end, none twice; the kinds take turns."""
    kinds = [kind for kind in KINDS if len(kind.operators) in levels]
    rng = random.Random(f"arithmetic {Arithmetic.version} {split} {levels} {seed}")
    seen: set[str] = set()
    while True:
        example = _draw(kinds[len(seen) % len(kinds)], rng)
        if split_of(example.id) == split and example.id not in seen:
            seen.add(example.id)
            yield example


def _draw(kind: Kind, rng: random.Random) -> Example:
    """A problem of this kind, with operands drawn anew until every step gives a positive whole number."""
    while (steps := _solve(kind, operands := [rng.randint(*bounds) for bounds in kind.ranges])) is None:
        pass
    name, friend = rng.sample(NAMES, 2)
    values = dict(zip("abcd", operands, strict=False), name=name, friend=friend, things=rng.choice(THINGS))
    question = kind.text.format(**values)
    digest = hashlib.blake2b(question.encode(), digest_size=6).hexdigest()
    return Example(
        id=f"{kind.name}-{digest}",
        messages=(user(question),),
        answer=steps[-1][1],
        difficulty=len(kind.operators),
        metadata={"kind": kind.name, "steps": steps},
    )


def _solve(kind: Kind, operands: Sequence[int]) -> list[tuple[str, str]] | None:
    """(expression, result) of each step; None when a step leaves the whole numbers from 1 to ``LARGEST``."""
    steps = []
    value = operands[0]
    for symbol, operand in zip(kind.operators, operands[1:], strict=True):
        if symbol == "/" and value % operand:
            return None
        expression = f"{value}{symbol}{operand}"
        value = OPERATORS[symbol](value, operand)
        if not 1 <= value <= LARGEST:
            return None
        steps.append((expression, str(value)))
    return steps
