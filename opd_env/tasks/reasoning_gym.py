"""Arithmetic, algebra and logic problems that ``reasoning-gym`` generates and scores (Apache-2.0).

One problem of the set ``chain_sum``::

    user       State the final answer to the following arithmetic problem: 4 + 3 =
               Put your final answer between <answer> and </answer>.
    right      … <answer>7</answer>

Needs the extra ``reasoning-gym``. ``SETS`` are sets that give the same problems in every process, in a few milliseconds
each, and whose scorer reads the answer as data: the integration and polynomial sets evaluate it as code.

Which split a problem belongs to is decided by a hash of its text. No split repeats a question.

Test it alone: ``pytest tests/tasks/test_reasoning_gym.py``
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

from opd_env.errors import unknown
from opd_env.messages import Message, user
from opd_env.tasks.base import Example, Grade, Task
from opd_env.tasks.data.splits import SPLITS, Drawn, split_of

SETS = (
    "aiw", "basic_arithmetic", "bitwise_arithmetic", "calendar_arithmetic", "chain_sum", "count_bits",
    "decimal_arithmetic", "decimal_chain_sum", "fraction_simplification", "gcd", "knights_knaves", "lcm",
    "leg_counting", "number_format", "power_function", "simple_equations", "syllogism",
)  # fmt: skip
SIZES = {"train": 2_000, "validation": 200, "test": 200}
"""Examples of each set."""
INSTRUCTION = "Put your final answer between <answer> and </answer>."
MAX_CHARS = 1_000
"""Longer answers are wrong."""
_answer = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def _version() -> str:
    try:
        return f"1 (reasoning-gym {installed_version('reasoning-gym')})"
    except PackageNotFoundError:
        return "1"


class ReasoningGym(Task):
    """Generated reasoning problems with the generator's own scorer; the sets take turns.

    Args:
        split: ``train``, ``validation`` or ``test``.
        sets: names out of ``SETS``.
        seed: another seed gives other problems of the same split.

    Raises:
        ImportError: ``reasoning-gym`` is not installed.
        ValueError: there is no such split or set, or none is named.
    """

    version = _version()
    licence = "Apache-2.0"
    tools = ("calculator",)
    splits = SPLITS

    def __init__(self, split: str = "train", *, sets: Sequence[str] = ("basic_arithmetic",), seed: int = 0) -> None:
        super().__init__(split)
        try:
            import reasoning_gym  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"task 'reasoning_gym' needs the package reasoning-gym ({error}); install it with: "
                "pip install 'opd-env[reasoning-gym]'"
            ) from error
        self.sets = (sets,) if isinstance(sets, str) else tuple(dict.fromkeys(sets))
        for name in self.sets:
            if name not in SETS:
                raise ValueError(unknown("set of reasoning_gym", name, SETS))
        if not self.sets:
            raise ValueError("sets is empty; name at least one, such as basic_arithmetic")
        self._seed = seed

    def __len__(self) -> int:
        return SIZES[self.split] * len(self.sets)

    def example(self, index: int) -> Example:
        """The example at ``index``; its category is the set."""
        name = self.sets[index % len(self.sets)]
        number, row = _rows(name, self.split, self._seed)[index // len(self.sets)]
        return Example(
            id=f"{name}-{self._seed}-{number}",
            messages=(user(f"{row['question']}\n{INSTRUCTION}"),),
            answer=str(row["answer"]),
            metadata={"category": name, "number": number},
        )

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        """Right when the generator's scorer gives what stands between the last tags full marks.

        Without tags it is the whole message. Part marks are among the scores only.
        """
        if answer is None:
            return Grade(correct=False, reason="the episode ended without a final answer")
        tagged = _answer.findall(answer)
        found = (tagged[-1] if tagged else answer).strip()
        if len(found) > MAX_CHARS:
            return Grade(correct=False, reason=f"the answer has more than {MAX_CHARS} characters")
        dataset = _dataset(example.metadata["category"], self._seed)
        try:
            score = float(dataset.score_answer(found, dataset[example.metadata["number"]]))
        except Exception as error:  # scorers convert without checking
            return Grade(correct=False, extracted=found, reason=f"not readable as an answer: {type(error).__name__}")
        correct = score >= 1.0
        reason = "" if correct else f"read {found[:80]}, expected {example.answer}"
        return Grade(correct=correct, extracted=found, reason=reason, scores={"part_marks": score})


@lru_cache(maxsize=64)
def _dataset(name: str, seed: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=seed, size=2**31 - 1)


@lru_cache(maxsize=64)
def _rows(name: str, split: str, seed: int) -> Drawn[tuple[int, Any]]:
    """The generator's number and row of every problem of a split."""

    def draw() -> Iterator[tuple[int, Any]]:
        dataset = _dataset(name, seed)
        seen: set[str] = set()
        for number in range(len(dataset)):
            row = dataset[number]
            if split_of(row["question"]) == split and row["question"] not in seen:
                seen.add(row["question"])
                yield number, row

    return Drawn(draw())
