"""Evaluation results in the formats of other tools: ``inspect_ai`` logs, and ``lm-eval`` results and samples.

Worked example::

    export_evaluation("runs/eval/smollm2/gsm8k-1a2b3c4d", "inspect", "logs")      # then: inspect view --log-dir logs
    export_evaluation("runs/eval/smollm2/gsm8k-1a2b3c4d", "lm-eval", "results")

Neither package is needed to write them. What a format has no field for stands in its metadata, and what an
evaluation does not store (the gold answers) is left empty rather than guessed.

Test it alone: ``pytest tests/plugins/exports/test_exports.py``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from opd_env.errors import UserError
from opd_env.evaluation.comparison import Side, read_side
from opd_env.plugins.exports.inspect import write_inspect_log
from opd_env.plugins.exports.lm_eval import write_lm_eval

FORMATS: Mapping[str, Callable[[Side, Path], list[Path]]] = {"inspect": write_inspect_log, "lm-eval": write_lm_eval}
"""Name to the function that writes a format."""


def export_evaluation(path: str | Path, to: str, output: str | Path) -> list[Path]:
    """Writes an evaluation in another tool's format.

    Args:
        path: as for ``opd_env.evaluation.comparison.read_side``.
        to: one of ``FORMATS``.
        output: folder to write to; made if it is missing.

    Returns:
        The files that were written.

    Raises:
        UserError: an unknown format, or no evaluation there.
        StoreError: a file cannot be written.
    """
    if to not in FORMATS:
        raise UserError(f"there is no format {to!r}; there are {' and '.join(FORMATS)}")
    return FORMATS[to](read_side(path), Path(output))
