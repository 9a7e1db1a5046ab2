"""Writes ``report.html`` of a run: one self-contained page, without scripts and without requests.

Worked example::

    path = write_report("runs/demo")        # runs/demo/report.html

It shows what is there: a run that was stopped early has curves but no headline, an ``opd-env eval`` folder has a
headline but no curves. Everything that a model or a tool wrote is escaped, and the page forbids scripts.

Test it alone: ``pytest tests/report/test_page.py``
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from opd_env.episode.files import write_whole
from opd_env.episode.trajectory import Decode, Trajectory
from opd_env.evaluation.read_run import Model, Run
from opd_env.report.charts import Series, line_chart, rate_dots, short_number
from opd_env.report.headline import headline, percent
from opd_env.report.names import BEHAVIOUR, CHARTS, PHASES, Chart
from opd_env.report.transcript import choose_examples, shorten, transcript, visible

EXAMPLES = 6
"""Problems whose episodes are shown."""


def write_report(run_folder: str | Path) -> Path:
    """Writes the report of a run, or of an evaluation, into its folder.

    Args:
        run_folder: holds any of ``config.yaml``, ``results.json``, ``metrics.jsonl`` and ``evaluations/``. With
            a ``tokenizer.json`` anywhere below, transcripts are shown token by token. A file
            ``evaluations/NAME/log_ratios.json`` (``{"example_id/sample": [teacher − student log-prob of every
            sampled token]}``) adds the teacher's opinion to them.

    Raises:
        ValueError: the folder holds nothing to report, or a file in it is damaged (file and line are named).
        StoreError: the report cannot be written.
    """
    run = Run.read(run_folder)
    path = Path(run_folder) / "report.html"
    write_whole(path, template("report.html.jinja").render(_context(run)))
    return path


def _context(run: Run) -> dict[str, Any]:
    models = list(run.models.values())
    episodes = _episodes(models, run.decode)
    blocks = [block for episode in episodes for _, _, played in episode["played"] for block in played]
    return {
        "name": run.name,
        "label": models[-1].label if models else "",
        "config_text": run.config_text,
        "facts": _facts(run),
        "models": models,
        "headline": headline(run),
        "chart_groups": _charts(run),
        "phases": _phases(run.metrics),
        "behaviour": _behaviour(models),
        "levels": _groups(models, "by_difficulty", "Level {}"),
        "categories": _groups(models, "by_category", "{}"),
        "stops": _counts(models, "stop_reasons"),
        "tool_errors": _counts(models, "tool_errors"),
        "retried": any(model.summary.retries for model in models if model.summary is not None),
        "episodes": episodes,
        "thinks": any(passage.kind == "thinking" for block in blocks for passage in block.passages),
        "by_token": run.decode is not None,
        "shaded": any(model.log_ratios for model in models),
        "versions": run.results.get("versions") or run.results.get("evaluation", {}).get("versions", {}),
        "steps": len({row.get("step") for row in run.metrics}),
    }


def _facts(run: Run) -> list[tuple[str, str]]:
    """What was run, in few words: name and value."""
    evaluation = run.results.get("evaluation", {})
    played = evaluation.get("settings", {})
    facts = {"task": run.setting("task") or played.get("task"), "model": played.get("model")}
    facts |= {"student": run.setting("student.model"), "teacher": run.teacher}
    for name in (
        "objective.divergence", "objective.mode", "objective.estimator", "run.steps", "sampling.episodes_per_step",
        "optimizer.learning_rate",
    ):  # fmt: skip
        facts[name.rpartition(".")[2].replace("_", " ")] = run.setting(name)
    facts |= {"samples": played.get("samples"), "seed": played.get("seed", run.setting("run.seed"))}
    facts["config hash"] = run.results.get("config_hash")
    seconds = run.results.get("seconds", evaluation.get("seconds"))
    facts["time"] = None if seconds is None else _duration(seconds)
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _charts(run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """Groups of charts: title, latest value and picture of every metric that was logged."""
    logged = {name for row in run.metrics for name, value in row.items() if math.isfinite(_number(value))} - {"step"}
    named = {name for charts in CHARTS.values() for name in charts}
    unnamed = sorted(name for name in logged - named if not name.startswith(("time/", "eval/")))
    groups = CHARTS | {"Everything else": {name: Chart(name) for name in unnamed}}
    pictures = {
        group: [_picture(run, name, chart) for name, chart in charts.items() if name in logged]
        for group, charts in groups.items()
    }
    return [(group, drawn) for group, drawn in pictures.items() if drawn]


def _picture(run: Run, name: str, chart: Chart) -> dict[str, Any]:
    # A line that lacks the metric is of something else (an evaluation); one that has null is a gap.
    rows = [(number, row) for number, row in enumerate(run.metrics, start=1) if name in row]
    steps, values = [_number(row.get("step", number)) for number, row in rows], [_number(row[name]) for _, row in rows]
    series, reference = [Series("rollouts", steps, values)], None
    if chart.rate:
        evaluated = rate_dots("held-out problems", [(step, getattr(one, chart.rate)) for step, one in run.evaluated])
        series += [evaluated] if evaluated.values else []
        reference = _teacher_line(run, chart.rate)
    latest = next(value for value in reversed(values) if math.isfinite(value))
    return {
        "title": chart.title,
        "latest": percent(latest) if chart.percent else short_number(latest),
        "svg": line_chart(series, reference=reference, percent=chart.percent),
        "note": chart.note,
    }


def _teacher_line(run: Run, field: str) -> tuple[str, float] | None:
    """The teacher's rate, of a mixture the highest of its members."""
    rates = {one.title.lower(): getattr(one.summary, field) for one in run.teachers if one.summary is not None}
    return max(((name, rate.value) for name, rate in rates.items() if rate.n), key=itemgetter(1), default=None)


def _phases(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float]]:
    """Where the time went: name, duration and share of the sum."""
    totals = {title: float(np.nansum([_number(row.get(name)) for row in metrics])) for name, title in PHASES.items()}
    whole = sum(totals.values())
    return [(title, _duration(total), total / whole) for title, total in totals.items() if total > 0]


def _behaviour(models: Sequence[Model]) -> list[dict[str, Any]]:
    """One row per rate that was observed of any model."""
    rows = []
    for name, (title, note) in BEHAVIOUR.items():
        rates = [(model, getattr(model.summary, name)) for model in models if model.summary is not None]
        if any(rate.n for _, rate in rates):
            rows.append({"title": title, "note": note, "rates": rates})
    return rows


def _groups(models: Sequence[Model], field: str, title: str) -> list[dict[str, Any]]:
    """Accuracy per group of problems; nothing when there is only one."""
    known = [(model, getattr(model.summary, field)) for model in models if model.summary is not None]
    names = sorted({name for _, rates in known for name in rates})
    rows = []
    for name in names if len(names) > 1 else ():
        rates = [(model, by_name[name]) for model, by_name in known if name in by_name]
        rows.append({"title": title.format(name), "note": f"{rates[0][1].n} problems", "rates": rates})
    return rows


def _counts(models: Sequence[Model], field: str) -> dict[str, Any]:
    """The names that were counted for any model, and per model their counts and shares."""
    known = [(model, getattr(model.summary, field)) for model in models if model.summary is not None]
    names = [name for name in (known[0][1] if known else ()) if any(counts.get(name) for _, counts in known)]
    rows = [
        (model, [(name, counts.get(name, 0), counts.get(name, 0) / max(1, sum(counts.values()))) for name in names])
        for model, counts in known
    ]
    return {"names": names, "rows": rows}


def _episodes(models: Sequence[Model], decode: Decode | None) -> list[dict[str, Any]]:
    """Problems to read, each with the episode of every model but the teacher."""
    shown = [model for model in models if model.key != "teacher" and len(model.trajectories)]
    if not shown:
        return []
    solved = [{key: one.correct for key, one in model.first_episodes.items()} for model in shown]
    episodes = []
    for example_id in choose_examples(solved[0] if len(shown) > 1 else {}, solved[-1], EXAMPLES):
        played = []
        for model in shown:
            one = model.trajectories[model.first_episodes[example_id].place]
            played.append((model, one, transcript(one, decode, _log_ratio(model, one))))
        episodes.append({"question": shorten(played[-1][1].question), "played": played})
    return episodes


def _log_ratio(model: Model, trajectory: Trajectory) -> Any:
    """Shape ``[T]``; None when it was not stored."""
    values = model.log_ratios.get(f"{trajectory.example_id}/{trajectory.sample}")
    if values is None or len(values) != trajectory.num_sampled:
        return None
    ratio_T = np.zeros(len(trajectory.token_ids), dtype=np.float32)
    ratio_T[trajectory.sampled] = values
    return ratio_T


def template(name: str) -> Any:
    """A template of ``opd_env/report/templates``: in pages, everything that a model or a tool wrote is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("opd_env.report"),
        autoescape=lambda name: name is not None and ".md" not in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {"percent": percent, "code": _code}
    environment.globals["shade"] = _shade
    return environment.get_template(name)


def _shade(log_ratio: float) -> Markup:
    """Style of a token: a bar below it, as strong as teacher and student differ (full at 2 nats)."""
    colour, strength = "--more" if log_ratio > 0 else "--less", min(100, round(50 * abs(log_ratio)))
    return Markup(f"box-shadow:inset 0 -.22em color-mix(in srgb,var({colour}) {strength}%,transparent)")


def _code(value: object) -> str:
    """As code of Markdown; a bar would end the cell of a table."""
    text = str(value).replace("`", "").replace("|", "\\|")
    return f"`{text}`"


def _number(value: object) -> float:
    """NaN, a gap in a curve, for what is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
