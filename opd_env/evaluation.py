"""Evaluates a model on a task: plays every problem, grades it, and reports numbers with their intervals.

Worked example::

    result = evaluate(load_task("arithmetic", "test"), engine, chat, limit=200, folder="runs/eval")
    print(result.summary.accuracy)                  # 84.0 % [78.3, 88.4]
    rich.print(results_table([result]))

With a folder it can be killed at any time and started again: finished episodes are read back, never played
twice, and a change of settings is refused. The folder then holds ``settings.json``, ``trajectories.parquet``,
``results.json`` and ``results.md``.

Test it alone: ``pytest tests/core/test_evaluation.py``
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any

from opd_env.engine import GREEDY, Engine, SamplingParams
from opd_env.formats import ChatFormat
from opd_env.limits import RolloutLimits
from opd_env.metrics import Summary, summarise
from opd_env.rollouts import EpisodeError, rollout
from opd_env.statistics import Rate
from opd_env.store import TrajectoryWriter, load_trajectories
from opd_env.tasks import Task
from opd_env.tools import Tool, Toolbox
from opd_env.trajectory import Trajectory
from opd_env.trajectory_files import JOURNAL, PARQUET, explained, whole_or_nothing

if TYPE_CHECKING:
    from rich.table import Table

_TRAJECTORIES = "trajectories"


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found, and everything needed to repeat it."""

    summary: Summary
    trajectories: Sequence[Trajectory]
    """In the order of the task's examples, then of samples."""
    settings: Mapping[str, Any]
    """Task, split, version, tools and the level of their sandbox, sampling, limits, seed, model, chat format, and a
    hash of the first prompt."""
    errors: Sequence[EpisodeError]
    """Episodes that the kit failed to finish; they enter no rate, and another run plays them again."""
    seconds: float
    """Wall time of this run; episodes read back from an earlier one cost none."""

    @property
    def label(self) -> str:
        """The task and what the model could use: a score with tools is always called that."""
        tools = ", ".join(self.settings["tools"])
        return f"{self.settings['task']} ({f'with tools: {tools}' if tools else 'no tools'})"

    def to_json(self) -> dict[str, Any]:
        """JSON values: those of ``Summary.to_json``, and how they came about."""
        return self.summary.to_json() | {
            "label": self.label,
            "settings": dict(self.settings),
            "versions": installed_versions(),
            "errors": [asdict(error) for error in self.errors],
            "seconds": self.seconds,
        }


def evaluate(
    task: Task,
    engine: Engine,
    chat: ChatFormat,
    *,
    model: str = "",
    samples: int = 1,
    limit: int | None = None,
    tools: Sequence[str | Tool] | None = None,
    limits: RolloutLimits | None = None,
    sampling: SamplingParams = GREEDY,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Plays the first ``limit`` problems of ``task``, ``samples`` times each.

    Args:
        task: the problems; any split.
        engine: samples the model's turns; idle.
        chat: the format of the model's tokenizer.
        model: the model's name, for the results; a folder is not continued with another model.
        samples: episodes of each problem.
        limit: problems; None takes all.
        tools: what the model may call; by default the task's own. An empty list offers none.
        limits: budgets of an episode.
        sampling: greedy by default.
        seed: of the sampling.
        folder: where to store everything, and to continue from.
        progress: called with finished and all episodes, as they finish.

    Raises:
        ValueError: the settings make no sense together, or differ from those of the folder's results.
        StoreError: the folder cannot be used.
    """
    if samples < 1 or (limit is not None and limit < 1):
        raise ValueError(f"samples={samples} and limit={limit}: both must be at least 1")
    if samples > 1 and sampling.temperature == 0:
        raise ValueError(f"samples={samples} of greedy decoding would all be the same; set a temperature, or samples=1")
    limits = limits or RolloutLimits()
    problems = len(task) if limit is None else min(limit, len(task))
    index_of = {task[index].id: index for index in range(problems)}
    if len(index_of) < problems:
        raise ValueError(
            f"task {task.name!r} has {len(index_of)} different ids for its first {problems} examples; results are kept "
            "by id, so every example needs its own"
        )
    settings = _settings(task, chat, model, samples, tools, limits, sampling, seed)
    started = time.perf_counter()
    finished: dict[tuple[str, int], Trajectory] = {}
    if folder is not None:
        _claim(Path(folder), settings)
        finished = {(one.example_id, one.sample): one for one in _stored(Path(folder)) if one.example_id in index_of}
    missing = [
        (index, sample) for key, index in index_of.items() for sample in range(samples) if (key, sample) not in finished
    ]
    errors: list[EpisodeError] = []
    if missing:
        with ExitStack() as stack:
            writer = None if folder is None else stack.enter_context(TrajectoryWriter(folder, _TRAJECTORIES))

            def keep(trajectory: Trajectory) -> None:
                if writer is not None:
                    writer.append(trajectory)
                finished[trajectory.example_id, trajectory.sample] = trajectory
                if progress is not None:
                    progress(len(finished), problems * samples)

            errors = rollout(
                task, engine, chat, episodes=missing, tools=tools, limits=limits, sampling=sampling, seed=seed,
                on_finished=keep,
            ).errors  # fmt: skip
    trajectories = sorted(finished.values(), key=lambda one: (index_of[one.example_id], one.sample))
    result = EvaluationResult(
        summary=summarise(trajectories),
        trajectories=trajectories,
        settings=settings | {"problems": problems},
        errors=errors,
        seconds=time.perf_counter() - started,
    )
    if folder is not None:
        _write_json(Path(folder) / "results.json", {"evaluation": result.to_json()})
        _write(Path(folder) / "results.md", results_markdown([result]))
    return result


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


def installed_versions() -> dict[str, str]:
    """Versions of the kit and of what its numbers depend on; packages that are not installed are left out."""
    versions = {"python": python_version()}
    for package in ("opd-env", "torch", "transformers", "tokenizers", "gymnasium", "numpy", "datasets", "peft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


_BEHAVIOUR = (
    "tool_call_validity", "parse_rate", "name_rate", "argument_rate", "execution_rate", "called", "malformed",
    "abstained", "over_call", "under_call", "repeated", "recovery", "truncated",
)  # fmt: skip
_COLUMNS = ("Model", "Task", "Version", "k", "Metric", "Value", "95 % interval", "n")


def _rows(result: EvaluationResult) -> list[tuple[str, ...]]:
    summary = result.summary
    rates: dict[str, Rate] = {"accuracy": summary.accuracy}
    if summary.samples > 1:
        rates |= {f"pass@{k}": summary.pass_at_k[k] for k in summary.pass_at_k}
    rates |= summary.scores
    rates |= {name: getattr(summary, name) for name in _BEHAVIOUR}
    settings = result.settings
    head = (settings["model"], result.label, f"{settings['version']} {settings['split']}", str(settings["samples"]))
    return [
        (*head, name, f"{100 * rate.value:.1f} %", f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]", str(rate.n))
        for name, rate in rates.items()
        if rate.n
    ]


def _settings(
    task: Task,
    chat: ChatFormat,
    model: str,
    samples: int,
    tools: Sequence[str | Tool] | None,
    limits: RolloutLimits,
    sampling: SamplingParams,
    seed: int,
) -> dict[str, Any]:
    first = task.tools_of(task[0]) if tools is None else tools
    with Toolbox(first) as toolbox:
        schemas, levels = toolbox.schemas, toolbox.sandbox_levels()
    names = [schema["function"]["name"] for schema in schemas]
    each_its_own = tools is None and list(first) != list(task.tools)
    prompt = chat.decode(chat.render_prompt(task[0].messages, schemas))
    return {
        "model": model,
        "task": task.name or type(task).__name__,
        "version": task.version,
        "split": task.split,
        "size": len(task),
        "tools": ["each problem's own"] if each_its_own else names,
        "samples": samples,
        "sampling": asdict(sampling) | {"max_tokens": limits.max_turn_tokens},
        "limits": asdict(limits),
        "seed": seed,
        "sandbox": levels or None,
        "chat_format": chat.name,
        "prompt_hash": hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()[:16],
    }


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder this evaluation's own, or refuses it because it is another's."""
    path = folder / "settings.json"
    if not path.exists():
        _write_json(path, settings)
        return
    with explained(path):
        text = path.read_text(encoding="utf-8")
    try:
        before: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); choose another folder, or remove this one") from error
    names = [*settings, *(name for name in before if name not in settings)]
    changes = [f"{n} was {before.get(n)!r}, now {settings.get(n)!r}" for n in names if before.get(n) != settings.get(n)]
    if changes:
        raise ValueError(
            f"{folder} holds results of other settings: {'; '.join(changes)}. Choose another folder, or remove this one"
        )


def _stored(folder: Path) -> Sequence[Trajectory]:
    """Episodes of earlier runs; the journal counts while there is one."""
    for suffix in (JOURNAL, PARQUET):
        path = folder / f"{_TRAJECTORIES}{suffix}"
        if path.exists():
            return load_trajectories(path)
    return ()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _write(path: Path, text: str) -> None:
    with explained(path), whole_or_nothing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
