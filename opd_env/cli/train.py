"""``opd-env train`` and ``opd-env report``.

Test it alone: ``pytest tests/cli/test_cli.py``
"""

from __future__ import annotations

from collections.abc import Sequence

from opd_env.cli.arguments import ArgumentParser


def run(command: str, arguments: Sequence[str]) -> int:
    """Carries out one of the two commands."""
    return _report(arguments) if command == "report" else _train(arguments)


def _train(arguments: Sequence[str]) -> int:
    from opd_env.trainer.run.config import load_config

    config = load_config(arguments)
    # torch is imported only now, so that a wrong setting is told at once
    from rich.console import Console

    from opd_env.cli.tables import before_after_table
    from opd_env.evaluation.read_run import Run
    from opd_env.report.headline import headline
    from opd_env.trainer import OPDTrainer
    from opd_env.trainer.run.processes import EndedByAnother

    try:
        trainer = OPDTrainer(config)
        results = trainer.train()
    except EndedByAnother as end:
        if end.shown:
            raise
        return 2
    if trainer.accelerator.is_main_process:
        console = Console()
        console.print(before_after_table(results))
        console.print(headline(Run.read(trainer.folder.path)), highlight=False, markup=False)
        report = trainer.folder.path / "report.html"
        console.print(f"report: {report}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _report(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(prog="opd-env report", description="Writes report.html of a run folder again.")
    parser.add_argument("run", help="the run folder, such as runs/demo")
    folder = parser.parse_args(list(arguments)).run
    from opd_env.report.page import write_report

    print(write_report(folder))
    return 0
