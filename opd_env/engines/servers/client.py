"""Asks a pool of servers that may be slow, busy, broken, killed and restarted.

Worked example::

    client = HttpClient(["http://127.0.0.1:8000", "http://127.0.0.1:8001"])
    client.post("/v1/completions", {"prompt": [1, 2], "max_tokens": 4}, read=lambda answer: answer["choices"][0])

What goes wrong is one of four things:

- the server is away (refused, unreachable, 503) or busy (429): it rests, with growing pauses and jitter, and unless it
  is only busy it is asked for its health before it gets work again; another server takes the request meanwhile. After
  ``patience_s`` without an answer of any server: ``ServersDown``.
- this answer failed (time-out, other 5xx, a lost connection, truncated, not JSON, not what ``read`` expects): tried
  again, on another server if there is one; after ``tries`` of them ``RequestFailed``, which concerns one request only.
- the request is wrong (400, 401, 404, …): ``RequestRefused`` at once.
- the caller gives up: ``close`` ends every connection.

An answer is either used whole or not at all, and a request is asked again only after its answer was lost, so nothing
counts twice. A server that restarts, perhaps with other weights, loses the requests under way, if there are any: so
``on_return`` looks at a server that was away, and at one that was idle. One exchange is ``transport``'s.

Test it alone: ``pytest tests/engines/servers/test_client.py``
"""

from __future__ import annotations

import math
import os
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

from opd_env.engines.servers.transport import Fault, Refusal, Transport, pause_before, pool_url
from opd_env.errors import UserError

Answer = TypeVar("Answer")
GARBAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
_HEALTH_TIMEOUT = 10.0
_LONGEST_MESSAGE = 1000
_IDLE_S = 1.0
"""Less than a server takes to restart."""


class ServersDown(UserError):
    """No server has answered for as long as the client is patient."""


class RequestRefused(UserError):
    """A server will not answer this request however often it is asked."""


class RequestFailed(Exception):
    """One request failed too often; servers may well answer others."""


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
    idle_since: float = -math.inf
    unseen: bool = False
    """Has been idle long enough to have restarted."""
    look: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Of the one thread that looks at an unseen server, for which the others wait."""


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
    """How long no server at all may answer: longer than one takes to start."""
    pause_s: float = 0.5
    """A server's first rest; it doubles from fault to fault."""
    api_key: str | None = field(default=None, repr=False)
    on_return: Callable[[str], None] | None = None
    """Called with the URL of a server that was away and is back, or that was idle, before it gets work; what it raises
    means that the server is not back yet."""
    _lock: threading.Condition = field(default_factory=threading.Condition, repr=False)
    _jobs: SimpleQueue[Callable[[], None] | None] = field(default_factory=SimpleQueue, repr=False)
    _workers: int = field(default=0, repr=False)
    _closed: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        self.urls = tuple(pool_url(url) for url in self.urls)
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
        self._transport = Transport(self.api_key)
        self._answered = time.monotonic()

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], Answer], key: int | None = None) -> Answer:
        """Asks until an answer is one that ``read`` takes.

        Args:
            path: of the API, such as ``/v1/completions``.
            body: sent as JSON.
            read: turns the answer's JSON into the result; an exception of ``GARBAGE`` means that it is none.
            key: requests of one key go to the same server while it is healthy (its prefix cache knows them).

        Raises:
            ServersDown, RequestRefused, RequestFailed: see the module.
        """
        failed, started = 0, time.monotonic()
        while True:
            server = self._take(key)
            try:
                self._look_at(server)
                answer = self._send(server.url, path, body, self.timeout_s)
                try:
                    result = read(answer)
                except GARBAGE as error:
                    said = f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
                    raise Fault(f"an answer that is not what was asked for ({said})") from error
                self._answer_of(server)
                return result
            except Fault as fault:
                self._rest(server, fault)
                failed += not fault.away
                if failed >= self.tries:
                    raise RequestFailed(f"{server.url}{path} failed {failed} times; the last: {fault}") from fault
                if time.monotonic() - max(started, self._answered) > self.patience_s:
                    raise ServersDown(self._who_is_down()) from fault
            finally:
                self._give_back(server)

    def ask(self, url: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = None) -> Any:
        """One attempt on one server, for health, versions and weights; its JSON, or None for an empty answer.

        Raises:
            RequestFailed: no answer. RequestRefused: a 4xx.
        """
        try:
            return self._send(url, path, body, timeout_s or self.timeout_s)
        except Fault as fault:
            raise RequestFailed(f"{url}{path}: {fault}") from fault

    def run(self, job: Callable[[], None]) -> None:
        """Runs a job, which catches its own exceptions, in one of ``concurrency`` threads that never hold an exit."""
        with self._lock:
            if not self._closed:
                self._jobs.put(job)
                if self._workers < self.concurrency:
                    self._workers += 1
                    threading.Thread(target=self._work, daemon=True, name="opd-env-http").start()
                return
        job()  # fails at once: whoever waits for it must hear so

    def suspect(self, url: str, reason: str) -> None:
        """Gives a server no work until it has passed a health check and ``on_return``."""
        for server in self._servers:
            if server.url == url:
                self._rest(server, Fault(reason, away=True))

    def close(self) -> None:
        """Ends everything under way; requests that wait raise ``RequestFailed``."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
            for _ in range(self._workers):
                self._jobs.put(None)  # behind the jobs that wait: they fail first
        self._transport.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

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
                        server.rests_until = math.inf  # until the check is over: new weights can take minutes
                        threading.Thread(target=self._check, args=(server,), daemon=True).start()
                ready = [server for server in self._servers if not server.suspect and server.rests_until <= now]
                if ready:
                    # Neighbouring keys on different servers, in no step with anything else.
                    own = self._servers[zlib.crc32(str(key).encode()) % len(self._servers)]
                    server = own if key is not None and own in ready else min(ready, key=lambda one: one.running)
                    server.unseen |= not server.running and now - server.idle_since > _IDLE_S
                    server.running += 1
                    return server
                if now - started > self.patience_s:
                    raise ServersDown(self._who_is_down())
                self._lock.wait(max(1e-3, min(0.5, *(one.rests_until - now for one in self._servers))))

    def _look_at(self, server: _Server) -> None:
        """Before an idle server gets work.

        Raises:
            Fault: it must not get any.
        """
        with server.look:
            if server.suspect:
                raise Fault(server.last_fault, away=True)
            try:
                if server.unseen and self.on_return is not None:
                    self.on_return(server.url)
            except Exception as error:  # whatever it is, the server is not what it was
                fault = Fault(str(error), away=True)
                self._rest(server, fault)  # here, so that no other thread finds it healthy
                raise fault from error
            server.unseen = False

    def _check(self, server: _Server) -> None:
        """Asks a suspect whether it is back."""
        try:
            self._send(server.url, "/health", None, _HEALTH_TIMEOUT)
            if self.on_return is not None:
                self.on_return(server.url)
        except Exception as error:  # whatever it is, the server is not back; ServersDown tells of it
            self._rest(server, Fault(str(error), away=True), checked=True)
        else:
            with self._lock:
                server.suspect, server.unseen, server.rests_until = False, False, 0.0
                server.idle_since = time.monotonic()
                self._lock.notify_all()

    def _answer_of(self, server: _Server) -> None:
        """A suspect stays one: this answer may be older than its fault, and its weights too."""
        with self._lock:
            server.faults, self._answered = 0, time.monotonic()

    def _rest(self, server: _Server, fault: Fault, *, checked: bool = False) -> None:
        """Lets a server rest. Requests that fail together are one fault: only a health check tells of the next."""
        with self._lock:
            now = time.monotonic()
            server.last_fault = str(fault)
            server.suspect |= not fault.busy
            if fault.pause_s is not None:
                server.rests_until = max(server.rests_until, now + pause_before(1, self.pause_s, fault.pause_s))
            elif checked or server.rests_until <= now:
                server.faults += 1
                server.rests_until = now + pause_before(server.faults, self.pause_s)

    def _give_back(self, server: _Server) -> None:
        with self._lock:
            server.running -= 1
            server.idle_since = time.monotonic()

    def _who_is_down(self) -> str:
        said = "; ".join(f"{one.url}: {one.last_fault}" for one in self._servers)
        return (
            f"no server has answered for {self.patience_s:.0f} s ({said}); start it (again) and give the same command "
            "to continue, or correct the URL"
        )

    def _send(self, url: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        try:
            return self._transport.ask(url + path, body, timeout_s=timeout_s)
        except Refusal as refusal:
            hint = "; set VLLM_API_KEY to the server's key" if refusal.status in (401, 403) else ""
            raise RequestRefused(f"{url}{path} refuses the request with {refusal}{hint}") from refusal


def client_of(urls: str, concurrency: int) -> HttpClient:
    """A client of the servers that a setting names, as ``a,b``; their key is read from ``$VLLM_API_KEY``.

    Raises:
        ValueError: one is no URL.
    """
    named = [url.strip() for url in urls.split(",")]
    return HttpClient(named, concurrency=concurrency, api_key=os.environ.get("VLLM_API_KEY"))
