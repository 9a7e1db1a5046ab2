"""Errors that a user can mend, and the words for an unknown name.

The command line shows the sentence of such an error instead of a traceback. ``ValueError`` (settings, names, data),
``OSError`` (files, disk, network) and ``ImportError`` (extras) say enough by themselves; what fits none of them is a
``UserError``.

Test it alone: ``pytest tests/cli/test_cli.py``
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(RuntimeError):
    """Its text is one sentence: what is wrong, and what to do."""


class TrainingError(UserError):
    """Training cannot go on; the message says why and what to change."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The end of an error about an unknown name: ``" (did you mean 'query'?)"``, or nothing when none is
    close."""
    close = difflib.get_close_matches(name[:100], list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The error about an unknown name: ``"no task is named 'duoble' (did you mean 'double'?); known: …"``."""
    names = list(known)
    return f"no {kind} is named {name!r}{did_you_mean(name, names)}; known: {', '.join(names) or 'none'}"
