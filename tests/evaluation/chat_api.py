"""A real HTTP server on this machine that speaks the chat API, or misbehaves, as a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What the server sends: a status, headers, and a body that is JSON unless it is bytes."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drip: float = 0.0
    """Seconds between bytes."""
    hang_up: bool = False
    """Close the connection instead of answering."""


def says(text: str | None, *calls: tuple[str, str], finish: str = "stop", total_tokens: int = 20) -> Answer:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"id": f"id-{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(calls)
        ]
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return Answer({"choices": [choice], "usage": {"total_tokens": total_tokens}})


@dataclass
class Api:
    url: str
    port: int
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def chat_api(
    respond: Callable[[dict[str, Any], int], Answer], models: tuple[str, ...] = ("m",), port: int = 0
) -> Iterator[Api]:
    """``respond`` gets every request's body and its number, from 0."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(Answer({"data": [{"id": name} for name in models]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(api.requests)
                api.requests.append(body)
                api.headers.append(dict(self.headers))
            self._send(respond(body, number) if self.path == "/v1/chat/completions" else Answer({}, 404))

        def _send(self, answer: Answer) -> None:
            time.sleep(answer.delay)
            if answer.hang_up:
                self.connection.close()
                return
            data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(data)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for byte in data if answer.drip else ():
                    self.wfile.write(bytes([byte]))
                    time.sleep(answer.drip)
                if not answer.drip:
                    self.wfile.write(data)
            except OSError:
                pass  # the client has lost its patience

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    server = Quiet(("127.0.0.1", port), Handler)
    api = Api(f"http://127.0.0.1:{server.server_port}/v1", server.server_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
