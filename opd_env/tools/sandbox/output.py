r"""Turns the bytes that a program wrote into text that a model can be shown.

Worked example::

    clean_output(b"<object object at 0x7f12>\x1b[31m\xff")      # '<object object at 0x...>[31m\\xff'

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_output.py``
"""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Mapping

from opd_env.tools.sandbox.base import Level, Limits
from opd_env.tools.sandbox.guest.protocol import FILE_BYTES, FOLDER_BYTES

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
# C0 and C1 control characters but tab and newline, DEL, and what turns the direction of writing.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean_output(data: bytes) -> str:
    """Decodes output: total, and equal from run to run.

    Bytes that are no UTF-8 become ``\\xff``, ``\\r\\n`` becomes a newline, other control characters go,
    and addresses in representations of objects are rewritten to ``0x...``.
    """
    text = data.decode("utf-8", "backslashreplace").replace("\r\n", "\n")
    return _ADDRESS.sub(" at 0x...", _CONTROL.sub("", text))


def shorten(text: str, max_chars: int) -> str:
    """Cuts the middle out of a long text, and says so where it was cut."""
    if len(text) <= max_chars:
        return text
    head, tail = max_chars * 3 // 4, max_chars // 4
    marker = f"\n[... {len(text) - head - tail} characters cut ...]\n"
    return text[:head] + marker + text[-tail:]


class OutputReader:
    """Reads a pipe up to a cap; selectable. More than the cap is never held in memory.

    Args:
        descriptor: the pipe's read end, owned from now on.
        cap: bytes that are kept.
    """

    def __init__(self, descriptor: int, cap: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._cap = cap
        self._data = bytearray()
        self.full = False
        """More than the cap was written since the last :meth:`take`."""
        self.ended = False
        """Nobody holds the write end any more."""

    def fileno(self) -> int:
        """The pipe's descriptor, for poll and select."""
        return self._descriptor

    def read(self) -> bool:
        """Reads what is there now, at most once; says whether there was something."""
        if self.ended or self.full:
            return False
        try:
            part = os.read(self._descriptor, 65_536)
        except BlockingIOError:
            return False
        if not part:
            self.ended = True
            return False
        room = self._cap - len(self._data)
        self._data += part[:room]
        self.full = len(part) > room
        return True

    def wait(self, seconds: float) -> None:
        """Waits for output, and reads it."""
        if self.ended or self.full:
            time.sleep(min(seconds, 0.001))
        elif select.select([self._descriptor], [], [], seconds)[0]:
            self.read()

    def drain(self) -> None:
        """Reads all that was written so far."""
        while self.read():
            pass

    def take(self) -> tuple[str, bool]:
        """The text since the last call, and whether it was cut."""
        text, full = clean_output(bytes(self._data)), self.full
        self._data.clear()
        self.full = False
        return text, full

    def close(self) -> None:
        """Closes the pipe."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self.ended = True


def check_code(code: str, limits: Limits) -> bytes:
    """The code's bytes.

    Raises:
        ValueError: if it is longer than ``limits.code_bytes``.
    """
    source = code.encode("utf-8", "surrogatepass")
    if len(source) > limits.code_bytes:
        raise ValueError(f"the code has {len(source)} bytes; at most {limits.code_bytes} are accepted")
    return source


def check_folder(level: Level) -> None:
    """Raises ValueError if a level has no folder for files."""
    if level is Level.LANDLOCK:
        raise ValueError("level landlock has no folder for files to lie in; they need level namespaces")


def check_files(files: Mapping[str, bytes] | None) -> Mapping[str, bytes]:
    """The files of a call.

    Raises:
        ValueError: if a name is not a plain file name, or they are bigger than the folder has room for.
    """
    total = 0
    for name, content in (files or {}).items():
        total += len(content)
        if len(content) > FILE_BYTES or total > FOLDER_BYTES // 2:
            raise ValueError(
                f"files[{name!r}] has {len(content)} bytes, and with those before it {total}; "
                f"at most {FILE_BYTES} each and {FOLDER_BYTES // 2} together are accepted"
            )
        if name in ("", ".", "..") or "/" in name or "\0" in name or len(name.encode()) > 255:
            raise ValueError(f"files[{name!r}]: expected a plain file name without a folder")
    return files or {}
