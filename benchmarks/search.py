"""What a large search index costs: making, saving and loading it, and a query.

    python benchmarks/search.py                     # 100,000 passages of 60 words

Words are drawn by Zipf's law, those of the queries too, so that they are mostly common ones: the slow case. A query is
timed to the passages that a student would be shown, beside bm25s's own retrieval of the same. Loading is timed in a
new process, to the first answer, without the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from opd_env.tools.builtin.search import BM25Index, Passage

LOAD_BAR_S = 0.2
QUERY_BAR_MS = 3.0
_LOAD = """
import bm25s, json, sys, time
import numpy
from opd_env.tools.builtin.search import BM25Index
start = time.perf_counter()
index = BM25Index.load(sys.argv[1])
loaded = time.perf_counter() - start
index.search(sys.argv[2], 3)
print(json.dumps([loaded, time.perf_counter() - start]))
"""


def texts(count: int, length: int, vocabulary: int, seed: int) -> list[str]:
    """Texts of made-up words."""
    generator = np.random.default_rng(seed)
    odds = 1 / np.arange(1, vocabulary + 1)
    words = np.array([f"word{number:x}" for number in range(vocabulary)])
    drawn = words[generator.choice(vocabulary, size=(count, length), p=odds / odds.sum())]
    return [" ".join(row) for row in drawn]


def milliseconds(search: Callable[[str], object], queries: list[str]) -> np.ndarray:
    """The time of each query."""
    taken = []
    for query in queries:
        start = time.perf_counter()
        search(query)
        taken.append(1000 * (time.perf_counter() - start))
    return np.asarray(taken)


def main() -> None:
    """Reads the command line, measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=300)
    arguments = parser.parse_args()
    passages = [Passage(text) for text in texts(arguments.passages, 60, 60_000, seed=0)]
    queries = texts(arguments.queries, 5, 60_000, seed=1)

    import bm25s

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        start = time.perf_counter()
        index = BM25Index(passages)
        made_s = time.perf_counter() - start
        start = time.perf_counter()
        index.save(path)
        saved_s = time.perf_counter() - start
        size = sum(file.stat().st_size for file in path.iterdir()) / 2**20
        program = [sys.executable, "-c", _LOAD, str(path), queries[0]]
        loads = [json.loads(subprocess.run(program, capture_output=True, check=True).stdout) for _ in range(5)]
        loaded_s, first_s = np.median(loads, axis=0)
        mapped = BM25Index.load(path)
        peer = bm25s.BM25.load(path, mmap=True)

        def retrieve(query: str) -> object:
            words = bm25s.tokenize([query], token_pattern=r"(?u)\w+", show_progress=False, return_ids=False)
            return peer.retrieve(words, k=3, show_progress=False)

        milliseconds(lambda query: mapped.search(query, 3), queries[:20])
        milliseconds(retrieve, queries[:20])
        own = milliseconds(lambda query: mapped.search(query, 3), queries)
        theirs = milliseconds(retrieve, queries)

    print(f"{arguments.passages:,} passages, {size:.0f} MiB on disk, load average {os.getloadavg()[0]:.1f}")
    print("| | measured | bar | times the bar | times bm25s |\n|---|---|---|---|---|")
    print(f"| made | {made_s:.1f} s | | | |\n| saved | {saved_s:.1f} s | | | |")
    print(f"| loaded | {loaded_s:.3f} s | {LOAD_BAR_S} s | {LOAD_BAR_S / loaded_s:.1f} | |")
    print(f"| loaded, to the first answer | {first_s:.3f} s | {LOAD_BAR_S} s | {LOAD_BAR_S / first_s:.1f} | |")
    for name, share in (("median", 0.5), ("95th percentile", 0.95)):
        mine, other = np.quantile(own, share), np.quantile(theirs, share)
        ratios = f"{QUERY_BAR_MS / mine:.1f} | {other / mine:.1f}"
        print(f"| query, {name} | {mine:.2f} ms | {QUERY_BAR_MS:g} ms | {ratios} |")


if __name__ == "__main__":
    main()
