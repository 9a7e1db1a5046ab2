"""What the supervisor and the slots say to each other: fixed-size records, and descriptors beside them.

Test it alone: ``pytest tests/tools/sandbox``
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

SPAWN = b"S"
"""Supervisor to zygote, with the slot's end of a socket: make a slot."""
READY, FAILED = b"R", b"E"
"""Zygote or slot to supervisor: up; not up, followed by the reason as text."""
PIDFD = b"P"
"""To the supervisor, with a pidfd: of the new slot, or of a session's process."""
KILL = b"K"
"""Supervisor to slot: kill what runs."""

PROGRAM, SESSION = 0, 1


@dataclass(frozen=True)
class Request:
    """Supervisor to slot: run this. The descriptors beside it: code or channel, output, [files]."""

    kind: int
    """PROGRAM or SESSION."""
    seed: int
    wall_us: int
    """For a program; a session is timed cell by cell by the supervisor."""
    cpu_s: int
    memory_bytes: int
    threads: int

    _layout: ClassVar[struct.Struct] = struct.Struct("<BQQIQI")
    size: ClassVar[int] = _layout.size

    def pack(self) -> bytes:
        """The record's bytes."""
        return self._layout.pack(self.kind, self.seed, self.wall_us, self.cpu_s, self.memory_bytes, self.threads)

    @classmethod
    def unpack(cls, data: bytes) -> Request:
        """The record of :meth:`pack`."""
        return cls(*cls._layout.unpack(data))


@dataclass(frozen=True)
class Report:
    """Slot to supervisor: what the kernel told about the process that is gone."""

    set_up: bool
    """It came as far as the code; if not, the fault is ours."""
    timed_out: bool
    """The slot killed it when its wall time was over."""
    clean: bool
    """Nothing is left of it: no process, no file. If not, the slot must go."""
    wait_status: int
    cpu_us: int
    max_rss_kb: int

    _layout: ClassVar[struct.Struct] = struct.Struct("<c???iQQ")
    size: ClassVar[int] = _layout.size
    tag: ClassVar[bytes] = b"D"

    def pack(self) -> bytes:
        """The record's bytes."""
        fields = (self.set_up, self.timed_out, self.clean, self.wait_status, self.cpu_us, self.max_rss_kb)
        return self._layout.pack(self.tag, *fields)

    @classmethod
    def unpack(cls, data: bytes) -> Report:
        """The record of :meth:`pack`."""
        return cls(*cls._layout.unpack(data)[1:])


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
