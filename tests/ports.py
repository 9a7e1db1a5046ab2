"""Ports that no other process is given."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_port() -> Iterator[int]:
    """A free port of this machine, bound while the block runs: a server may listen on it, and nobody else is given it.

    A port that was only asked for and let go could be any other process's a moment later. Until a server listens,
    connections to it are refused. The server needs SO_REUSEADDR, which nearly all set.
    """
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        yield int(kept.getsockname()[1])
