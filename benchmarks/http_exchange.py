"""Exchanges of JSON per second: ``http_transport`` beside httpx2 with the same deadline for a whole exchange.

httpx2's own time-outs are for one read each, so a server that drips holds it for ever; a deadline for the whole takes
its asynchronous client, here on an event loop in a thread, with kept connections. Both ask a server in a process of its
own that answers at once, by turns; the medians of all rounds are compared.

Run it: ``python benchmarks/http_exchange.py`` (half a minute on two cores)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from opd_env.engines.servers.transport import Transport

TIMEOUT_S = 60.0


def serve(size: int, port: Any) -> None:
    """Answers every request with ``size`` characters of JSON."""
    data = json.dumps("x" * (size - 2)).encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().split(b"content-length:")[1].split(b"\r\n")[0]
                await reader.readexactly(int(length))
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0, backlog=512)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(listen())


class Httpx:
    """What ``Transport`` would be on httpx2."""

    def __init__(self) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2)
        self._client = httpx2.AsyncClient(verify=False, trust_env=False, timeout=None, limits=limits)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def ask(self, url: str, body: Any, *, timeout_s: float) -> Any:
        """One exchange."""
        data = json.dumps(body).encode()
        return json.loads(asyncio.run_coroutine_threadsafe(self._exchange(url, data, timeout_s), self._loop).result())

    async def _exchange(self, url: str, data: bytes, timeout_s: float) -> bytes:
        content = bytearray()
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        async with (
            asyncio.timeout(timeout_s),
            self._client.stream("POST", url, content=data, headers=headers) as answer,
        ):
            async for chunk in answer.aiter_raw():
                content += chunk
        return bytes(content)


def measure(ask: Callable[..., Any], url: str, tokens: int, threads: int, count: int) -> tuple[float, float]:
    """Exchanges per second, and CPU microseconds of one in this process."""
    body = {"prompt": list(range(tokens))}
    with ThreadPoolExecutor(threads) as pool:
        started, cpu = time.perf_counter(), time.process_time()
        list(pool.map(lambda _: ask(url, body, timeout_s=TIMEOUT_S), range(count)))
        return count / (time.perf_counter() - started), (time.process_time() - cpu) / count * 1e6


def main() -> None:
    """Prints a row for each size of answer and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--exchanges", type=int, default=300, help="of one way in a round")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for size, tokens in ((300, 300), (60_000, 1000)):
        port = context.Queue()
        server = context.Process(target=serve, args=(size, port), daemon=True)
        server.start()
        url = f"http://127.0.0.1:{port.get()}/v1/completions"
        for threads in (1, 64):
            ways = {"ours": Transport(), "httpx2": Httpx()}
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for _ in range(options.rounds):
                for name, way in ways.items():
                    found[name].append(measure(way.ask, url, tokens, threads, options.exchanges))
            rate, cpu = ({n: statistics.median(one[i] for one in rows) for n, rows in found.items()} for i in (0, 1))
            print(
                f"{size:6} bytes, {threads:2} threads: ours {rate['ours']:5.0f}/s and {cpu['ours']:4.0f} µs of CPU, "
                f"httpx2 {rate['httpx2']:5.0f}/s and {cpu['httpx2']:4.0f} µs; "
                f"ours / httpx2 {rate['ours'] / rate['httpx2']:.2f} in rate, {cpu['ours'] / cpu['httpx2']:.2f} in CPU",
                flush=True,
            )
        server.terminate()


if __name__ == "__main__":
    main()
