"""Things that hostile code would like to touch, planted where it would find them without a sandbox.

Worked example::

    with Canaries(user=65534) as canaries:
        sandbox.run(f"open({canaries.secret!r})")
        canaries.touched()                          # [] if the sandbox held

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_opening.py``
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self


class Canaries:
    """A folder that everybody may write to, with a secret in it, and four sockets that listen.

    Args:
        user: whom one of the files is given to, if this process is root: the user that the code runs as.
    """

    def __init__(self, user: int) -> None:
        self._stack = contextlib.ExitStack()
        self.token = secrets.token_hex(8)
        """What must never be seen."""
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="opd-env-canary-"))
        self.folder = folder
        self.secret = f"{folder}/secret.txt"
        self.own = f"{folder}/own.txt"
        """Belongs to the user that the code runs as."""
        self.writable = f"{folder}/writable"
        os.chmod(folder, 0o777)
        Path(self.secret).write_text(f"CANARY-{self.token}")
        os.chmod(self.secret, 0o644)
        Path(self.own).write_text("untouched")
        os.chmod(self.own, 0o666)
        if os.geteuid() == 0:
            os.chown(self.own, user, user)
        os.mkdir(self.writable)
        os.chmod(self.writable, 0o777)
        self._files_before = self._files()

        self.abstract = f"opd-env-canary-{self.token}"
        self.tcp = self._listen(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
        self.udp = self._listen(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
        self.abstract_stream = self._listen(socket.AF_UNIX, socket.SOCK_STREAM, f"\0{self.abstract}")
        self.abstract_datagram = self._listen(socket.AF_UNIX, socket.SOCK_DGRAM, f"\0{self.abstract}-dgram")

    def _listen(self, family: int, kind: int, address: object) -> socket.socket:
        sock = self._stack.enter_context(socket.socket(family, kind))
        sock.bind(address)  # type: ignore[arg-type]
        if kind == socket.SOCK_STREAM:
            sock.listen()
        return sock

    @property
    def tcp_port(self) -> int:
        """Port of the TCP canary."""
        return int(self.tcp.getsockname()[1])

    @property
    def udp_port(self) -> int:
        """Port of the UDP canary."""
        return int(self.udp.getsockname()[1])

    def touched(self) -> list[str]:
        """What was reached, in words; empty if nothing was."""
        found = []
        if (files := self._files()) != self._files_before:
            found.append(f"files: {files} instead of {self._files_before}")
        sockets = {
            "TCP port": self.tcp,
            "UDP port": self.udp,
            "abstract stream socket": self.abstract_stream,
            "abstract datagram socket": self.abstract_datagram,
        }
        ready = select.select(list(sockets.values()), [], [], 0)[0]
        found += [name for name, sock in sockets.items() if sock in ready]
        return found

    def _files(self) -> dict[str, tuple[int, ...]]:
        """Mode, owner, links, size and times of all files."""
        found: dict[str, tuple[int, ...]] = {}
        for path in [self.folder, *sorted(str(path) for path in Path(self.folder).rglob("*"))]:
            info = os.lstat(path)
            found[path] = (
                info.st_mode, info.st_uid, info.st_gid, info.st_nlink, info.st_size, info.st_mtime_ns, info.st_ino,
            )  # fmt: skip
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
