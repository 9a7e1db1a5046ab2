"""The OPD+ paper's comparison on the packaged models, with seeds, a validation split and intervals, on a CPU.

    python -m benchmarks.opd_plus_study                       # everything; stopped, the same command continues
    python -m benchmarks.opd_plus_study --seeds 2 --arms jsd_opd jsd_opd_plus
    python -m benchmarks.opd_plus_study --finished --report benchmarks/opd_plus_study/results       # the report alone

Seeds are the outer loop: a study that is stopped has whole seeds. A finished run is never repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import yaml
from rich.console import Console

from benchmarks.opd_plus_study.analysis import share
from benchmarks.opd_plus_study.arms import ARMS, SHARED, arm_named
from benchmarks.opd_plus_study.report import machine, write_report
from benchmarks.opd_plus_study.runs import Evaluations, measure_run, record_path
from opd_env.evaluation.result import installed_versions
from opd_env.settings.fields import read_yaml

console = Console(stderr=True, highlight=False)


def main() -> None:
    """Runs what is missing, then writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, … (default 5)")
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS], help="default: all")
    parser.add_argument("--output", type=Path, default=Path("runs/opd_plus_study"))
    parser.add_argument("--report", type=Path, help="where the report goes (default: the output folder)")
    parser.add_argument("--validation", type=int, default=60, help="problems that choose the checkpoint")
    parser.add_argument("--test", type=int, default=200, help="problems that are reported")
    parser.add_argument("--finished", action="store_true", help="run nothing; report the seeds that are whole")
    parser.add_argument("--settings", type=yaml.safe_load, default={}, help="changes to study.yaml: '{run.steps: 40}'")
    options = parser.parse_args()

    runs = [(arm_named(name), seed) for seed in range(options.seeds) for name in options.arms]
    missing = [(arm, seed) for arm, seed in runs if not record_path(options.output, arm, seed).exists()]
    console.print(f"{len(runs)} runs, {len(runs) - len(missing)} finished")
    if options.finished:
        unfinished = {seed for _, seed in missing}
        runs, missing = [(arm, seed) for arm, seed in runs if seed not in unfinished], []
    started = time.perf_counter()
    for number, (arm, seed) in enumerate(missing, start=1):
        record = measure_run(arm, seed, options.output, Evaluations(options.validation, options.test), options.settings)
        left = (time.perf_counter() - started) / number * (len(missing) - number)
        console.print(
            f"{number}/{len(missing)} seed {seed} {arm.label}: {100 * share(record['chosen']['greedy']):.1f} %, "
            f"teacher KL {record['chosen']['teacher_kl']:.3f}, {record['seconds']:.0f} s, {left / 60:.0f} min left"
        )
    records = [json.loads(record_path(options.output, arm, seed).read_text(encoding="utf-8")) for arm, seed in runs]
    if not records:
        sys.exit("no seed is whole yet; start the study without --finished")
    about = {
        "command": "python -m benchmarks.opd_plus_study",
        "machine": machine(),
        "cpu_seconds": round(sum(record["cpu_seconds"] for record in records)),
        "problems": {"validation": options.validation, "test": options.test},
        "settings": read_yaml(SHARED) | options.settings,
        "versions": installed_versions(),
    }
    folder = options.report or options.output
    write_report(records, about, folder)
    console.print(f"report: {folder}")


if __name__ == "__main__":
    main()
