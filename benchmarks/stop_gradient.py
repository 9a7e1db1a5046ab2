"""Stop-gradient against corrected advantages: where the same budget leads from the same start.

Every arm is `configs/demo.yaml` with another divergence and mode: the same student, teacher, problems, learning rate
and steps. Prints a table of held-out accuracy before and after with 95 % intervals, tool-call validity and the teacher
KL of the last step. Arms that are finished are not run again; a stopped one continues.

    python benchmarks/stop_gradient.py                        # one seed
    python benchmarks/stop_gradient.py --seeds 0 1 2 --jobs 2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
ARMS = {
    "reverse KL, OPD+": ("reverse_kl", "opd_plus_centred"),
    "forward KL, OPD+": ("forward_kl", "opd_plus_centred"),
    "forward KL, stop-gradient": ("forward_kl", "opd"),
    "JSD, OPD+": ("jsd", "opd_plus_centred"),
    "JSD, stop-gradient": ("jsd", "opd"),
}


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="arms at a time, one thread each (default 2)")
    parser.add_argument("--output", type=Path, default=Path("runs/stop_gradient"))
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of opd-env train")
    options = parser.parse_args()

    runs = [(label, seed) for seed in options.seeds for label in ARMS]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda run: run_arm(*run, options.output, options.options), runs))
    table = Table("arm", "seed", "before", "after", "tool-call validity", "last teacher KL")
    rows = []
    for (label, seed), result in zip(runs, results, strict=True):
        validity = result["after"]["tool_call_validity"]
        shown = "no call" if validity is None else f"{100 * validity:.1f} %"
        accuracies = percent(result["before"]), percent(result["after"])
        table.add_row(label, str(seed), *accuracies, shown, f"{result['last_kl']:.3f}")
        rows.append(
            {"arm": label, "seed": seed, **{key: result[key] for key in ("before", "after", "last_kl", "seconds")}}
        )
    console = Console(width=120)
    console.print(table)
    console.print(f"teacher: {percent(results[0]['teacher'])}")
    summary = options.output / "results.json"
    summary.write_text(json.dumps(rows, indent=1) + "\n")
    console.print(f"numbers: {summary}")


def run_arm(label: str, seed: int, output: Path, options: list[str]) -> dict[str, Any]:
    """Trains one arm in its own process, and reads what it wrote."""
    divergence, mode = ARMS[label]
    folder = output / f"{divergence}_{mode}_{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "objective.divergence": divergence, "objective.mode": mode, "run.seed": seed, "run.output": folder,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in settings.items()]
    with (output / f"{folder.name}.log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "opd_env.cli", "train", ROOT / "configs" / "demo.yaml", *words, *options],
            stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{label}, seed {seed} failed; see {log.name}")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {**results, "last_kl": last["teacher/kl"]}


def percent(found: Mapping[str, Any]) -> str:
    """Accuracy with its interval."""
    low, high = found["accuracy_ci"]
    return f"{100 * found['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    main()
