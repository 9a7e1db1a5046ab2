"""What an evaluation found, and its tables for the terminal and as Markdown.

Worked example::

    result = evaluate(load_task("arithmetic", "test"), engine, chat, limit=200)
    rich.print(results_table([result]))
    Path("results.md").write_text(results_markdown([result]))

Test it alone: ``pytest tests/evaluation/test_run.py``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import TYPE_CHECKING, Any

from opd_env.episode.rollouts import EpisodeError
from opd_env.episode.trajectory import Trajectory
from opd_env.evaluation.counts import RATES, Summary
from opd_env.evaluation.statistics import Rate

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found, and everything needed to repeat it."""

    summary: Summary
    trajectories: Sequence[Trajectory]
    """In the order of the task's examples, then of samples."""
    settings: Mapping[str, Any]
    """See ``opd_env.evaluation.run.describe``; and ``problems``, how many were played."""
    errors: Sequence[EpisodeError]
    """Episodes that the kit failed to finish; they enter no rate, and another run plays them again."""
    seconds: float
    """Wall time of this run; episodes read back from an earlier one cost none."""

    @property
    def label(self) -> str:
        """The task, its category if all problems share one, and the tools: a score with tools is always called that."""
        tools = ", ".join(self.settings["tools"])
        categories = [category for category in self.summary.by_category if category]
        task = " ".join([self.settings["task"], *(categories if len(categories) == 1 else ())])
        return f"{task} ({f'with tools: {tools}' if tools else 'no tools'})"

    def to_json(self) -> dict[str, Any]:
        """JSON values: those of ``Summary.to_json``, and how they came about."""
        return self.summary.to_json() | {
            "label": self.label,
            "settings": dict(self.settings),
            "versions": installed_versions(),
            "errors": [asdict(error) for error in self.errors],
            "seconds": self.seconds,
        }


def installed_versions() -> dict[str, str]:
    """Versions of the kit and of what its numbers depend on; packages that are not installed are left out."""
    versions = {"python": python_version()}
    for package in ("opd-env", "torch", "transformers", "tokenizers", "gymnasium", "numpy", "datasets", "peft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def results_table(results: Sequence[EvaluationResult]) -> Table:
    """A table for the terminal: a section per result, a line per metric that was observed."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("Metric", overflow="fold")
    for name in ("Value", "95 % interval", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        settings = result.settings
        about = f"{settings['split']} split, version {settings['version']}, k = {settings['samples']}"
        table.add_row(Text(f"{settings['model']} {result.label}".strip(), style="bold"))
        table.add_row(Text(about, style="dim"))
        for row in _rows(result):
            table.add_row(*(Text(cell) for cell in row[4:]))
        table.add_section()
    return table


def results_markdown(results: Sequence[EvaluationResult]) -> str:
    """The same table as Markdown."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for result in results for row in _rows(result)]
    return "\n".join(lines) + "\n"


_COLUMNS = ("Model", "Task", "Version", "k", "Metric", "Value", "95 % interval", "n")


def _rows(result: EvaluationResult) -> list[tuple[str, ...]]:
    settings = result.settings
    head = (settings["model"], result.label, f"{settings['version']} {settings['split']}", str(settings["samples"]))
    rates = [
        (*head, name, f"{100 * rate.value:.1f} %", f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]", str(rate.n))
        for name, rate in _named_rates(result.summary)
        if rate.n
    ]
    return rates + [(*head, f"repairs, {name}", str(n), "", "") for name, n in result.summary.repairs.items()]


def _named_rates(summary: Summary) -> Iterator[tuple[str, Rate]]:
    yield "accuracy", summary.accuracy
    if summary.samples > 1:
        for name, rates in (("pass", summary.pass_at_k), ("majority", summary.majority_at_k)):
            yield from ((f"{name}@{k}", rate) for k, rate in rates.items())
    yield from ((f"grader/{name}" if name in RATES else name, rate) for name, rate in summary.scores.items())
    yield from ((name, getattr(summary, name)) for name in RATES if name != "accuracy")
    for title, groups in (("level", summary.by_difficulty), ("category", summary.by_category)):
        if len(groups) > 1:
            yield from ((f"accuracy, {title} {name}", rate) for name, rate in groups.items())
