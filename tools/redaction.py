"""Keeps secrets of a tool from the student, the trajectories and the log.

Worked example::

    @tool(secrets=["SHOP_KEY"])
    def price(item: str) -> str: ...                    # uses os.environ["SHOP_KEY"]

    Toolbox([price])                                    # SecretMissing, if the variable is not set
    redact("key=s3cret-key", secrets_of(price))         # 'key=[secret]'

What is covered: each value as it is, as JSON writes it, and as a URL does, in whatever a tool returns or raises and in
the traceback that goes to the log. It is taken out before anything is cut, so that no part of it is left.

What is not covered: a value that the tool itself has changed (encoded as base64, split, reversed), and what it writes
somewhere else.

Test it alone: ``pytest tests/tools/test_redaction.py``
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus

from opd_env.errors import UserError

if TYPE_CHECKING:
    from opd_env.tools.base import Tool

MIN_SECRET_CHARS = 6
"""Shorter values would be taken out of ordinary text."""


class SecretMissing(UserError):
    """A tool's environment variable is not set, or too short to be a secret."""


def secret_values(names: Sequence[str], needed_by: str) -> dict[str, str]:
    """The values of environment variables.

    Args:
        names: of the variables.
        needed_by: for the error, such as ``"tool 'price'"``.

    Raises:
        SecretMissing: a variable is not set, or its value has fewer than ``MIN_SECRET_CHARS`` characters.
    """
    values = {name: os.environ.get(name, "").strip() for name in names}
    for name, value in values.items():
        if len(value) < MIN_SECRET_CHARS:
            found = f"has {len(value)} characters" if value else "is not set"
            raise SecretMissing(
                f"{needed_by} needs the environment variable {name} with at least {MIN_SECRET_CHARS} characters; "
                f"it {found}"
            )
    return values


def secrets_of(tool: Tool) -> list[str]:
    """Everything to take out for a tool.

    Raises:
        SecretMissing: see ``secret_values``.
    """
    return forms_of(secret_values(tool.secrets, f"tool {tool.name!r}").values()) if tool.secrets else []


def forms_of(values: Iterable[str]) -> list[str]:
    """Each value in all the ways in which it is recognised, the longest first."""
    forms: set[str] = set()
    for value in values:
        written = (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1])
        forms.update((value, *written, quote(value), quote(value, safe=""), quote_plus(value)))
    return sorted(forms, key=len, reverse=True)


def redact(text: str, secrets: Sequence[str]) -> str:
    """The text with ``[secret]`` in place of each of the secrets."""
    for secret in secrets:
        text = text.replace(secret, "[secret]")
    return text
