"""Writes what the study found: ``results.json``, ``tables.md``, ``accuracy.svg`` and ``curves.svg``.

    write_report(records, about, Path("benchmarks/opd_plus_study/results"))

Test it alone: ``pytest tests/benchmarks/test_opd_plus_study.py``
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.opd_plus_study.analysis import Accuracy, Answer, ArmSummary, OverSeeds, Record, answers, summaries
from benchmarks.opd_plus_study.arms import ARMS

PANELS = {
    "reverse KL": ("reverse_kl_opd", "reverse_kl_opd_plus", "reverse_kl_value", "reverse_kl_full"),
    "forward KL": ("forward_kl_opd", "forward_kl_opd_plus", "forward_kl_centred"),
    "JSD": ("jsd_opd", "jsd_opd_plus"),
    "others": ("total_variation", "hellinger", "constant", "reward"),
}
CURVES = {
    "teacher_kl": ("teacher KL, nats per token", "linear"),
    "accuracy": ("accuracy of rollouts (temperature 1)", "linear"),
    "grad_norm": ("gradient norm before clipping", "log"),
    "response_length": ("sampled tokens per episode", "linear"),
}


def write_report(records: Sequence[Record], about: Mapping[str, Any], folder: Path) -> None:
    """Replaces the report in ``folder``.

    Args:
        records: of finished runs, in any order.
        about: how they were made: command, settings, versions.
        folder: made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = {arm.name: place for place, arm in enumerate(ARMS)}
    records = sorted(records, key=lambda one: (one["seed"], places[one["arm"]]))
    # Most runs end at the checkpoint that was chosen: it need not stand there twice.
    lines = [json.dumps({**one, "final": None if one["final"] == one["chosen"] else one["final"]}) for one in records]
    head = json.dumps(dict(about), indent=1, ensure_ascii=False).removesuffix("\n}")
    (folder / "results.json").write_text(head + ',\n "runs": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
    (folder / "tables.md").write_text(tables(records), encoding="utf-8")
    _plot_accuracy(summaries(records), folder / "accuracy.svg")
    _plot_curves(records, folder / "curves.svg")


def machine() -> str:
    """The processor and the number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {platform.system()}"


def tables(records: Sequence[Record]) -> str:
    """Both tables as Markdown."""
    head = (
        "| arm | seeds | test accuracy | after the last step | at temperature 1 | teacher KL | tokens | over-calls "
        "| gradient norm | clipped |"
    )
    rows = [_arm_row(one) for one in summaries(records)]
    asked = "| is … better | than … ? | accuracy | problems gained, lost | p (Holm) | teacher KL | supported |"
    found = [_answer_row(one) for one in answers(records)]
    return "\n".join([head, "|" + "---|" * 10, *rows, "", asked, "|" + "---|" * 7, *found, ""])


def _arm_row(one: ArmSummary) -> str:
    label = one.arm.label + (f" (= {one.arm.same_as})" if one.arm.same_as else "")
    cells = [
        label,
        str(one.seeds),
        _percent(one.accuracy),
        f"{100 * one.accuracy_final.mean:.1f} %",
        _percent(one.accuracy_sampled),
        f"{one.teacher_kl.mean:.2f}",
        f"{one.response_length.mean:.1f}",
        f"{100 * one.over_call.mean:.1f} %",
        _number(one.grad_norm, ".2g"),
        _number(100 * one.clip_fraction, ".1f", " %"),
    ]
    return f"| {' | '.join(cells)} |"


def _answer_row(one: Answer) -> str:
    cells = [
        one.second.label,
        one.first.label,
        _difference(one.accuracy, 100, ".1f"),
        f"{one.gained}, {one.lost}",
        "< 0.0001" if one.p_value < 1e-4 else f"{one.p_value:.2g}",
        _difference(one.teacher_kl, 1, ".2f"),
        ("yes" if one.accuracy.mean > 0 else "no: worse") if one.supported else "undecided",
    ]
    return f"| {' | '.join(cells)} |"


def _percent(accuracy: Accuracy) -> str:
    low, high = accuracy.interval
    return f"{100 * accuracy.over_seeds.mean:.1f} % [{100 * low:.0f}, {100 * high:.0f}]"


def _difference(over: OverSeeds, factor: float, form: str) -> str:
    low, high = (factor * end for end in over.interval)
    interval = f" [{low:+{form}}, {high:+{form}}]" if len(over.values) > 1 else ""
    return f"{factor * over.mean:+{form}}{interval}"


def _number(value: float, form: str, unit: str = "") -> str:
    return "–" if value != value else f"{value:{form}}{unit}"


def _pyplot() -> Any:
    """Pyplot, drawing SVG files that are the same for the same numbers."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "study", "font.size": 8, "axes.grid": True})
    matplotlib.rcParams.update({"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
    import matplotlib.pyplot as pyplot

    return pyplot


def _plot_accuracy(arms: Sequence[ArmSummary], path: Path) -> None:
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 0.28 * len(arms) + 0.8), layout="constrained")
    for place, one in enumerate(arms):
        chosen, final = (
            [100 * value for value in over.values] for over in (one.accuracy.over_seeds, one.accuracy_final)
        )
        axes.scatter(final, [place] * one.seeds, s=14, facecolors="none", edgecolors="tab:grey", linewidths=0.8)
        axes.scatter(chosen, [place] * one.seeds, s=14, color="tab:blue", alpha=0.6)
        axes.plot([100 * one.accuracy.over_seeds.mean] * 2, [place - 0.3, place + 0.3], color="tab:blue", linewidth=1.5)
    axes.set_yticks(range(len(arms)), [one.arm.label for one in arms])
    axes.invert_yaxis()
    axes.set_xlim(-2, 102)
    axes.set_xlabel("test accuracy, %: a dot per seed, the bar their mean; rings after the last step")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _plot_curves(records: Sequence[Record], path: Path) -> None:
    pyplot = _pyplot()
    labels = {arm.name: arm.label for arm in ARMS}
    size = (3.2 * len(PANELS), 2.3 * len(CURVES))
    figure, grid = pyplot.subplots(len(CURVES), len(PANELS), figsize=size, layout="constrained", sharey="row")
    for row, (name, (title, scale)) in zip(grid, CURVES.items(), strict=True):
        for axes, (panel, arms) in zip(row, PANELS.items(), strict=True):
            for number, arm in enumerate(arms):
                runs = [record["curves"][name] for record in records if record["arm"] == arm]
                by_step = list(zip(*runs, strict=False))
                steps = range(1, len(by_step) + 1)
                colour = f"C{number}"
                axes.fill_between(steps, [*map(min, by_step)], [*map(max, by_step)], color=colour, alpha=0.15, lw=0)
                axes.plot(steps, [*map(mean, by_step)], color=colour, label=labels[arm], linewidth=1.5)
            axes.set_yscale(scale)
            if name == "teacher_kl":
                axes.set_title(panel)
                axes.legend(fontsize=6, frameon=False)
        row[0].set_ylabel(title)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
