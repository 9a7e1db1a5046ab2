"""One HTTP exchange of JSON, and what its failure means: shared by the clients of vLLM servers and of chat servers.

Worked example::

    transport = Transport(api_key=None)
    transport.ask("http://127.0.0.1:8000/v1/models", timeout_s=30)      # its JSON; None for an empty answer

What goes wrong is either a ``Fault``, which may pass (refused, reset, 429, 5xx, slow, truncated, not JSON, endless),
or a ``Refusal``, which will not (every other status of 300 or more). The caller decides whether and where to ask again;
``pause_before`` says how long to wait. Redirects are refusals: following one would carry the key to another host.
An https server is reached through the proxy that the environment names, if any; an http server directly.

One deadline holds for the whole exchange. The time-outs of httpx2 are for one read each, so a server that drips would
hold a thread for ever: exchanges run as tasks of an event loop, which can be cancelled at any moment.

Test it alone: ``pytest tests/engines/servers/test_transport.py``
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import math
import os
import random
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from opd_env.errors import UserError

if TYPE_CHECKING:
    import httpx2

LONGEST_PAUSE = 60.0
"""Seconds between two tries, whatever the server asks for."""
_LONGEST_OWN_PAUSE = 30.0
_CONNECT_TIMEOUT = 30.0
_LONGEST_ERROR = 10_000
_BUSY = 429
_AWAY = (_BUSY, 503)
_MAY_PASS = (408, 409, 425, *_AWAY)
_KEY = re.compile("[!-~]*")
_loops: dict[int, asyncio.AbstractEventLoop] = {}
_starting = threading.Lock()


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
    _clients: dict[tuple[int, bool], httpx2.AsyncClient] = field(default_factory=dict, repr=False)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set, repr=False)
    """Exchanges under way. Only the event loop's thread touches them, and the clients."""
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
        exchange = asyncio.run_coroutine_threadsafe(self._exchange(url, data, timeout_s), _loop())
        try:
            content = exchange.result()
        except concurrent.futures.CancelledError as error:
            raise Fault("the client was closed") from error
        except KeyboardInterrupt:
            exchange.cancel()
            raise
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
        self._closed.set()
        if (loop := _loops.get(os.getpid())) is not None:  # nothing is under way without it
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._tasks])

    async def _exchange(self, url: str, data: bytes | None, timeout_s: float) -> bytes:
        import httpx2  # here, for it takes a tenth of a second

        if self.closed:
            raise Fault("the client was closed")
        reached = False

        async def watch(event: str, _: Any) -> None:
            nonlocal reached
            reached |= event.endswith("send_request_headers.started")

        task: Any = asyncio.current_task()
        self._tasks.add(task)
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._client(url).stream(
                    "GET" if data is None else "POST", url, content=data, headers=self._headers(),
                    extensions={"trace": watch},
                ) as response,
            ):  # fmt: skip
                content = await self._read(response)
        except TimeoutError as error:
            raise Fault("the answer took too long" if reached else "connecting timed out", away=not reached) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            away = not reached or isinstance(error, httpx2.ProxyError)
            raise Fault(_first_cause(error), away=away) from error
        finally:
            self._tasks.discard(task)
        if response.status_code >= 300:
            _raise_status(response, content)
        return content

    async def _read(self, response: httpx2.Response) -> bytes:
        """The whole answer as it was sent; of an error, as much as comes."""
        import httpx2

        answer, failed = bytearray(), response.status_code >= 300
        try:
            async for chunk in response.aiter_raw():
                answer += chunk
                if len(answer) > (_LONGEST_ERROR if failed else self.longest_answer):
                    raise Fault(f"the answer is longer than {self.longest_answer} bytes")
        except (Fault, httpx2.HTTPError):
            if not failed:
                raise
        return bytes(answer)

    def _client(self, url: str) -> httpx2.AsyncClient:
        """This process's client for http, which nothing of the environment changes, or for https."""
        import httpx2

        secure = url.startswith("https:")
        client = self._clients.get((os.getpid(), secure))
        if client is None:
            # No connection is kept: a server that restarts would fail the request that takes a stale one.
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
            client = self._clients[os.getpid(), secure] = httpx2.AsyncClient(
                verify=secure, trust_env=secure, limits=limits, timeout=httpx2.Timeout(None, connect=_CONNECT_TIMEOUT),
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            )  # fmt: skip
        return client

    def _headers(self) -> dict[str, str]:
        # Without compression, an answer cannot be longer than what has been counted.
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        return headers | {"Authorization": f"Bearer {self.api_key}"} if self.api_key else headers


def _loop() -> asyncio.AbstractEventLoop:
    """This process's event loop, in a thread that holds no exit; a forked process starts one of its own."""
    with _starting:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, daemon=True, name="opd-env-http-loop").start()
        return loop


def _first_cause(error: BaseException) -> str:
    """httpx2 itself says no more than that all attempts failed."""
    while (
        cause := error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error.__context__
    ):
        error = cause
    return f"{type(error).__name__}: {error}"


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


def _raise_status(response: httpx2.Response, content: bytes) -> None:
    """Raises what an error status means."""
    status = response.status_code
    text = " ".join(content[:2000].decode("utf-8", "replace").split())[:500]
    said = f"HTTP {status}: {text or response.reason_phrase}"
    if status in _MAY_PASS or status >= 500:
        pause_s = _seconds(response.headers.get("Retry-After"))
        raise Fault(said, away=status in _AWAY, busy=status == _BUSY, pause_s=pause_s)
    raise Refusal(said, status)


def _seconds(value: str | None) -> float | None:
    """Of a ``Retry-After`` header; a date or nonsense counts as none."""
    try:
        seconds = float(value) if value is not None else math.nan
    except ValueError:
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def is_url(name: str) -> bool:
    """Whether a setting names servers rather than a model or an engine."""
    return name.startswith(("http://", "https://"))


def checked_url(url: str) -> str:
    """The address of a server without a slash at its end.

    Raises:
        ValueError: it is none, or holds a password, a query or a fragment.
    """
    url = url.strip().rstrip("/")
    try:
        parts = urlsplit(url)
        whole = bool(parts.hostname) and parts.port != 0 and not (parts.query or parts.fragment)
        fits = whole and parts.scheme in ("http", "https") and "@" not in parts.netloc
    except ValueError:  # the port or the brackets of IPv6
        fits = False
    if not fits or any(not "!" <= character <= "~" for character in url):
        raise ValueError(f"{url!r} is no URL of a server; it looks like http://HOST:8000")
    return url


def pool_url(url: str) -> str:
    """The address of a vLLM server without a path.

    Raises:
        ValueError: it is none, or has another path than ``/v1``.
    """
    url = checked_url(url).removesuffix("/v1")
    if urlsplit(url).path:
        raise ValueError(f"{url!r} is no URL of a vLLM server; it looks like http://HOST:8000")
    return url
