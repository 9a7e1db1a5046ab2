"""``opd-env certify``: the exact-gradient table, for users' own divergences too.

Test it alone: ``pytest tests/cli/test_cli.py``
"""

from __future__ import annotations

from collections.abc import Sequence

from opd_env.cli.arguments import ArgumentParser


def run(command: str, arguments: Sequence[str]) -> int:
    """Prints the table; exit code 1 when a row is not what the mathematics says."""
    parser = ArgumentParser(
        prog=f"opd-env {command}",
        description="Compares the expected update of every divergence, mode, estimator and baseline with autograd's "
        "exact gradient (float64, enumerated vocabulary). Exit code 1 on a mismatch.",
    )
    parser.add_argument("divergences", nargs="*", help="names; all registered ones by default")
    parser.add_argument("--imports", action="append", default=[], help="a Python file that registers your own")
    parser.add_argument("--vocab", type=int, default=50, help="size of the vocabulary (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the random distributions (default 0)")
    options = parser.parse_args(list(arguments))
    from rich.console import Console

    from opd_env.settings.fields import import_files
    from opd_env.trainer.math.certify import print_certification, run_certification

    import_files(options.imports)
    certification = run_certification(options.divergences or None, vocab=options.vocab, seed=options.seed)
    print_certification(Console(), certification)
    return 0 if certification.ok else 1
