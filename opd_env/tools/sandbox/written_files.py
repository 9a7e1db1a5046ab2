"""Reads what a program left in its working folder, without trusting anything about it.

The folder is read by the trainer through a descriptor, when the program has ended or is frozen: plain files only,
opened without following links, and no more than the limits say. What is left out is named, never silently lost.

Worked example::

    written = read_folder(os.open("/tmp/x", os.O_RDONLY), given={"in.csv": b"1"}, limits=Limits())
    written.files                   # {'plot.csv': b'x,y\\n1,2\\n'}: written, or changed
    written.omitted                 # ("out: a folder", "'a\\\\nb': its name is no plain text")

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_files.py``
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from opd_env.tools.sandbox.base import Limits

_MAX_NAMED = 20
"""Files that are named among those left out; the others are counted."""


@dataclass(frozen=True)
class WrittenFiles:
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
