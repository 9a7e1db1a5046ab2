"""Reads exports back with the real packages, and compares the numbers with those of the evaluation.

    opd-env export runs/eval/MODEL/TASK --to inspect --output exports
    opd-env export runs/eval/MODEL/TASK --to lm-eval --output exports
    pip install inspect_ai && pip install --no-deps lm_eval==0.4.13 && pip install pytablewriter jinja2
    python scripts/check_exports.py runs/eval/MODEL/TASK exports

Needs neither opd-env nor a model; inspect_ai and lm_eval may live in an environment of their own.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any


def check_inspect(file: Path, expected: dict[str, Any]) -> None:
    """The whole log, its samples and its numbers."""
    from inspect_ai.log import read_eval_log

    log = read_eval_log(str(file))
    samples = log.samples or []
    right = sum(sample.scores["correct"].value == "C" for sample in samples if sample.scores)
    found = log.results.scores[0].metrics["accuracy"].value if log.results else math.nan
    calls = sum(len(message.tool_calls or []) for s in samples for message in s.messages if message.role == "assistant")
    print(f"{file.name}: {len(samples)} samples, {right} correct, accuracy {found}, {calls} calls")
    if (len(samples), calls) != (expected["episodes"], expected["calls"]) or found != expected["accuracy"]:
        sys.exit(f"{file}: expected {expected['episodes']} samples, {expected['calls']} calls, {expected['accuracy']}")


def check_lm_eval(file: Path, expected: dict[str, Any]) -> None:
    """The harness's own table of the results, and every sample."""
    from lm_eval.utils import get_results_filenames, get_sample_results_filenames, make_table

    results = json.loads(file.read_text())
    print(make_table(results))
    (task,) = results["results"]
    names = [str(path) for path in file.parent.iterdir()]
    stamp = file.stem.removeprefix("results_")
    (samples,) = [name for name in get_sample_results_filenames(names) if stamp in name]
    rows = [json.loads(line) for line in Path(samples).read_text().splitlines()]
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    found = results["results"][task]["accuracy,none"]
    if str(file) not in get_results_filenames(names) or len(rows) != expected["n"]:
        sys.exit(f"{file}: {len(rows)} samples, expected {expected['n']}")
    if found != expected["accuracy"] or not math.isclose(mean, found):
        sys.exit(f"{file}: accuracy {found}, mean of the samples {mean}, expected {expected['accuracy']}")


def main() -> None:
    """Checks every export in the folder against one evaluation."""
    evaluation, exports = (Path(argument) for argument in sys.argv[1:3])
    expected = json.loads((evaluation / "results.json").read_text())["evaluation"]
    logs, results = sorted(exports.glob("*.json")), sorted(exports.glob("*/results_*.json"))
    for file in logs:
        check_inspect(file, expected)
    for file in results:
        check_lm_eval(file, expected)
    print(f"{len(logs)} inspect logs and {len(results)} lm-eval results agree with {evaluation}")


if __name__ == "__main__":
    main()
