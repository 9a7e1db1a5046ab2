"""One exchange against servers that write whatever they like to the socket."""

from __future__ import annotations

import gzip
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.engines.servers.transport import LONGEST_PAUSE, Fault, Refusal, Transport, checked_url, pause_before
from opd_env.errors import UserError
from tests.ports import kept_port

OK = b"HTTP/1.1 200 OK\r\n"


@contextmanager
def raw_server(answer: Callable[[socket.socket], None], requests: list[str] | None = None) -> Iterator[str]:
    """Keeps what every connection sends and calls ``answer`` with it; yields the address."""
    seen: list[str] = [] if requests is None else requests
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    seen.append(connection.recv(1 << 16).decode())
                    try:
                        answer(connection)
                    except OSError:
                        continue  # the client has lost its patience

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
            thread.join()


def sends(data: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(data)


def ask(data: bytes, timeout_s: float = 5.0, **options: int) -> object:
    with raw_server(sends(data)) as url:
        return Transport(**options).ask(url, timeout_s=timeout_s)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (OK + b'Content-Length: 8\r\n\r\n{"a": 1}', {"a": 1}),
        (OK + b'Transfer-Encoding: chunked\r\n\r\n3\r\n{"a\r\n5\r\n": 1}\r\n0\r\n\r\n', {"a": 1}),
        (b'HTTP/1.0 200 OK\r\n\r\n{"a": 1}', {"a": 1}),
        (OK + b"Content-Length: 0\r\n\r\n", None),
    ],
)
def test_an_answer_is_read_whole_however_its_length_is_told(data: bytes, answer: object) -> None:
    assert ask(data) == answer


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Server disconnected"),
        (b"hello\r\n\r\n", "hello"),
        (OK + b'Content-Length: 9\r\n\r\n{"a": 1}', "received 8 bytes, expected 9"),
        (OK + b'Transfer-Encoding: chunked\r\n\r\n8\r\n{"a": 1}\r\n', "incomplete chunked read"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "illegal chunk header"),
        (b'HTTP/1.0 200 OK\r\n\r\n{"a": ', "not JSON"),
        (OK + b"\r\n" + b"[" * 100_000, "not JSON"),
        (OK + b"\r\n\xff", "not JSON"),
        (OK + b"\r\n" + b"9" * 5000, "not JSON"),
        (OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"{}", mtime=0), "not JSON"),  # nobody asked for it
        (b"HTTP/1.1 500 No\r\nContent-Length: 90\r\n\r\nsorry", "HTTP 500: sorry"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "HTTP 502: Bad Gateway"),
    ],
)
def test_what_may_pass_is_a_fault_of_this_answer(data: bytes, message: str) -> None:
    with pytest.raises(Fault, match=message) as caught:
        ask(data)
    assert not caught.value.away


@pytest.mark.parametrize(
    ("header", "pause_s"), [("7", 7.0), ("-1", 0.0), ("nan", None), ("Wed, 21 Oct 2026 07:28:00 GMT", None)]
)
def test_a_busy_server_is_away_for_as_long_as_it_asks(header: str, pause_s: float | None) -> None:
    with pytest.raises(Fault) as caught:
        ask(f"HTTP/1.1 429 Busy\r\nRetry-After: {header}\r\n\r\n".encode())
    assert caught.value.away
    assert caught.value.pause_s == pause_s


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
def test_what_will_not_pass_is_a_refusal_in_the_servers_words_even_when_they_break_off(status: int) -> None:
    with pytest.raises(Refusal, match=f"HTTP {status}: no such model") as caught:
        ask(f"HTTP/1.1 {status} No\r\nContent-Length: 1000\r\nLocation: /x\r\n\r\nno such\n model".encode())
    assert caught.value.status == status


def test_of_an_endless_error_no_more_is_read_than_is_shown() -> None:
    def endless(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 500 No\r\n\r\n")
        for _ in range(1000):
            connection.sendall(b"sorry " * 10_000)
        written.append("all of it")

    written: list[str] = []
    with raw_server(endless) as url, pytest.raises(Fault, match="HTTP 500: sorry") as caught:
        Transport().ask(url, timeout_s=60)
    assert len(str(caught.value)) < 1000
    assert not written


@contextmanager
def deaf_server() -> Iterator[str]:
    """Accepts no more connections: the next one waits to be made."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as stack:
        for _ in range(3):
            early = stack.enter_context(socket.socket())
            early.setblocking(False)
            early.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_the_deadline_holds_for_all_addresses_of_a_host_together(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **b: look_up(*a, **b) * 400)
    with deaf_server() as url:
        started = time.monotonic()
        with pytest.raises(Fault, match="connecting timed out") as caught:
            Transport().ask(url, timeout_s=0.4)
        assert 0.35 < time.monotonic() - started < 60, "400 addresses, each with its own deadline, take 160 s"
    assert caught.value.away


def test_a_second_address_is_tried_when_the_first_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo
    with deaf_server() as deaf, raw_server(sends(OK + b"Content-Length: 2\r\n\r\n{}")) as url:
        port = int(deaf.split(":")[2])
        both = [*look_up("127.0.0.1", port, type=socket.SOCK_STREAM), *look_up("127.0.0.1", int(url.split(":")[2]))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **b: both[:2])
        assert Transport().ask(url, timeout_s=2) == {}


def test_closing_ends_a_connection_that_is_being_made() -> None:
    transport, ended = Transport(), []

    def wait() -> None:
        with pytest.raises(Fault):
            transport.ask(url, timeout_s=200)
        ended.append("ended")

    with deaf_server() as url:
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        transport.close()
        thread.join(60)
        assert ended


def test_a_process_forked_from_one_that_has_asked_asks_on_connections_of_its_own() -> None:
    with raw_server(sends(OK + b"Content-Length: 2\r\n\r\n{}")) as url:
        transport = Transport()
        transport.ask(url, timeout_s=5)
        child = os.fork()
        if not child:
            os._exit(0 if transport.ask(url, timeout_s=5) == {} else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert transport.ask(url, timeout_s=5) == {}


def test_nobody_there_is_a_server_that_is_away() -> None:
    with kept_port() as port, pytest.raises(Fault) as caught:
        Transport().ask(f"http://127.0.0.1:{port}", timeout_s=5)
    assert caught.value.away


@pytest.mark.parametrize(
    "start", [b"", b"HTTP/1.1 200 OK\r\nX-Slow: ", OK + b"\r\n", OK + b"Content-Length: 99\r\n\r\n"]
)
def test_an_answer_that_drips_ends_at_its_deadline_wherever_it_drips(start: bytes) -> None:
    left = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(start)
        while not left.wait(0.05):
            connection.sendall(b"1" if start else b"")

    with raw_server(drip) as url:
        threading.Timer(60, left.set).start()
        started = time.monotonic()
        with pytest.raises(Fault, match=r"took too long|timed out"):
            Transport().ask(url, timeout_s=0.3)
        left.set()
        assert 0.25 < time.monotonic() - started < 30


def test_headers_without_end_are_left() -> None:
    def write(connection: socket.socket) -> None:
        connection.sendall(OK)
        for number in range(100_000):
            connection.sendall(b"X-%d: %s\r\n" % (number, b"x" * 1000))

    with raw_server(write) as url, pytest.raises(Fault, match="RemoteProtocolError"):
        Transport().ask(url, timeout_s=30)


def test_a_name_that_is_looked_up_too_long_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **b: time.sleep(2))
    started = time.monotonic()
    with pytest.raises(Fault, match="connecting timed out") as caught:
        Transport().ask("http://slow.invalid", timeout_s=0.2)
    assert caught.value.away
    assert time.monotonic() - started < 1.5


def test_an_exchange_carries_no_cookie_of_the_one_before() -> None:
    requests: list[str] = []
    with raw_server(sends(OK + b"Set-Cookie: a=1\r\nContent-Length: 2\r\n\r\n{}"), requests) as url:
        transport = Transport()
        for _ in range(2):
            transport.ask(url, timeout_s=5)
    assert len(requests) == 2
    assert "cookie" not in requests[1].lower()


def test_ctrl_c_ends_the_exchange_that_it_interrupts() -> None:
    gone: list[bytes] = []
    held = threading.Event()

    def hold(connection: socket.socket) -> None:
        held.set()
        gone.append(connection.recv(1))  # ends when the client hangs up

    def interrupt() -> None:
        held.wait(5)
        signal.raise_signal(signal.SIGINT)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        with raw_server(hold) as url:
            threading.Thread(target=interrupt).start()
            with pytest.raises(KeyboardInterrupt):
                Transport().ask(url, timeout_s=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert gone == [b""]


def test_an_endless_answer_is_left() -> None:
    with pytest.raises(Fault, match="longer than 1000 bytes"):
        ask(OK + b"\r\n" + b" " * 100_000, longest_answer=1000)


def test_closing_ends_an_answer_that_is_under_way_and_what_came_of_it_is_none() -> None:
    transport, outcome = Transport(), []

    def hold(connection: socket.socket) -> None:
        connection.sendall(OK + b'\r\n{"a": 1}')  # without a length, it is whole when the connection ends
        connection.recv(1)

    def wait() -> None:
        with pytest.raises(Fault, match="client was closed"):
            transport.ask(url, timeout_s=200)
        outcome.append("ended")

    with raw_server(hold) as url:
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        transport.close()
        thread.join(60)
        assert outcome == ["ended"]
        with pytest.raises(Fault, match="client was closed"):
            transport.ask(url, timeout_s=5)


def test_the_body_and_the_key_are_sent_and_the_key_is_not_shown() -> None:
    requests: list[str] = []

    def answer(connection: socket.socket) -> None:
        if not requests[0].endswith("}"):
            requests[0] += connection.recv(100).decode()
        connection.sendall(OK + b"Content-Length: 2\r\n\r\n{}")

    with raw_server(answer, requests) as url:
        Transport("k-1").ask(f"{url}/v1/x?y=1", {"a": 1}, timeout_s=5)
    assert requests[0].startswith("POST /v1/x?y=1 HTTP/1.1")
    assert "Authorization: Bearer k-1\r\n" in requests[0]
    assert requests[0].endswith('\r\n\r\n{"a": 1}')
    assert "k-1" not in repr(Transport("k-1"))


def test_an_https_server_is_reached_through_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[str] = []
    with raw_server(sends(b"HTTP/1.1 403 No\r\n\r\n"), requests) as url:
        monkeypatch.setenv("https_proxy", url.replace("//", "//me:secret@"))
        monkeypatch.setenv("no_proxy", "direct.invalid")
        with pytest.raises(Fault, match="ProxyError: 403") as caught:
            Transport().ask("https://far.invalid/v1", timeout_s=5)
        assert caught.value.away
        assert requests[0].startswith("CONNECT far.invalid:443")
        assert "Proxy-Authorization: Basic bWU6c2VjcmV0" in requests[0]
        with pytest.raises(Fault):
            Transport().ask("https://direct.invalid/v1", timeout_s=5)
        assert len(requests) == 1


@pytest.mark.parametrize("key", ["k\n", "k 1", "schlüssel", "“k”"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(UserError, match="set VLLM_API_KEY") as caught:
        Transport(key)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "", "localhost:8000", "ftp://h", "http://", "http://h:x", "http://h:70000", "http://h h",
        "http://h/v1?k=1", "http://h:1#v1", "http://me:pw@h:1",
    ],
)  # fmt: skip
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="no URL of a server"):
        checked_url(url)


def test_addresses_lose_only_their_last_slash() -> None:
    assert checked_url(" http://h:1/v1/ ") == "http://h:1/v1"
    assert checked_url("https://[::1]:8000") == "https://[::1]:8000"


@given(st.integers(1, 10_000), st.floats(0.01, 10), st.floats(0, 1e9))
def test_pauses_double_with_jitter_up_to_a_limit_and_a_server_may_ask_for_its_own(
    tries: int, first: float, asked: float
) -> None:
    whole = min(30.0, first * 2.0 ** min(tries - 1, 16))
    assert whole / 2 <= pause_before(tries, first) <= whole
    assert pause_before(tries, first, asked) == min(LONGEST_PAUSE, asked)
