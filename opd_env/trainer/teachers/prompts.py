"""A teacher that has seen worked examples, or the answer: self-distillation with a privileged context.

The teacher reads ``demonstration 1, demonstration 2, …, the student's question`` as one conversation, then the
student's own turns, token for token. Demonstrations are expert episodes of the task, played through the real
tools::

    chat = DemonstrationFormat(get_format(tokenizer), play_demonstrations(task, get_format(tokenizer), count=2))
    prompts = TaskPrompts(ExampleFinder([task]), chat, answer=True)         # … and the gold answer
    teacher = LocalTeacher(load_model("smollm2"), vocab_size=chat.vocab_size, prompt=prompts)

Test it alone: ``pytest tests/trainer/teachers/test_prompts.py``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from opd_env.episode.expert import play_expert
from opd_env.episode.record import exchanges_of
from opd_env.episode.trajectory import Trajectory
from opd_env.formats import ChatFormat, ParsedTurn, Rendered
from opd_env.formats.base import Exchange
from opd_env.messages import Message, user
from opd_env.tasks import Example, Task
from opd_env.tools import Tool, Toolbox


class ExampleFinder:
    """Which example of which task a trajectory was played on, found by its id and question (two splits may use one
    id for different questions).

    Args:
        tasks: where the trajectories come from: the training task, and the one that is evaluated on. They are read
            only as far as a search has to go.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._names = " and ".join(f"{task.name!r} ({task.split})" for task in tasks)
        self._known: dict[tuple[str, str], tuple[Task, Example]] = {}
        self._rest: Iterator[tuple[Task, Example]] = ((task, example) for task in tasks for example in task)

    def __call__(self, trajectory: Trajectory) -> tuple[Task, Example]:
        """The task and the example; a ``ValueError`` if the trajectory is not of these tasks."""
        key = (trajectory.example_id, trajectory.question)
        while key not in self._known:
            found = next(self._rest, None)
            if found is None:
                raise ValueError(f"task {self._names} has no example {trajectory.example_id!r} with this question")
            self._known[found[1].id, found[1].messages[-1]["content"]] = found
        return self._known[key]


def play_demonstrations(
    task: Task, chat: ChatFormat, *, count: int, tools: Sequence[str | Tool] | None = None, seed: int = 0
) -> list[tuple[Message, Trajectory]]:
    """Questions and expert episodes of ``count + 1`` examples (one to spare for an example that is one itself).

    Raises:
        ValueError: too few examples have an expert whose calls all work.
    """
    found: list[tuple[Message, Trajectory]] = []
    for index in np.random.default_rng(seed).permutation(len(task)).tolist():
        trajectory = play_expert(task, index, chat, tools)
        if trajectory is not None:
            found.append((task[index].messages[-1], trajectory))
        if len(found) > count:
            return found
    raise ValueError(
        f"teacher.demonstrations={count} needs {count + 1} examples of task {task.name!r} with an expert whose calls "
        f"all work; there are {len(found)}"
    )


class DemonstrationFormat(ChatFormat):
    """A chat format whose prompts hold worked examples between the system message and the question.

    Args:
        chat: the format that it extends.
        demonstrations: as ``play_demonstrations`` gives them. All prompts have them in this order, so that their
            tokens can be cached; a question is never its own demonstration.

    Raises:
        ValueError: (from ``render_prompt``) the chat template refuses their conversation.
    """

    name: ClassVar[str] = "demonstrations"

    def __init__(self, chat: ChatFormat, demonstrations: Sequence[tuple[Message, Trajectory]]) -> None:
        self.stop_token_ids = chat.stop_token_ids
        self.vocab_size = chat.vocab_size
        self.repair = chat.repair
        self.not_append_only = chat.not_append_only
        self._chat = chat
        self._demonstrations = list(demonstrations)

    @property
    def longest(self) -> int:
        """Upper bound on the tokens that the demonstrations add to a prompt."""
        return sum(len(played.token_ids) for _, played in self._demonstrations)

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        ids = self.render_conversation(messages, (), tools)
        if ids is None:
            raise ValueError("the chat template refuses the conversation of the demonstrations; leave them out")
        return ids

    def render_conversation(
        self, messages: Sequence[Message], exchanges: Sequence[Exchange], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int] | None:
        # The demonstrations are the first turns of the conversation.
        *opening, question = messages
        chosen = [entry for entry in self._demonstrations if entry[0]["content"] != question["content"]]
        chosen = chosen[: len(self._demonstrations) - 1]
        shown: list[Exchange] = []
        following = [asked for asked, _ in chosen[1:]] + [question]
        for (_, played), asked in zip(chosen, following, strict=True):
            *turns, (answer, _) = exchanges_of(played.token_ids.tolist(), played.turns)
            shown += [*turns, (answer, [asked])]
        return self._chat.render_conversation([*opening, chosen[0][0]], [*shown, *exchanges], tools)

    def user_message(self, message: Message) -> Rendered:
        return self._chat.user_message(message)

    def render_assistant(self, message: Message) -> list[int]:
        return self._chat.render_assistant(message)

    def tool_results(self, messages: Sequence[Message]) -> Rendered:
        return self._chat.tool_results(messages)

    def parse(self, ids: Sequence[int]) -> ParsedTurn:
        return self._chat.parse(ids)

    def parse_text(self, text: str) -> ParsedTurn:
        return self._chat.parse_text(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._chat.decode(ids)


class TaskPrompts:
    """What a teacher reads before each row's turns instead of the student's prompt: self-distillation with more to see.

    Args:
        find: gives the example of a trajectory.
        chat: writes the prompts, with demonstrations perhaps.
        tools: as for the rollouts; when None, what the task offers for each example.
        answer: also tells the gold answer, at the end of the question (as "Self-Distilled Reasoner", Zhao et al. 2026,
            shows the teacher a reference solution).
    """

    def __init__(
        self,
        find: ExampleFinder,
        chat: ChatFormat,
        tools: Sequence[str | Tool] | None = None,
        *,
        answer: bool = False,
    ) -> None:
        self._find = find
        self._chat = chat
        self._tools = tools
        self._answer = answer

    def __call__(self, trajectory: Trajectory) -> list[list[int]]:
        """Token ids for each row (``base.Prompt``); a ``ValueError`` if ``find`` or ``with_answer`` refuses."""
        task, example = self._find(trajectory)
        ids = trajectory.token_ids.tolist()
        before = [[turn for turn in trajectory.turns if turn.start < start] for start in trajectory.row_starts]
        return [self.render(task, example, exchanges_of(ids, turns)) for turns in before]

    def render(self, task: Task, example: Example, exchanges: Sequence[Exchange] = ()) -> list[int]:
        """Token ids of an example's prompt, or of that of a later turn."""
        messages = with_answer(task, example) if self._answer else example.messages
        with Toolbox(task.tools_of(example) if self._tools is None else self._tools) as toolbox:
            ids = self._chat.render_conversation(messages, exchanges, toolbox.schemas)
        if ids is None:
            raise ValueError(
                f"the chat template refuses the conversation of example {example.id!r} of task {task.name!r} with what "
                "the teacher is told; leave out teacher.demonstrations and teacher.sees_answer"
            )
        return ids


def with_answer(task: Task, example: Example) -> tuple[Message, ...]:
    """The example's messages, with the gold answer at the end of the question; a ``ValueError`` without an answer."""
    if not example.answer:
        raise ValueError(
            f"teacher.sees_answer: example {example.id!r} of task {task.name!r} has no gold answer; leave it out"
        )
    *opening, question = example.messages
    told = f"{question['content']}\n\n(The correct answer is {example.answer}. Work it out all the same.)"
    return (*opening, user(told))
