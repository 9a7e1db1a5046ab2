"""Progress of a command for people: a bar in a terminal, a line now and then in a log file.

Worked example::

    with Display() as display:
        advance = display.phase("training", steps)
        advance(1, {"KL": "0.5"})                       # training ━━━ 1/100 KL 0.5  0:00:12 left
        meter = display.episodes("arithmetic (test)")
        evaluate(task, engine, chat, progress=meter.advance, on_finished=meter.count)

Test it alone: ``pytest tests/report/test_display.py``
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

if TYPE_CHECKING:
    from opd_env.episode.trajectory import Trajectory

_LINES = 20
"""Lines that a phase writes into a log file."""


class Display:
    """Shows one phase at a time. Silent on all processes but the first.

    Args:
        console: where to; standard error by default.
        enabled: False shows nothing but warnings.
    """

    def __init__(self, console: Console | None = None, *, enabled: bool = True) -> None:
        self.console = console or Console(stderr=True)
        self._enabled = enabled
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[details]}"),
            console=self.console,
            transient=True,
        )
        self._live = enabled and self.console.is_terminal

    def __enter__(self) -> Display:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()

    def say(self, text: str) -> None:
        """One line."""
        if self._enabled:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line that must be seen, whatever the process."""
        self.console.print(f"warning: {text}", highlight=False, markup=False, soft_wrap=True, style="yellow")

    def phase(self, name: str, total: int | None = None, done: int = 0) -> Callable[..., None]:
        """Starts a bar; returns ``advance(finished, numbers=None, of=total)``, to be called after every piece of work.

        ``numbers`` are shown beside the bar. Without them a log file gets no line.
        """
        task = self._progress.add_task(name, total=total, completed=done, details="")
        started = time.perf_counter()
        first: int | None = None

        def advance(finished: int, numbers: Mapping[str, str] | None = None, of: int = total or 0) -> None:
            nonlocal first
            if first is None:
                first = finished - 1  # what an earlier run has done took none of this one's time
            left = (of - finished) * (time.perf_counter() - started) / max(1, finished - first)
            clock = f"{left // 3600:.0f}:{left % 3600 // 60:02.0f}:{left % 60:02.0f} left"
            details = "  ".join([*(f"{label} {value}".strip() for label, value in (numbers or {}).items()), clock])
            self._progress.update(task, completed=finished, total=of, details=details, visible=finished < of)
            if not self._live and numbers and (finished % max(1, of // _LINES) == 0 or finished == of):
                self.say(f"{name} {finished}/{of}  {details}")

        return advance

    def episodes(self, name: str) -> EpisodeMeter:
        """A phase that plays episodes."""
        return EpisodeMeter(self.phase(name))


class EpisodeMeter:
    """Tells how fast episodes are played."""

    def __init__(self, advance: Callable[..., None]) -> None:
        self._advance = advance
        self._started = time.perf_counter()
        self._played = self._tokens = 0

    def count(self, trajectory: Trajectory) -> None:
        """Takes note of an episode that is over."""
        self._played += 1
        self._tokens += trajectory.num_sampled

    def advance(self, done: int, total: int) -> None:
        """Moves the bar; episodes of an earlier run are among ``done``."""
        seconds = time.perf_counter() - self._started
        # A chat server tells no tokens.
        tokens, episodes = f"{self._tokens / seconds:,.0f} tokens/s", f"{60 * self._played / seconds:.1f} per minute"
        self._advance(done, {"": tokens if self._tokens else episodes}, total)
