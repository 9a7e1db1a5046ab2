"""Questions about countries that need a search tool and then the calculator, with the expert's tool calls.

One problem, and the expert's conversation about it::

    user       By how many square kilometres is the land area of Alirand larger than that of Moreruna?
    assistant  search(query="population and land area of Alirand")
    tool       … Alirand has a population of 3464586 and a land area of 990663 square kilometres. …
    assistant  search(query="population and land area of Moreruna")
    tool       … Moreruna has a population of 273329172 and a land area of 564129 square kilometres. …
    assistant  calculator(expression="990663-564129")
    tool       426534
    assistant  The answer is 426534.

The world is closed: the task brings its own passages and a search tool over just these. Levels:

===== ============================================================ =================== ===============
level question                                                     searches            calculator calls
===== ============================================================ =================== ===============
1     a country's population, land area, or people per km²         1                   0 or 1
2     two countries compared or added; one known by its capital    2                   1
3     two countries known by their capitals; a country's neighbours 4; 1 + neighbours  1
===== ============================================================ =================== ===============

A country belongs to one split by a hash of its name (``split_of``) and is asked about in that split only.
With ``world="fictional"`` each split has a world of its own on top, so a model cannot know a test passage.

Test it alone: ``pytest tests/tasks/countries/test_country_search.py``
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import cached_property
from itertools import islice, zip_longest

from opd_env.messages import Message, ToolCall, assistant, tool_message, user
from opd_env.tasks.base import Example, Grade, Task
from opd_env.tasks.countries.questions import LEVELS, all_questions, fictional_world, passages, real_world
from opd_env.tasks.data.splits import SPLITS
from opd_env.tasks.graders.answers import grade_number
from opd_env.tasks.registry import register_task
from opd_env.tools import Toolbox
from opd_env.tools.builtin.search import make_search_tool

SIZES = {"train": 4_000, "validation": 500, "test": 500}
"""At most so many examples a split; fewer where the world holds no more different questions of these levels."""
WORLDS = ("fictional", "real")


@register_task("country_search")
class CountrySearch(Task):
    """Search and arithmetic over a closed world, a pure function of (version, world, split, seed, levels, index).

    Args:
        split: ``train``, ``validation`` or ``test``.
        world: ``fictional`` (made up from the seed) or ``real`` (needs the extra ``countries``).
        levels: which levels of difficulty, out of 1, 2 and 3; see the top of this module.
        seed: another seed gives another fictional world, and another choice of questions.

    Raises:
        ValueError: there is no such split, world or level.
        ImportError: the real world was asked for and ``countryinfo`` is not installed.
    """

    version = "1"
    licence = "Apache-2.0"
    splits = SPLITS

    def __init__(
        self,
        split: str = "train",
        *,
        world: str = "fictional",
        levels: Sequence[int] = (1, 2, 3),
        seed: int = 0,
    ) -> None:
        super().__init__(split)
        if world not in WORLDS:
            raise ValueError(f"world={world!r}: expected {' or '.join(map(repr, WORLDS))}")
        known = sorted(set(LEVELS.values()))
        if not isinstance(levels, Sequence) or not levels or any(level not in known for level in levels):
            raise ValueError(f"levels={levels!r}: expected a list of some of {known}")
        countries = real_world() if world == "real" else fictional_world(seed, split)
        rng = random.Random(f"country_search {self.version} {world} {split} {seed}")
        kinds = all_questions(countries, split, rng)
        chosen = [questions for kind, questions in kinds.items() if LEVELS[kind] in levels]
        taking_turns = (question for turn in zip_longest(*chosen) for question in turn if question is not None)
        self._questions = tuple(islice(taking_turns, SIZES[split]))
        self.tools = (make_search_tool(passages(countries)), "calculator")

    def __len__(self) -> int:
        return len(self._questions)

    def example(self, index: int) -> Example:
        """The example at ``index``; the kinds of question take turns."""
        question = self._questions[index]
        digest = hashlib.blake2b(question.text.encode(), digest_size=6).hexdigest()
        return Example(
            id=f"{question.kind}-{digest}",
            messages=(user(question.text),),
            answer=question.answer,
            difficulty=question.level,
            metadata={
                "kind": question.kind,
                "searches": [list(search) for search in question.searches],
                "expression": question.expression,
            },
        )

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        """Right when the answer's final number equals the gold one."""
        return grade_number(answer, example.answer)

    def expert(self, example: Example) -> list[Message]:
        """One call a turn: the searches, the calculator where there is something to compute, the answer."""
        calls = [ToolCall("search", {"query": query}) for query, _ in example.metadata["searches"]]
        if example.metadata["expression"] is not None:
            calls.append(ToolCall("calculator", {"expression": example.metadata["expression"]}))
        conversation = []
        for call in calls:
            result = self._toolbox.call(call.name, call.arguments)
            conversation += [assistant("", [call]), tool_message(call.name, result.content)]
        return [*conversation, assistant(f"The answer is {example.answer}.")]

    @cached_property
    def _toolbox(self) -> Toolbox:
        return Toolbox(self.tools)
