"""A teacher that has seen worked examples: self-distillation with a privileged context.

The teacher reads ``demonstration 1, demonstration 2, …, the student's question`` as one conversation, then the
student's own turns, token for token. Demonstrations are expert episodes of the task, played through the real
tools::

    chat = DemonstrationFormat(get_format(tokenizer), play_demonstrations(task, get_format(tokenizer), count=2))
    teacher = LocalTeacher(load_model("smollm2"), vocab_size=chat.vocab_size, prompt=TaskPrompts([task], chat))

Test it alone: ``pytest tests/trainer/test_demonstrations.py``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from opd_env.expert import play_expert
from opd_env.formats import ChatFormat, ParsedTurn, Rendered
from opd_env.messages import Message
from opd_env.tasks import Example, Task
from opd_env.tools import Tool, Toolbox
from opd_env.trainer.batch import prompt_length
from opd_env.trajectory import Trajectory


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
        f"teacher_demonstrations={count} needs {count + 1} examples of task {task.name!r} with an expert whose calls "
        f"all work; there are {len(found)}"
    )


class DemonstrationFormat(ChatFormat):
    """A chat format whose prompts hold worked examples between the system message and the question.

    Args:
        chat: the format that it extends.
        demonstrations: as ``play_demonstrations`` gives them. All prompts have them in this order, so that their
            tokens can be cached; a question is never its own demonstration.

    Raises:
        ValueError: (from ``render_prompt``) the chat template rewrites a conversation when it grows.
    """

    name: ClassVar[str] = "demonstrations"

    def __init__(self, chat: ChatFormat, demonstrations: Sequence[tuple[Message, Trajectory]]) -> None:
        self.stop_token_ids = chat.stop_token_ids
        self.vocab_size = chat.vocab_size
        self._chat = chat
        self._demonstrations = list(demonstrations)

    @property
    def longest(self) -> int:
        """Upper bound on the tokens that the demonstrations add to a prompt."""
        return sum(len(played.token_ids) for _, played in self._demonstrations)

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """See ``ChatFormat``."""
        *opening, question = messages
        chosen = [entry for entry in self._demonstrations if entry[0]["content"] != question["content"]]
        chosen = chosen[: len(self._demonstrations) - 1]
        first = [*opening, chosen[0][0]]
        ids = self._chat.render_prompt(first, tools)
        following = [asked for asked, _ in chosen[1:]] + [question]
        for (_, played), asked in zip(chosen, following, strict=True):
            ids += played.token_ids[prompt_length(played) :].tolist()
            ids += self._chat.user_message(asked).ids
        return ids

    def user_message(self, message: Message) -> Rendered:
        """See ``ChatFormat``."""
        return self._chat.user_message(message)

    def render_assistant(self, message: Message) -> list[int]:
        """See ``ChatFormat``."""
        return self._chat.render_assistant(message)

    def tool_results(self, messages: Sequence[Message]) -> Rendered:
        """See ``ChatFormat``."""
        return self._chat.tool_results(messages)

    def parse(self, ids: Sequence[int]) -> ParsedTurn:
        """See ``ChatFormat``."""
        return self._chat.parse(ids)

    def parse_text(self, text: str) -> ParsedTurn:
        """See ``ChatFormat``."""
        return self._chat.parse_text(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``ChatFormat``."""
        return self._chat.decode(ids)


class TaskPrompts:
    """The prompt of a trajectory as another chat format writes it: what a teacher reads instead of the student's.

    Args:
        tasks: where the trajectories come from: the training task, and the one that is evaluated on.
        chat: writes the prompts.
        tools: as for the rollouts; when None, what the task offers for each example.
    """

    def __init__(self, tasks: Sequence[Task], chat: ChatFormat, tools: Sequence[str | Tool] | None = None) -> None:
        self._names = " and ".join(f"{task.name!r} ({task.split})" for task in tasks)
        self._chat = chat
        self._tools = tools
        # Two splits may use the same id for different questions.
        self._known: dict[tuple[str, str], tuple[Task, Example]] = {}
        self._rest: Iterator[tuple[Task, Example]] = ((task, example) for task in tasks for example in task)

    def __call__(self, trajectory: Trajectory) -> list[int]:
        """Token ids of the prompt.

        Raises:
            ValueError: the trajectory is not of these tasks.
        """
        key = (trajectory.example_id, trajectory.question)
        while key not in self._known:
            found = next(self._rest, None)
            if found is None:
                raise ValueError(f"task {self._names} has no example {trajectory.example_id!r} with this question")
            self._known[found[1].id, found[1].messages[-1]["content"]] = found
        task, example = self._known[key]
        with Toolbox(task.tools_of(example) if self._tools is None else self._tools) as toolbox:
            return self._chat.render_prompt(example.messages, toolbox.schemas)
