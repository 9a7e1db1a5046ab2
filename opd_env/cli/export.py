"""``opd-env export`` writes an evaluation in another tool's format.

Test it alone: ``pytest tests/plugins/exports/test_exports.py``
"""

from __future__ import annotations

from collections.abc import Sequence

from opd_env.cli.arguments import ArgumentParser
from opd_env.plugins.exports import export_evaluation


def run(command: str, arguments: Sequence[str]) -> int:
    """Carries out the command."""
    parser = ArgumentParser(
        prog="opd-env export",
        description="Writes an evaluation as an inspect_ai log, or as lm-eval results and samples.",
    )
    parser.add_argument("evaluation", help="an evaluation folder, its results.json, or a run folder")
    parser.add_argument("--to", required=True, help="inspect or lm-eval")
    parser.add_argument("--output", default="runs/export", help="folder to write to (runs/export)")
    chosen = parser.parse_args(list(arguments))

    for path in export_evaluation(chosen.evaluation, chosen.to, chosen.output):
        print(path)
    return 0
