"""Exchanges of JSON per second: ``Transport`` (httpx2, one deadline for the whole) beside plain ``http.client``.

``http.client`` knows time-outs of one read each only: what it gains is the price of the deadline. Both ask a server in
a process of its own that answers at once, by turns, each time on a new connection; medians of all rounds are compared.

Run it: ``python benchmarks/http_exchange.py`` (half a minute on two cores)
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

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


def plain(url: str, body: Any, *, timeout_s: float) -> Any:
    """One exchange of the standard library."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    connection.request("POST", parts.path, json.dumps(body), {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


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
            ways = {"ours": Transport().ask, "plain": plain}
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for _ in range(options.rounds):
                for name, way in ways.items():
                    found[name].append(measure(way, url, tokens, threads, options.exchanges))
            rate, cpu = ({n: statistics.median(one[i] for one in rows) for n, rows in found.items()} for i in (0, 1))
            print(
                f"{size:6} bytes, {threads:2} threads: ours {rate['ours']:5.0f}/s and {cpu['ours']:4.0f} µs of CPU, "
                f"plain {rate['plain']:5.0f}/s and {cpu['plain']:4.0f} µs; "
                f"ours / plain {rate['ours'] / rate['plain']:.2f} in rate, {cpu['ours'] / cpu['plain']:.2f} in CPU",
                flush=True,
            )
        server.terminate()


if __name__ == "__main__":
    main()
