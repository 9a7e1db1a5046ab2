"""What one process does for all, or each for itself, and what they then all know.

Worked example::

    on_main(accelerator, lambda: checkpoints.save(step, files))      # every process calls it
    on_each(lambda: probe_vllm(engine, chat, model))                 # so does this

A bare barrier would leave the others waiting, for as long as the time-out of a collective, when the one that works
raises; here all of them learn how it went and end together.

Test it alone: ``pytest tests/trainer/run/test_processes.py``
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils import gather_object

from opd_env.errors import TrainingError

Result = TypeVar("Result")


class AnotherFailed(TrainingError):
    """Another process failed at what it does for all, or beside this one, which ends with it."""


def on_main(accelerator: Any, function: Callable[[], Result]) -> Result:
    """Calls ``function`` in the main process; returns what it returned, in every process.

    Args:
        accelerator: of ``accelerate``; every process calls this at the same point.
        function: its result can be pickled.

    Raises:
        AnotherFailed: it failed in the main process, which raises the error itself.
    """
    return on_each(lambda: function() if accelerator.is_main_process else None)[0]  # type: ignore[return-value]


def on_each(function: Callable[[], Result]) -> list[Result]:
    """Calls ``function`` in every process; returns what it returned in each of them, in every process.

    Args:
        function: its result can be pickled.

    Raises:
        AnotherFailed: it failed in another process; where it failed, the error itself.
    """
    outcome: tuple[Any, str] = None, ""
    error = None
    try:
        outcome = function(), ""
    except Exception as raised:
        error, outcome = raised, (None, f"{type(raised).__name__}: {raised}")
    everyone: list[tuple[Result, str]] = gather_object([outcome])
    if error is not None:
        raise error
    for number, (_, failure) in enumerate(everyone):
        if failure:
            raise AnotherFailed(f"{f'process {number}' if number else 'the main process'} failed: {failure}")
    return [result for result, _ in everyone]
