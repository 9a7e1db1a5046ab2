"""``opd-env eval`` scores a model on tasks; ``opd-env rollout`` plays a few episodes and shows them.

Test it alone: ``pytest tests/cli/test_cli.py``
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_env.episode.settings import ModelFields, SamplingFields, TaskFields
from opd_env.settings.fields import ConfigError, number
from opd_env.settings.read import configure
from opd_env.tasks import load_task

if TYPE_CHECKING:
    from rich.console import Console

    from opd_env.engines.base import Engine
    from opd_env.engines.models import LoadedModel
    from opd_env.episode.trajectory import Trajectory
    from opd_env.evaluation.chat_server import ChatServer
    from opd_env.formats import ChatFormat
    from opd_env.tasks import Task


@dataclass(frozen=True, kw_only=True)
class PlaySettings(ModelFields, TaskFields, SamplingFields):
    """What both commands set."""

    samples: int = number(1, low=1)
    """Episodes per problem; more than 1 needs a temperature above 0."""
    seed: int = number(0, low=0)
    """Seed of the sampling."""
    concurrent_episodes: int = number(32, low=1)
    """Episodes played side by side; memory grows with it."""

    def check(self) -> None:
        """Refuses what each group of fields refuses."""
        ModelFields.check(self)
        SamplingFields.check(self)


@dataclass(frozen=True, kw_only=True)
class EvalSettings(PlaySettings):
    """Scores a model on tasks, with 95 % intervals. Stopped at any time, the same command continues."""

    common = ("model", "task", "task_options", "split", "problems", "samples", "temperature", "output")
    model: str
    """packaged:student, packaged:teacher, smollm2, a folder that save_pretrained wrote, a hub id, or the address of a
    chat server, such as http://127.0.0.1:8000/v1."""
    task: tuple[str, ...]
    """Names of tasks, as a,b."""
    split: str = "test"
    """Split of the tasks."""
    problems: int | None = number(None, low=1)
    """How many problems, the first of the split; null takes all."""
    temperature: float = number(0.0, low=0, high=2)
    """Sampling temperature; 0 takes the most likely token."""
    server_model: str = ""
    """Name of the model at a chat server; empty takes the only one that it serves. A key is read from
    $OPENAI_API_KEY."""
    output: str = "runs/eval"
    """Results go to output/MODEL/TASK-HASH: one folder for every model, task version and sampling."""


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(PlaySettings):
    """Plays a few episodes as training would, and shows every token's kind."""

    common = ("model", "task", "task_options", "split", "first", "problems", "temperature", "output")
    task: str
    """Name of the task."""
    split: str = "train"
    """Split of the task."""
    first: int = number(0, low=0)
    """Number of the first problem."""
    problems: int = number(3, low=1)
    """How many problems."""
    temperature: float = number(1.0, low=0, high=2)
    """Sampling temperature; training uses 1."""
    output: str | None = None
    """Parquet file to save the trajectories to."""


def run(command: str, arguments: Sequence[str]) -> int:
    """Carries out one of the two commands."""
    if command == "eval":
        return _evaluate(configure(EvalSettings, arguments, prog="opd-env eval"))
    return _rollout(configure(RolloutSettings, arguments, prog="opd-env rollout"))


def _evaluate(settings: EvalSettings) -> int:
    from rich.console import Console

    from opd_env.engines.base import SamplingParams
    from opd_env.evaluation.chat_server import ChatServer
    from opd_env.evaluation.result import results_table
    from opd_env.evaluation.run import evaluate
    from opd_env.report.display import Display

    settings.register()
    if not settings.task:
        raise ConfigError("task is empty; name one, or several as a,b")
    tasks = [load_task(name, settings.split, **settings.task_options) for name in settings.task]
    engine, chat, model, weights = _open_any(settings)
    console = Console()
    results, folders = [], []
    for task in tasks:
        options: dict[str, Any] = {
            "model": model,
            "weights_hash": weights,
            "samples": settings.samples,
            "tools": settings.tools,
            "limits": settings.limits,
            "sampling": SamplingParams(temperature=settings.temperature),
            "seed": settings.seed,
        }
        server = engine.url if isinstance(engine, ChatServer) else ""
        folder = Path(settings.output) / _slug(model) / cache_name(task, chat, server=server, **options)
        with Display() as display:
            meter = display.episodes(f"{task.name} ({task.split})")
            result = evaluate(
                task, engine, chat, limit=settings.problems, folder=folder, progress=meter.advance,
                on_finished=meter.count, **options,
            )  # fmt: skip
        results.append(result)
        folders.append(folder)
        for error in result.errors[:1]:
            _say(console, f"{len(result.errors)} episodes failed; the first: {error.message}", "yellow")
    console.print(results_table(results))
    for result in results:
        late = result.summary.stop_reasons["time"]
        if late:
            _say(
                console,
                f"{result.label}: {late} episodes ended by limits.max_seconds and count as wrong; on a slow machine, "
                "raise it or lower concurrent_episodes",
                "yellow",
            )
    for folder in folders:
        _say(console, f"results: {folder}")
    return 0


def _say(console: Console, text: str, style: str = "") -> None:
    """A line that may hold what a tool, a server or a user wrote: brackets in it are no markup."""
    from opd_env.report.transcript import visible

    console.print(visible(text), style=style, markup=False, highlight=False, soft_wrap=True)


def cache_name(task: Task, chat: ChatFormat | None, **options: Any) -> str:
    """Name of the folder for an evaluation: readable, and another one for other settings."""
    from opd_env.evaluation.run import describe, fingerprint_of

    return f"{_slug(task.name)}-{fingerprint_of(describe(task, chat, **options))[:8]}"


def _open_any(settings: EvalSettings) -> tuple[Engine | ChatServer, ChatFormat | None, str, str]:
    """What samples, its chat format, the model's name, and the hash of its weights."""
    from opd_env.engines.models import weights_hash
    from opd_env.evaluation.chat_server import ChatServer

    if settings.model.startswith(("http://", "https://")):
        if settings.chat_format is not None or settings.repair_calls:
            raise ConfigError(
                "chat_format and repair_calls are for a model whose tokens are read here; a chat server reads calls by "
                "itself: leave them out"
            )
        server = ChatServer(settings.model, settings.server_model, concurrency=settings.concurrent_episodes)
        return server, None, server.model, ""
    engine, chat, loaded = _open(settings)
    return engine, chat, settings.model, weights_hash(loaded.model)


def _rollout(settings: RolloutSettings) -> int:
    from rich.console import Console

    from opd_env.engines.base import SamplingParams
    from opd_env.episode.rollouts import rollout
    from opd_env.episode.store import save_trajectories
    from opd_env.report.display import Display

    settings.register()
    task = load_task(settings.task, settings.split, **settings.task_options)
    last = min(settings.first + settings.problems, len(task))
    if not 0 <= settings.first < last:
        raise ConfigError(
            f"first={settings.first} and problems={settings.problems} name none of the {len(task)} of {task.name}"
        )
    engine, chat, _ = _open(settings)
    with Display() as display:
        meter = display.episodes(f"{task.name} ({task.split})")
        finished: list[Trajectory] = []

        def keep(trajectory: Trajectory) -> None:
            finished.append(trajectory)
            meter.count(trajectory)
            meter.advance(len(finished), (last - settings.first) * settings.samples)

        result = rollout(
            task,
            engine,
            chat,
            indices=range(settings.first, last),
            samples=settings.samples,
            tools=settings.tools,
            limits=settings.limits,
            sampling=SamplingParams(temperature=settings.temperature),
            seed=settings.seed,
            on_finished=keep,
        )
    console = Console()
    for trajectory in result.trajectories:
        _show(console, trajectory, chat)
    for error in result.errors:
        _say(console, f"{error.example_id} failed: {error.message}", "red")
    speed = result.sampled_tokens / result.seconds if result.seconds else 0.0
    console.print(f"{len(finished)} episodes, {result.sampled_tokens} sampled tokens, {speed:.0f} tokens/s")
    if settings.output is not None:
        _say(console, f"trajectories: {save_trajectories(result.trajectories, settings.output)}")
    return 1 if result.errors else 0


def _open(settings: PlaySettings) -> tuple[Engine, ChatFormat, LoadedModel]:
    from opd_env.engines.models import load_model
    from opd_env.engines.open import open_engine, probe_engine
    from opd_env.engines.servers.transport import is_url
    from opd_env.formats import get_format

    if is_url(settings.model):
        raise ConfigError(f"model={settings.model!r}: a chat server tells no tokens; score it with opd-env eval")
    # For vLLM the copy here is only compared with, and must not take its memory.
    loaded = load_model(settings.model, dtype=settings.dtype, device="cpu" if settings.engine == "vllm" else None)
    chat = get_format(loaded.tokenizer, settings.chat_format, repair=settings.repair_calls)
    engine = open_engine(
        settings.engine,
        loaded,
        chat,
        concurrent_episodes=settings.concurrent_episodes,
        max_context=settings.limits.max_tokens,
        dtype=settings.dtype,
        vllm_options=settings.vllm_options,
    )
    probe_engine(engine, chat, loaded.model)
    return engine, chat, loaded


def _show(console: Console, trajectory: Trajectory, chat: ChatFormat) -> None:
    from opd_env.cli.tables import transcript_text

    verdict = "[green]correct[/]" if trajectory.correct else f"[red]wrong[/] ({trajectory.grade_reason})"
    console.rule(f"{trajectory.task} {trajectory.example_id} – {verdict}, {trajectory.stop_reason}")
    console.print(transcript_text(trajectory, chat.decode))


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("_.") or "model"
