r"""Reads what a program left behind, output and files, without trusting anything about it.

Output becomes text that a model can be shown. The working folder is read by the trainer through a descriptor, when
the program has ended or is frozen: plain files only, opened without following links, and no more than the limits say.
What is left out is named, never silently lost.

Worked example::

    clean_output(b"<object object at 0x7f12>\x1b[31m\xff")      # '<object object at 0x...>[31m\\xff'
    left = read_folder(os.open("/tmp/x", os.O_RDONLY), given={"in.csv": b"1"}, limits=Limits())
    left.files                      # {'plot.csv': b'x,y\n1,2\n'}: written, or changed
    left.omitted                    # ("out: a folder", "'a\\nb': its name is no plain text")

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_output.py tests/tools/sandbox/test_sandbox_files.py``
"""

from __future__ import annotations

import errno
import os
import re
import select
import stat
import time
from collections.abc import Mapping
from typing import NamedTuple

from opd_env.tools.sandbox.base import Limits

_MAX_NAMED = 20
"""Files that are named among those left out; the others are counted."""
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


class WrittenFiles(NamedTuple):
    """What was left in a folder."""

    files: Mapping[str, bytes]
    """Content by name: what the program wrote or changed."""
    omitted: tuple[str, ...]
    """What else is there, and why it was left out."""


NOTHING = WrittenFiles({}, ())


def read_folder(folder: int, given: Mapping[str, bytes], limits: Limits) -> WrittenFiles:
    """Reads the plain files of a folder, in the order of their names.

    Args:
        folder: a descriptor of the folder.
        given: what was put into it: left out if it is unchanged.
        limits: how many files and bytes are kept.
    """
    files: dict[str, bytes] = {}
    omitted: list[str] = []
    room = limits.kept_bytes
    for name in sorted(os.listdir(folder), key=os.fsencode):
        if len(files) == limits.kept_files:
            content: bytes | str = f"only {limits.kept_files} files are kept"
        elif name.isprintable():  # neither control characters nor bytes that are no UTF-8
            content = _read(folder, name, room)
        else:
            content = "its name is no plain text"
        if isinstance(content, str):
            shown = name if name.isprintable() else ascii(name)
            omitted.append(f"{shown[:100]}: {content}")
        elif given.get(name) != content:
            files[name] = content
            room -= len(content)
    if len(omitted) > _MAX_NAMED:
        omitted[_MAX_NAMED:] = [f"and {len(omitted) - _MAX_NAMED} more"]
    return WrittenFiles(files, tuple(omitted))


def _read(folder: int, name: str, room: int) -> bytes | str:
    """The content, or why it is not read."""
    try:
        # Not blocking: a named pipe without a writer would hold the trainer for ever.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(name, flags, dir_fd=folder)
    except OSError as error:  # a link, a socket, a device, or a mode that forbids it
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # our own trouble, not the program's
        return f"it cannot be opened ({error.strerror})"
    try:
        info = os.fstat(descriptor)
        if stat.S_ISDIR(info.st_mode):
            return "a folder"
        if not stat.S_ISREG(info.st_mode):
            return "no plain file"
        if info.st_size > room:
            return f"{info.st_size} bytes, and {room} are left of what is kept"
        content = bytearray()
        # One byte more than there should be shows that it grew.
        while part := os.read(descriptor, info.st_size + 1 - len(content)):
            content += part
        return bytes(content) if len(content) == info.st_size else "it changed while it was read"
    finally:
        os.close(descriptor)
