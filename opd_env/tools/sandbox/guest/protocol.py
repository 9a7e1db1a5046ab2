"""What the supervisor and the slots say to each other: fixed-size records, and descriptors beside them.

Test it alone: ``pytest tests/tools/sandbox``
"""

from __future__ import annotations

import struct
from typing import NamedTuple

SPAWN = b"S"
"""Supervisor to zygote, with the slot's ends of two sockets (control, requests): make a slot."""
READY, FAILED = b"R", b"E"
"""Zygote or slot to supervisor: up; not up, followed by the reason as text."""
PIDFD = b"P"
"""Supervisor to slot: send the pidfd of the process that runs. The answer, and what a new slot says
of itself: the same, with the pidfd."""
FOLDER = b"F"
"""Supervisor to slot: send a descriptor of the working folder. The answer: the same, with it. From then on the slot
says HELD when the process that runs has ended, and waits for RELEASE before it empties the folder and reports."""
HELD, RELEASE = b"H", b"L"
KILL = struct.Struct("<cI")
"""Supervisor to slot: ``K``, and the number of the call that is to end."""

PROGRAM, SESSION = 0, 1
FILE_BYTES = 16 << 20
"""Most bytes of one file in the working folder."""
FOLDER_BYTES = 64 << 20
"""Of all files there."""


class Job(NamedTuple):
    """Supervisor to the process that waits in the slot: run this.

    The descriptors beside it: code or channel, output, [files].
    """

    kind: int
    """PROGRAM or SESSION."""
    seed: int
    cpu_s: int
    memory_bytes: int
    threads: int


JOB = struct.Struct("<BQIQI")
"""A job on its way."""


class Report(NamedTuple):
    """Slot to supervisor: what the kernel told about the process that is gone."""

    number: int
    """Of the call, counted from 1."""
    set_up: bool
    """It came as far as the code; if not, the fault is ours."""
    clean: bool
    """Nothing is left of it: no process, no file. If not, the slot must go."""
    wait_status: int
    cpu_us: int
    max_rss_kb: int


REPORT = struct.Struct("<I??iQQ")
"""A report on its way; no other message of a slot is as long."""

_FILE = struct.Struct("<HI")


def pack_files(files: dict[str, bytes]) -> bytes:
    """Names and contents, one after the other."""
    parts = []
    for name, content in files.items():
        encoded = name.encode()
        parts += [_FILE.pack(len(encoded), len(content)), encoded, content]
    return b"".join(parts)


def unpack_files(data: bytes) -> dict[str, bytes]:
    """The files of :func:`pack_files`."""
    files, position = {}, 0
    while position < len(data):
        name_length, length = _FILE.unpack_from(data, position)
        start = position + _FILE.size + name_length
        name = data[position + _FILE.size : start].decode()
        files[name] = data[start : start + length]
        position = start + length
    return files
