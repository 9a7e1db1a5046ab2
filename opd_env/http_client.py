"""Asks a pool of servers that may be slow, busy, broken, killed and restarted.

Worked example::

    client = HttpClient(["http://127.0.0.1:8000", "http://127.0.0.1:8001"])
    client.post("/v1/completions", {"prompt": [1, 2], "max_tokens": 4}, read=lambda answer: answer["choices"][0])

What goes wrong is one of four things:

- the server is away (refused, reset, 429, 503): it rests, with growing pauses and jitter, and is asked for its health
  before it gets work again; another server takes the request meanwhile. After ``patience_s`` without any server:
  ``ServersDown``.
- this answer failed (time-out, other 5xx, a lost connection, truncated, not JSON, not what ``read`` expects): tried
  again, on another server if there is one; after ``tries`` of them ``RequestFailed``, which concerns one request only.
- the request is wrong (400, 401, 404, …): ``RequestRefused`` at once.
- the caller gives up: ``close`` ends every connection.

An answer is either used whole or not at all, and a request is asked again only after its answer was lost, so nothing
counts twice. Not supported: proxies, redirects.

Test it alone: ``pytest tests/core/test_http_client.py``
"""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import socket
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from opd_env.errors import UserError

Answer = TypeVar("Answer")
LONGEST_PAUSE = 30.0
"""Seconds that a server rests at most, whatever ``Retry-After`` says."""
LONGEST_ANSWER = 256_000_000
"""Bytes; a longer answer is a fault."""
_HEALTH_TIMEOUT = 10.0
_AWAY = (429, 503)


class ServersDown(UserError):
    """No server has answered for as long as the client is patient."""


class RequestRefused(UserError):
    """A server will not answer this request however often it is asked."""


class RequestFailed(Exception):
    """One request failed too often; servers may well answer others."""


class _Fault(Exception):
    """What may pass. ``away``: the server as a whole, not this answer; ``pause`` is in seconds."""

    def __init__(self, message: str, *, away: bool = False, pause: float | None = None) -> None:
        super().__init__(message)
        self.away, self.pause = away, pause


@dataclass
class _Server:
    url: str
    running: int = 0
    faults: int = 0
    """In a row."""
    rests_until: float = 0.0
    suspect: bool = False
    """Must pass a health check before it gets work."""
    last_fault: str = ""


@dataclass
class HttpClient:
    """Posts JSON to the first server that can answer. Threads share it.

    Raises:
        ValueError: no server, a URL that is none, or a number out of range.
    """

    urls: Sequence[str]
    """Where servers listen, without a path: ``http://HOST:8000``."""
    concurrency: int = 64
    """Threads of ``run``: requests under way at the same time, over all servers."""
    timeout_s: float = 600.0
    """For one whole answer."""
    tries: int = 5
    """Failed answers after which a request is given up."""
    patience_s: float = 300.0
    """How long no server at all may be there: longer than one takes to start."""
    pause_s: float = 0.5
    """A server's first rest; it doubles from fault to fault."""
    api_key: str | None = None
    on_return: Callable[[str], None] | None = None
    """Called with the URL of a server that was away and is back, before it gets work; what it raises means that the
    server is not back yet."""
    _lock: threading.Condition = field(default_factory=threading.Condition, repr=False)
    _connections: set[http.client.HTTPConnection] = field(default_factory=set, repr=False)
    _jobs: SimpleQueue[Callable[[], None]] = field(default_factory=SimpleQueue, repr=False)
    _workers: int = field(default=0, repr=False)
    _closed: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        self.urls = tuple(_checked_url(url) for url in self.urls)
        if not self.urls:
            raise ValueError("no server: give at least one URL such as http://127.0.0.1:8000")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError(f"a server stands twice in {', '.join(self.urls)}")
        if self.concurrency < 1 or self.tries < 1:
            raise ValueError(f"concurrency={self.concurrency} and tries={self.tries} must be at least 1")
        if not 0 < self.timeout_s < math.inf or not 0 <= self.patience_s < math.inf:
            raise ValueError(
                f"timeout_s={self.timeout_s} and patience_s={self.patience_s} must be finite, not negative"
            )
        self._servers = [_Server(url) for url in self.urls]

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], Answer], key: int | None = None) -> Answer:
        """Asks until an answer is one that ``read`` takes.

        Args:
            path: of the API, such as ``/v1/completions``.
            body: sent as JSON.
            read: turns the answer's JSON into the result; ``KeyError``, ``TypeError``, ``ValueError`` and
                ``IndexError`` mean that the answer is garbage.
            key: requests of one key go to the same server while it is healthy (its prefix cache knows them).

        Raises:
            ServersDown, RequestRefused, RequestFailed: see the module.
        """
        data, failed = json.dumps(body).encode(), 0
        while True:
            server = self._take(key)
            try:
                answer = self._send(server.url, "POST", path, data, self.timeout_s)
                try:
                    result = read(answer)
                except (KeyError, TypeError, ValueError, IndexError) as error:
                    raise _Fault(
                        f"an answer that is not what was asked for ({type(error).__name__}: {error})"
                    ) from error
                self._well(server)
                return result
            except _Fault as fault:
                self._rest(server, fault)
                failed += not fault.away
                if failed >= self.tries:
                    raise RequestFailed(f"{server.url}{path} failed {failed} times; the last: {fault}") from fault
            finally:
                self._give_back(server)

    def ask(self, url: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = None) -> Any:
        """One attempt on one server, for health, versions and weights; its JSON, or None for an empty answer.

        Raises:
            RequestFailed: no answer. RequestRefused: a 4xx.
        """
        data = None if body is None else json.dumps(body).encode()
        try:
            return self._send(url, "GET" if body is None else "POST", path, data, timeout_s or self.timeout_s)
        except _Fault as fault:
            raise RequestFailed(f"{url}{path}: {fault}") from fault

    def run(self, job: Callable[[], None]) -> None:
        """Runs a job, which catches its own exceptions, in one of ``concurrency`` threads that never hold an exit."""
        self._jobs.put(job)
        with self._lock:
            if self._workers < self.concurrency:
                self._workers += 1
                threading.Thread(target=self._work, daemon=True, name="opd-env-http").start()

    def suspect(self, url: str, reason: str) -> None:
        """Gives a server no work until it has passed a health check and ``on_return``."""
        for server in self._servers:
            if server.url == url:
                self._rest(server, _Fault(reason, away=True))

    def close(self) -> None:
        """Ends everything under way; requests that wait raise ``RequestFailed``."""
        with self._lock:
            self._closed = True
            connections = list(self._connections)
            self._lock.notify_all()
            for _ in range(self._workers):
                self._jobs.put(lambda: None)  # wakes a thread that waits for work
        for connection in connections:
            _shut(connection)

    def _work(self) -> None:
        while not self._closed:
            self._jobs.get()()

    def _take(self, key: int | None) -> _Server:
        """A healthy server: the key's own, or the one with least to do. Waits for one."""
        started = time.monotonic()
        while True:
            with self._lock:
                if self._closed:
                    raise RequestFailed("the client was closed")
                now = time.monotonic()
                for server in self._servers:
                    if server.suspect and server.rests_until <= now:
                        server.rests_until = now + _HEALTH_TIMEOUT
                        threading.Thread(target=self._check, args=(server,), daemon=True).start()
                ready = [server for server in self._servers if not server.suspect and server.rests_until <= now]
                if ready:
                    own = self._servers[_spread(key) % len(self._servers)] if key is not None else ready[0]
                    server = own if key is not None and own in ready else min(ready, key=lambda one: one.running)
                    server.running += 1
                    return server
                if now - started > self.patience_s:
                    raise ServersDown(self._who_is_down())
                self._lock.wait(max(1e-3, min(0.5, *(one.rests_until - now for one in self._servers))))

    def _check(self, server: _Server) -> None:
        """Asks a suspect whether it is back."""
        try:
            self._send(server.url, "GET", "/health", None, _HEALTH_TIMEOUT)
            if self.on_return is not None:
                self.on_return(server.url)
        except (_Fault, RequestFailed, UserError) as error:
            self._rest(server, _Fault(str(error), away=True), checked=True)
        else:
            self._well(server)

    def _well(self, server: _Server) -> None:
        with self._lock:
            server.faults, server.suspect, server.rests_until = 0, False, 0.0
            self._lock.notify_all()

    def _rest(self, server: _Server, fault: _Fault, *, checked: bool = False) -> None:
        """Lets a server rest. Requests that fail together are one fault: only a health check tells of the next."""
        with self._lock:
            now = time.monotonic()
            server.last_fault = str(fault)
            server.suspect = server.suspect or fault.pause is None
            if fault.pause is not None:
                server.rests_until = max(server.rests_until, now + min(LONGEST_PAUSE, fault.pause))
            elif checked or server.rests_until <= now:
                server.faults += 1
                pause = min(LONGEST_PAUSE, self.pause_s * 2 ** min(server.faults - 1, 16))
                server.rests_until = now + pause * random.uniform(0.5, 1.0)

    def _give_back(self, server: _Server) -> None:
        with self._lock:
            server.running -= 1

    def _who_is_down(self) -> str:
        said = "; ".join(f"{one.url}: {one.last_fault}" for one in self._servers)
        return (
            f"no server has answered for {self.patience_s:.0f} s ({said}); start it (again) and give the same command "
            "to continue, or correct the URL"
        )

    def _send(self, url: str, method: str, path: str, data: bytes | None, timeout_s: float) -> Any:
        """One exchange: the answer's JSON, or None if it is empty."""
        deadline = time.monotonic() + timeout_s
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=min(timeout_s, 30.0))
        with self._lock:
            self._connections.add(connection)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        reached = False
        try:
            connection.connect()
            reached = True
            if self._closed:
                raise _Fault("the client was closed")
            connection.request(method, path, data, headers)
            response = _await(connection, deadline)
            content = _read_all(connection, response, deadline)
            if response.status >= 300:
                _refuse(url, path, response, content)
            return json.loads(content) if content.strip() else None
        except (OSError, http.client.HTTPException) as error:
            raise _Fault(str(error) or type(error).__name__, away=not reached) from error
        except ValueError as error:  # JSON or its encoding
            raise _Fault(f"the answer is not JSON ({error})") from error
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()


def is_url(name: str) -> bool:
    """Whether a setting names servers rather than a model or an engine."""
    return name.startswith(("http://", "https://"))


def client_of(urls: str, concurrency: int) -> HttpClient:
    """A client of the servers that a setting names, as ``a,b``; their key is read from ``$VLLM_API_KEY``.

    Raises:
        ValueError: one is no URL.
    """
    named = [url.strip() for url in urls.split(",")]
    return HttpClient(named, concurrency=concurrency, api_key=os.environ.get("VLLM_API_KEY"))


def _await(connection: http.client.HTTPConnection, deadline: float) -> http.client.HTTPResponse:
    """The response's head: a model may think for as long as the deadline allows."""
    _allow(connection, deadline)
    return connection.getresponse()


def _read_all(connection: http.client.HTTPConnection, response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole answer; one that drips in byte by byte does not hold a request for ever."""
    expected = response.length
    answer = bytearray()
    while True:
        _allow(connection, deadline)
        chunk = response.read1(1 << 16)
        if not chunk:
            break
        answer += chunk
        if len(answer) > LONGEST_ANSWER:
            raise _Fault(f"the answer is longer than {LONGEST_ANSWER} bytes")
    if expected is not None and len(answer) < expected:
        raise _Fault(f"the answer broke off after {len(answer)} of {expected} bytes")
    return bytes(answer)


def _allow(connection: http.client.HTTPConnection, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise _Fault("the answer took too long")
    if connection.sock is not None:  # None once the last byte is there
        connection.sock.settimeout(left)


def _refuse(url: str, path: str, response: http.client.HTTPResponse, content: bytes) -> None:
    """Raises what an error status means."""
    status = response.status
    said = f"HTTP {status}: {' '.join(content[:2000].decode('utf-8', 'replace').split())[:500]}"
    if status in _AWAY:
        raise _Fault(said, away=True, pause=_seconds(response.getheader("Retry-After")))
    if status >= 500 or status in (408, 409, 425):
        raise _Fault(said)
    hint = {401: "; give the server's API key", 403: "; give the server's API key"}.get(status, "")
    raise RequestRefused(f"{url}{path} refuses the request with {said}{hint}")


def _seconds(value: str | None) -> float | None:
    """Of a ``Retry-After`` header; a date or nonsense counts as none."""
    try:
        seconds = float(value) if value is not None else math.nan
    except ValueError:
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _checked_url(url: str) -> str:
    url = url.rstrip("/").removesuffix("/v1")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query:
        raise ValueError(f"{url!r} is no URL of a server; it looks like http://HOST:8000")
    return url


def _spread(key: int) -> int:
    """Neighbouring keys on different servers, in no step with anything else."""
    return zlib.crc32(str(key).encode())


def _shut(connection: http.client.HTTPConnection) -> None:
    """Wakes the thread that reads from a connection."""
    sock = connection.sock
    if sock is not None:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # closed meanwhile
