"""The bar of a command that plays episodes: how many, how fast, how long still.

Worked example::

    with progress_of("arithmetic (test)") as meter:
        evaluate(task, engine, chat, progress=meter.advance, on_finished=meter.count)

Test it alone: ``pytest tests/cli/test_cli.py``
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from opd_env.episode.trajectory import Trajectory


@dataclass
class Meter:
    """What the bar tells: sampled tokens per second, and the time left at the pace of this run."""

    bar: Progress
    task: TaskID
    started: float = field(default_factory=time.perf_counter)
    played: int = 0
    tokens: int = 0

    def count(self, trajectory: Trajectory) -> None:
        """Takes note of an episode that is over."""
        self.played += 1
        self.tokens += trajectory.num_sampled

    def advance(self, done: int, total: int) -> None:
        """Moves the bar; episodes of an earlier run are among ``done``."""
        seconds = time.perf_counter() - self.started
        left = (total - done) * seconds / max(1, self.played)
        speed = (
            f"{self.tokens / seconds:,.0f} tokens/s" if self.tokens else f"{60 * self.played / seconds:.1f} per minute"
        )
        clock = f"{left // 3600:.0f}:{left % 3600 // 60:02.0f}:{left % 60:02.0f} left"
        self.bar.update(self.task, completed=done, total=total, speed=f"{speed}, {clock}")


@contextmanager
def progress_of(label: str) -> Iterator[Meter]:
    """A bar on stderr that is gone afterwards."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    with Progress(
        *columns, TextColumn("{task.fields[speed]}"), console=Console(stderr=True), transient=True
    ) as progress:
        yield Meter(progress, progress.add_task(label, total=None, speed=""))
