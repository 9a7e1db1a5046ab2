"""What it costs to open 10,000 stored episodes, beside reading the same file whole.

Made-up episodes of about 330 tokens are written once; then, each in a fresh process:

- ``open``: ``load_trajectories`` and its length;
- ``one``: the same, and one episode from the middle;
- ``tally``: the same, and the metrics of all of them (what ``opd-env compare`` reads);
- ``whole``: pyarrow reads the file into a table, without making episodes of it: the peer.

Run it: ``python -m benchmarks.open_trajectories`` (about a minute; 10,000 episodes take 13 MB below /tmp)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = {
    "open": "len(load_trajectories(path))",
    "one": "len(load_trajectories(path)[5000].turns)",
    "tally": "len(tally(load_trajectories(path)).played)",
    "whole": "pyarrow.parquet.read_table(path).num_rows",
}
SCRIPT = """
import sys, time
import pyarrow.parquet
from opd_env.episode.store import load_trajectories
from opd_env.evaluation.counts import tally
path = sys.argv[1]
started = time.process_time()
{case}
print(time.process_time() - started)
"""


def write(path: Path, episodes: int) -> None:
    from opd_env.episode.store import save_trajectories
    from tests.episode.trajectory_samples import make_trajectories

    save_trajectories(make_trajectories(episodes, 0.5), path)


def measure(case: str, path: Path, repeats: int) -> float:
    """CPU seconds, the best of a few runs: other work on the machine only ever adds."""
    command = [sys.executable, "-c", SCRIPT.format(case=CASES[case]), str(path)]
    return min(
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(repeats)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "episodes.parquet"
        write(path, arguments.episodes)
        size = path.stat().st_size / 1e6
        seconds = {case: measure(case, path, arguments.repeats) for case in CASES}
    print(f"{arguments.episodes} episodes, {size:.0f} MB")
    for case, taken in seconds.items():
        print(f"{case:6} {taken:8.3f} s of CPU   {taken / seconds['whole']:6.2f} x whole")


if __name__ == "__main__":
    main()
