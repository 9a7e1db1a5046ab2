"""A state that several tools share within an episode.

Worked example::

    basket = Shared(list)

    @tool(state=basket, mutates_state=True)
    def add(item: str, state: list[str]) -> str: ...

    @tool(state=basket)
    def show(state: list[str]) -> list[str]: ...

Each episode has one list, which ``add`` and ``show`` both see. ``state=list`` on both would give each tool a list of
its own: two tools that name one class need not mean the same thing by it.

Test it alone: ``pytest tests/tools/test_shared_state.py``
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Shared:
    """Makes what all tools that name this very object get: once for each episode, at the first call of any of them.

    It goes wherever a factory does (``state=``, ``Injected``), and not with ``isolation="process"``: no two processes
    have one object. Tools of a toolbox that share anything have one event loop, and lose together all that they were
    given when a call of one of them is ended by its time limit.
    """

    make: Callable[[], Any]
    """May be ``async``; a ``close()`` of what it makes is called when the episode ends."""

    def __call__(self) -> Any:
        """Makes one, as the kit does."""
        return self.make()
