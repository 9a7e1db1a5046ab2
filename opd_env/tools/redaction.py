"""Keeps secrets of a tool from the student, the trajectories and the log.

Worked example::

    @tool(secrets=["SHOP_KEY"])
    def price(item: str) -> str: ...                    # uses os.environ["SHOP_KEY"]

    Toolbox([price])                                    # SecretMissing, if the variable is not set
    redact("key=s3cret-key", secrets_of(price))         # 'key=[secret]'

What is covered: each value as it is, as JSON and ``repr`` write it, as a URL does, in base64 (alone or amid other
text, as in a Basic ``Authorization`` header) and in hexadecimal; of a value with several lines each line. That is taken
out of whatever a tool returns or raises and of the traceback that goes to the log, before anything is cut, so that no
part of it is left.

What is not covered: a value that the tool itself has split, cut, reversed, compressed or encrypted, and what it prints
or writes somewhere else.

Test it alone: ``pytest tests/tools/test_redaction.py``
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus

from opd_env.errors import UserError

if TYPE_CHECKING:
    from opd_env.tools.contract import Tool

MIN_SECRET_CHARS = 6
"""Shorter values would be taken out of ordinary text."""


class SecretMissing(UserError):
    """A tool's environment variable is not set, or too short to be a secret."""


def secret_values(names: Sequence[str], needed_by: str) -> dict[str, str]:
    """The values of environment variables; ``needed_by`` names in the error who needs them (``"tool 'price'"``).

    Raises:
        SecretMissing: a variable is not set, or its value has fewer than ``MIN_SECRET_CHARS`` characters.
    """
    values = {name: os.environ.get(name, "").strip() for name in names}
    for name, value in values.items():
        if len(value) < MIN_SECRET_CHARS:
            found = f"it has {len(value)} characters" if value else "it is not set"
            wanted = f"the environment variable {name} with at least {MIN_SECRET_CHARS} characters"
            raise SecretMissing(f"{needed_by} needs {wanted}; {found}")
    return values


def secrets_of(tool: Tool) -> list[str]:
    """Everything to take out for a tool; raises what ``secret_values`` raises."""
    return forms_of(secret_values(tool.secrets, f"tool {tool.name!r}").values()) if tool.secrets else []


def forms_of(values: Iterable[str]) -> list[str]:
    """Each value in all the ways in which it is recognised, the longest first."""
    forms: set[str] = set()
    for value in values:
        lines = [line.strip() for line in value.splitlines()]
        for text in (value, *(line for line in lines if len(line) >= MIN_SECRET_CHARS)):
            forms.update((text, *_written(text), *_encoded(text.encode(errors="surrogatepass"))))
    return sorted(forms, key=len, reverse=True)


def _written(text: str) -> Iterator[str]:
    yield json.dumps(text)[1:-1]
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield repr(text)[1:-1]
    for quoted in (*(quote(text, safe, errors="replace") for safe in ("/", "")), quote_plus(text, errors="replace")):
        yield quoted
        yield re.sub("%..", lambda code: code.group().lower(), quoted)


def _encoded(value: bytes) -> Iterator[str]:
    yield value.hex()
    yield value.hex().upper()
    for before in range(3):  # base64 turns three bytes into four characters, so what it makes depends on what precedes
        whole = base64.b64encode(bytes(before) + value)
        ends_within = -(before + len(value)) % 3  # the last characters depend on what follows
        own = whole[(0, 2, 3)[before] : len(whole) - (0, 2, 3)[ends_within]].decode()
        yield own
        yield own.translate(str.maketrans("+/", "-_"))


def redact(text: str, secrets: Sequence[str]) -> str:
    """The text with ``[secret]`` in place of each of the secrets."""
    for secret in secrets:
        text = text.replace(secret, "[secret]")
    return text


class RedactingFilter(logging.Filter):
    """Takes secrets out of what a library logs."""

    def __init__(self, secrets: Sequence[str]) -> None:
        super().__init__()
        self._secrets = secrets

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrites the record, its traceback included; keeps it."""
        try:
            message = record.getMessage()
        except Exception as error:  # the library's own arguments do not fit its text
            message = f"a record that cannot be shown: {type(error).__name__}"
        record.msg, record.args = redact(message, self._secrets), ()
        if record.exc_info:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)), self._secrets)
            record.exc_info = None
        return True

    @contextlib.contextmanager
    def on_loggers(self, *names: str) -> Iterator[None]:
        """Works on these loggers and all that exist below them (to which their filters do not apply by themselves)."""
        known = [name for name in logging.root.manager.loggerDict if name.startswith(tuple(f"{one}." for one in names))]
        loggers = [logging.getLogger(name) for name in (*names, *known)]
        for logger in loggers:
            logger.addFilter(self)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(self)
