"""One HTTP exchange of JSON, and what its failure means: shared by the clients of vLLM servers and of chat servers.

Worked example::

    transport = Transport(api_key=None)
    transport.ask("http://127.0.0.1:8000/v1/models", timeout_s=30)      # its JSON; None for an empty answer

What goes wrong is either a ``Fault``, which may pass (refused, reset, 429, 5xx, slow, truncated, not JSON, endless),
or a ``Refusal``, which will not (every other status of 300 or more). The caller decides whether and where to ask again;
``pause_before`` says how long to wait. Redirects are refusals: following one would carry the key to another host.
An https server is reached through the proxy that the environment names, if any; an http server directly.

It stands on ``http.client`` because one deadline must hold for the whole exchange: in httpx2 that takes the
asynchronous client behind a thread, and two to five times the CPU (``python benchmarks/http_exchange.py``).

Test it alone: ``pytest tests/engines/servers/test_transport.py``
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import random
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from opd_env.errors import UserError

LONGEST_PAUSE = 60.0
"""Seconds between two tries, whatever the server asks for."""
_LONGEST_OWN_PAUSE = 30.0
_CONNECT_TIMEOUT = 30.0
_LONGEST_ERROR = 10_000
_BUSY = 429
_AWAY = (_BUSY, 503)
_MAY_PASS = (408, 409, 425, *_AWAY)


_KEY = re.compile("[!-~]*")


class Fault(Exception):
    """What may pass.

    Args:
        message: what was seen.
        away: the server as a whole, not this answer.
        busy: it is there and has lost nothing, but takes no more for now.
        pause_s: what its ``Retry-After`` asks for.
    """

    def __init__(self, message: str, *, away: bool = False, busy: bool = False, pause_s: float | None = None) -> None:
        super().__init__(message)
        self.away, self.busy, self.pause_s = away, busy, pause_s


class Refusal(Exception):
    """The server will not answer this request however often it is asked; the message holds its own words."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Transport:
    """Sends requests and reads answers, each on a connection of its own. Threads share it.

    Raises:
        UserError: a key that no header can hold.
    """

    api_key: str | None = field(default=None, repr=False)
    longest_answer: int = 256_000_000
    """Bytes; a longer answer is a fault."""
    _sockets: set[socket.socket] = field(default_factory=set, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _closed: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise UserError(
                f"the API key, of {len(self.api_key)} characters, holds a space, a line end or a letter beyond ASCII; "
                "set VLLM_API_KEY (servers of token ids) or OPENAI_API_KEY (chat servers) to the key alone"
            )

    def ask(self, url: str, body: Mapping[str, Any] | None = None, *, timeout_s: float) -> Any:
        """One exchange: a POST of the body, or a GET without one.

        Args:
            url: one that ``checked_url`` has passed, and a path.
            body: sent as JSON.
            timeout_s: for the whole of it, so that a server that drips byte by byte holds nobody for ever.

        Returns:
            The answer's JSON, or None if it is empty.

        Raises:
            Fault: it may pass. Refusal: it will not.
        """
        data = None if body is None else json.dumps(body).encode()
        content = self._exchange(urlsplit(url), data, time.monotonic() + timeout_s)
        try:
            return json.loads(content) if content.strip() else None
        except (ValueError, RecursionError) as error:
            raise Fault(f"the answer is not JSON ({error})") from error

    @property
    def closed(self) -> bool:
        """Whether nothing can be asked any more."""
        return self._closed.is_set()

    def pause(self, seconds: float) -> None:
        """Waits between two tries, but no longer than until ``close``."""
        self._closed.wait(seconds)

    def close(self) -> None:
        """Ends every exchange and pause that is under way, and lets none begin."""
        with self._lock:
            self._closed.set()
            for sock in self._sockets:
                try:
                    sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
                except OSError:
                    continue  # the other side was faster

    def _exchange(self, url: SplitResult, data: bytes | None, deadline: float) -> bytes:
        connection = _connection(url)
        sockets: list[socket.socket] = []

        def connect_in_time(address: tuple[str, int], *_: object) -> socket.socket:
            sockets.append(self._connect(address, deadline))
            return sockets[0]

        def read_in_time(sock: Any, *arguments: Any, **options: Any) -> http.client.HTTPResponse:
            source: Any = _Deadline(sock, deadline)
            return http.client.HTTPResponse(source, *arguments, **options)

        connection._create_connection = connect_in_time  # type: ignore[attr-defined]
        connection.response_class = read_in_time  # type: ignore[assignment]
        reached = False
        try:
            connection.connect()
            reached = True
            sockets.append(connection.sock)  # of https another than the one that was connected
            self._hold(connection.sock)
            connection.sock.settimeout(max(1e-3, deadline - time.monotonic()))
            target = f"{url.path}?{url.query}" if url.query else url.path
            connection.request("GET" if data is None else "POST", target, data, self._headers())
            with connection.getresponse() as response:
                content = self._read(response)
            self._require_open()  # a connection that was cut here can look like an answer that ended
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise Fault(str(error) or type(error).__name__, away=not reached) from error
        finally:
            with self._lock:
                self._sockets.difference_update(sockets)
            connection.close()
        if response.status >= 300:
            _raise_status(response, content)
        return content

    def _connect(self, address: tuple[str, int], deadline: float) -> socket.socket:
        """As ``socket.create_connection``, but within one deadline for all addresses, and ``close`` ends it."""
        places = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        for after, (*kind, _, place) in zip(reversed(range(len(places))), places, strict=True):
            sock = socket.socket(*kind)
            try:
                self._hold(sock)
                sock.settimeout(max(1e-3, min(_CONNECT_TIMEOUT, deadline - time.monotonic()) / (after + 1)))
                sock.connect(place)
                return sock
            except BaseException as error:
                with self._lock:
                    self._sockets.discard(sock)
                sock.close()
                if not after or not isinstance(error, OSError):
                    raise
        raise OSError(f"{address[0]} has no address")

    def _hold(self, sock: socket.socket) -> None:
        """``close`` will cut it."""
        with self._lock:
            self._require_open()
            self._sockets.add(sock)

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        """The whole answer; of an error, as much as comes."""
        expected, answer = response.length, bytearray()
        try:
            while chunk := response.read1(1 << 16):
                answer += chunk
                if len(answer) > (self.longest_answer if response.status < 300 else _LONGEST_ERROR):
                    raise Fault(f"the answer is longer than {self.longest_answer} bytes")
            if expected is not None and len(answer) < expected:
                raise Fault(f"the answer broke off after {len(answer)} of {expected} bytes")
        except (Fault, OSError, http.client.HTTPException):
            if response.status < 300:
                raise
        return bytes(answer)

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        return headers | {"Authorization": f"Bearer {self.api_key}"} if self.api_key else headers

    def _require_open(self) -> None:
        if self.closed:
            raise Fault("the client was closed")


class _Deadline(io.RawIOBase):
    """What a response reads from: a socket of which every read ends at the deadline, headers included."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._raw, self._deadline = sock, sock.makefile("rb", buffering=0), deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        """The one method of a socket that a response calls."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """As ``BufferedReader`` wants it."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Reads once.

        Raises:
            TimeoutError: the deadline has passed.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer took too long")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        """Gives the socket free."""
        self._raw.close()
        super().close()


def pause_before(tries: int, first_pause_s: float, asked_s: float | None = None) -> float:
    """Seconds to wait after some failed tries: doubling, with jitter so that clients don't come back together.

    Args:
        tries: that have failed, from 1.
        first_pause_s: the longest pause after the first.
        asked_s: what the server asks for instead.
    """
    if asked_s is not None:
        return min(LONGEST_PAUSE, asked_s)
    return min(_LONGEST_OWN_PAUSE, first_pause_s * 2.0 ** min(tries - 1, 16)) * random.uniform(0.5, 1.0)


def _connection(url: SplitResult) -> http.client.HTTPConnection:
    host = url.hostname or ""
    if url.scheme == "http":
        return http.client.HTTPConnection(host, url.port)
    proxy = urllib.request.getproxies().get("https")
    if not proxy or urllib.request.proxy_bypass(host):
        return http.client.HTTPSConnection(host, url.port)
    way = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    connection = http.client.HTTPSConnection(way.hostname or "", way.port)
    sign_in = base64.b64encode(f"{unquote(way.username or '')}:{unquote(way.password or '')}".encode()).decode()
    connection.set_tunnel(host, url.port, {"Proxy-Authorization": f"Basic {sign_in}"} if way.username else {})
    return connection


def _raise_status(response: http.client.HTTPResponse, content: bytes) -> None:
    """Raises what an error status means."""
    status = response.status
    text = " ".join(content[:2000].decode("utf-8", "replace").split())[:500]
    said = f"HTTP {status}: {text or response.reason}"
    if status in _MAY_PASS or status >= 500:
        pause_s = _seconds(response.getheader("Retry-After"))
        raise Fault(said, away=status in _AWAY, busy=status == _BUSY, pause_s=pause_s)
    raise Refusal(said, status)


def _seconds(value: str | None) -> float | None:
    """Of a ``Retry-After`` header; a date or nonsense counts as none."""
    try:
        seconds = float(value) if value is not None else math.nan
    except ValueError:
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
