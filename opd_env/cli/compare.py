"""``opd-env compare`` sets evaluations of the same problems against each other.

Test it alone: ``pytest tests/evaluation/test_comparison.py``
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from opd_env.cli.arguments import ArgumentParser
from opd_env.cli.tables import transcript_text
from opd_env.errors import UserError
from opd_env.evaluation.comparison import Comparison, Flip, Side, compare, named_by_model, read_side
from opd_env.report.comparison_page import metric_title, summary_sentence, write_comparison
from opd_env.report.transcript import shorten, visible


def run(command: str, arguments: Sequence[str]) -> int:
    """Carries out the command."""
    parser = ArgumentParser(
        prog="opd-env compare",
        description="Sets evaluations of the same problems against the first one: the difference of every metric with "
        "its 95 % interval, and the problems that were gained and lost. One run folder alone is compared with itself "
        "before training.",
    )
    parser.add_argument("evaluations", nargs="+", help="run folders, evaluation folders, or their results.json")
    parser.add_argument("--flips", type=int, default=10, help="flipped problems to list, of each direction (10)")
    parser.add_argument("--transcripts", type=int, default=1, help="of those, how many to show whole (1)")
    parser.add_argument("--output", default="runs/compare.html", help="the page to write (runs/compare.html)")
    chosen = parser.parse_args(list(arguments))

    first, *others = named_by_model([read_side(path) for path in _paths(chosen.evaluations)])
    comparisons = [compare(first, other) for other in others]
    page = write_comparison(comparisons, chosen.output)  # first: who reads through ``| head`` wants it too
    console = Console()
    for comparison in comparisons:
        _show(console, comparison, chosen.flips, chosen.transcripts)
    curves = [side for side in (first, *others) if len(side.curve) > 1]
    if curves:
        console.print("\nLearning curves: accuracy on held-out problems")
        console.print(_curve_table(curves))
    console.print(f"page: {page}", markup=False, soft_wrap=True, highlight=False)
    return 0


def _paths(given: Sequence[str]) -> list[Path]:
    """One run folder stands for its evaluations before and after training."""
    if len(given) > 1:
        return [Path(path) for path in given]
    if not Path(given[0]).exists():
        raise UserError(f"there is no {given[0]}; give folders that opd-env eval or opd-env train wrote")
    before, after = (Path(given[0]) / "evaluations" / name for name in ("before", "after"))
    if not before.exists() or not after.exists():
        raise UserError(f"{given[0]} alone has nothing to be compared with; give two evaluations, or a finished run")
    return [before, Path(given[0])]


def _show(console: Console, comparison: Comparison, flips: int, transcripts: int) -> None:
    console.rule(Text(f"{comparison.second.name} against {comparison.first.name}"))
    for side in (comparison.first, comparison.second):
        if side.name != side.path:
            console.print(Text(f"{side.name}: {side.path}", style="dim"), soft_wrap=True)
    console.print(Text(f"{comparison.second.label or comparison.second.settings['task']}", style="bold"))
    console.print(Text(summary_sentence(comparison)))
    for note in comparison.notes:
        console.print(Text(note, style="yellow"))
    console.print(_table(comparison))
    console.print(
        Text("  Bold: the interval leaves out 0; of twenty equal metrics, one is expected to.\n", style="dim")
    )
    for title, style, all_flips in (("gained", "green", comparison.gained), ("lost", "red", comparison.lost)):
        if not all_flips:
            continue
        console.print(Text(f"{title}: {len(all_flips)}", style=f"bold {style}"))
        for number, flip in enumerate(all_flips[:flips]):
            _show_flip(console, comparison, flip, whole=number < transcripts)
        if len(all_flips) > flips:
            console.print(Text(f"  … {len(all_flips) - flips} more (--flips)", style="dim"))


def _table(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("Metric", overflow="fold")
    for name in ("First", "Second", "Difference", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for metric in comparison.metrics:
        change = metric.difference
        shares = (f"{100 * rate.value:.1f} %" for rate in (metric.first, metric.second))
        interval = f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
        cells = (metric_title(metric.name), *shares, f"{100 * change.value:+.1f}", interval)
        table.add_row(*(Text(cell, style="bold" if change.clear else "dim") for cell in cells))
    return table


def _show_flip(console: Console, comparison: Comparison, flip: Flip, *, whole: bool) -> None:
    question = " ".join(visible(flip.question).split())
    console.print(Text.assemble(("  ", ""), (flip.example_id, "bold"), "  ", question if whole else question[:160]))
    for side, place in ((comparison.first, flip.first), (comparison.second, flip.second)):
        one = side.trajectories[place]
        mark, style = ("✓", "green") if one.correct else ("✗", "red")
        said = one.extracted or one.answer or str(one.stop_reason)
        console.print(
            Text.assemble("    ", (mark, style), f" {side.name}: ", " ".join(shorten(visible(said)).split())[:200])
        )
        if whole:
            console.print(Padding(transcript_text(one, side.decode, prompt=False), (0, 0, 0, 8)))


def _curve_table(sides: Sequence[Side]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("Step", justify="right")
    for side in sides:
        table.add_column(Text(side.name), justify="right", overflow="fold")
    curves = [dict(side.curve) for side in sides]
    for step in sorted({step for curve in curves for step in curve}):
        table.add_row(f"{step:g}", *(str(curve[step].accuracy) if step in curve else "" for curve in curves))
    return table
