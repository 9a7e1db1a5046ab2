"""What a task is: numbered examples, a grader, and (where one exists) an expert to learn from.

Worked example, a task of one's own in ten lines::

    @register_task("double")
    class Double(Task):
        version = "1"
        tools = ("calculator",)
        splits = ("train", "test")

        def __len__(self) -> int:
            return 100

        def example(self, index: int) -> Example:
            question = user(f"What is {index} times 2?")
            return Example(id=str(index), messages=(question,), answer=str(index * 2))

        def grade(self, example, answer, turns=()):
            return grade_number(answer, example.answer)

Test it alone: ``pytest tests/tasks/test_base.py``
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from opd_env.errors import unknown
from opd_env.messages import Message

if TYPE_CHECKING:
    from opd_env.tools import Tool


@dataclass(frozen=True)
class Example:
    """One problem. A pure function of (task, version, split, index)."""

    id: str
    """Stable and unique within the split; results are paired and resumed by it."""
    messages: tuple[Message, ...]
    """The opening messages: an optional system message, then the user's."""
    answer: str
    """The gold answer, as the grader reads it. Never shown to the student."""
    difficulty: int = 0
    """Level within the task, for reports per difficulty and for curricula."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that the grader or a report needs (JSON values)."""


@dataclass(frozen=True)
class Grade:
    """A verdict on one final answer."""

    correct: bool
    extracted: str | None = None
    """What the grader read out of the answer; None when it found nothing."""
    reason: str = ""
    """One sentence on why the answer is wrong; empty when it is right."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by name, such as ``strict`` and ``flexible``."""


class Task(ABC, Sequence[Example]):
    """Examples of one split, and how to grade an answer to them."""

    name: str = ""
    """The name that it is registered under."""
    version: ClassVar[str]
    """Changes whenever an example's text, answer or grade would."""
    tools: Sequence[str | Tool] = ()
    """What the student may call unless the user says otherwise: registered names, or the task's own tools."""
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    licence: ClassVar[str] = "unknown"
    """Of the problems, as SPDX writes it."""
    redistributable: ClassVar[bool] = True
    train_splits: ClassVar[tuple[str, ...]] = ("train",)
    """Splits that may be trained on. Training on any other is refused."""
    ordered: ClassVar[bool] = False
    """Training takes the examples in the order of their numbers, pass after pass, instead of shuffling them."""

    def __init__(self, split: str = "train") -> None:
        if split not in self.splits:
            raise ValueError(unknown(f"split of {type(self).__name__}", split, self.splits))
        self.split = split

    @property
    def train_allowed(self) -> bool:
        """Whether this split may be trained on."""
        return self.split in self.train_splits

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def example(self, index: int) -> Example:
        """The example at ``index``, which lies in ``range(len(self))``."""

    def tools_of(self, example: Example) -> Sequence[str | Tool]:
        """What the student may call on this example: ``tools``, unless each example brings its own."""
        return self.tools

    @abstractmethod
    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        """Judges the student's final answer.

        Args:
            example: the problem.
            answer: text of the final assistant turn; None when the episode ended without one.
            turns: the student's own messages of the episode, and where the user spoke again (``next_user``)
                those messages between them. Tool output is not among them: a grader that could read it would
                credit a number that the student never wrote.
        """

    def next_user(self, example: Example, turns: Sequence[Message]) -> Message | None:
        """What the user says after a turn without a call; None ends the episode, which is what most tasks do.

        Args:
            example: the problem.
            turns: as for ``grade``, up to now. How often the user spoke again is the number of user messages.
        """
        return None

    def expert(self, example: Example) -> list[Message] | None:
        """The rest of a correct conversation: assistant turns with tool calls, the tool results that they
        must get, the final answer. None when the task has no expert. Callers play it through the real tools
        and keep it only if every tool answers as expected and the grade is correct.
        """
        return None

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.example(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name or type(self).__name__} has {len(self)} examples, no number {index}")
        return self.example(index % len(self))

    def __iter__(self) -> Iterator[Example]:
        return (self.example(i) for i in range(len(self)))


def prompt_hash(task: Task) -> str:
    """Tells whether two tasks ask alike: a hash of the first example's messages and of the tools' schemas.

    It knows no tokenizer and no chat template; what a model read is hashed in the results of an evaluation.
    """
    from opd_env.tools import Toolbox

    example = task.example(0)
    with Toolbox(task.tools_of(example)) as toolbox:
        prompt = json.dumps([example.messages, toolbox.schemas], sort_keys=True)
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def require_trainable(task: Task) -> None:
    """Refuses to train on a split that is there to measure with.

    Raises:
        ValueError: the task's split is not one of its ``train_splits``.
    """
    if not task.train_allowed:
        allowed = ", ".join(repr(split) for split in task.train_splits)
        raise ValueError(
            f"split {task.split!r} of task {task.name or type(task).__name__!r} is for evaluation only; "
            + (f"train on {allowed} instead" if allowed else "nothing of this task may be trained on")
        )
