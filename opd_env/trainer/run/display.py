"""Progress of a run for people: a bar in a terminal, a line now and then in a log file.

Test it alone: ``pytest tests/trainer/run/test_display.py``
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINES = 20
"""Lines that a run writes into a log file."""


def shown_of(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What is shown of a step."""
    shown = {"KL": f"{metrics['teacher/kl']:.3f}", "accuracy": f"{metrics['rollout/accuracy']:.2f}"}
    return shown | {"tok/s": f"{metrics['tokens_per_s']:,.0f}", "s/step": f"{metrics['time/step_s']:.2f}"}


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
            TimeRemainingColumn(),
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

    def phase(self, name: str, total: int, done: int = 0) -> Callable[[int, Mapping[str, Any] | None], None]:
        """Starts a bar; returns a function that is told how much is done, and numbers to show."""
        task = self._progress.add_task(name, total=total, completed=done, details="")
        started = time.perf_counter()
        first, every = done, max(1, total // _LINES)

        def advance(finished: int, numbers: Mapping[str, Any] | None = None) -> None:
            details = "  ".join(f"{label} {value}" for label, value in (numbers or {}).items())
            self._progress.update(task, completed=finished, details=details, visible=finished < total)
            if self._enabled and not self._live and numbers and (finished % every == 0 or finished == total):
                passed = time.perf_counter() - started
                left = passed / max(1, finished - first) * (total - finished)
                self.say(f"{name} {finished}/{total}  {details}  {left:.0f} s left")

        return advance
