"""``opd-env eval`` scores a model on tasks; ``opd-env rollout`` plays a few episodes and shows them.

Test it alone: ``pytest tests/cli/test_cli.py``
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_env.cli.progress import progress_of
from opd_env.episode.limits import RolloutLimits
from opd_env.plugins.ray.workers import connect_ray
from opd_env.settings.fields import ConfigError, import_files
from opd_env.settings.read import configure
from opd_env.tasks import load_task
from opd_env.tools.mcp.tools import register_mcp_servers

if TYPE_CHECKING:
    from rich.console import Console

    from opd_env.engines.base import Engine
    from opd_env.engines.models import LoadedModel
    from opd_env.episode.trajectory import Trajectory
    from opd_env.evaluation.chat_server import ChatServer
    from opd_env.formats import ChatFormat
    from opd_env.tasks import Task


@dataclass(frozen=True, kw_only=True)
class PlaySettings:
    """What both commands need."""

    model: str
    """packaged:student, packaged:teacher, smollm2, a folder that save_pretrained wrote, a hub id, or (eval only) the
    address of a chat server, such as http://127.0.0.1:8000/v1."""
    task_options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the task, such as a data file or difficulty levels."""
    samples: int = 1
    """Episodes per problem; more than 1 needs a temperature above 0."""
    tools: tuple[str, ...] | None = None
    """Names of the tools on offer; null takes the task's own."""
    imports: tuple[str, ...] = ()
    """Python files to run first, so that their @tool and @register_task take effect."""
    mcp_servers: Mapping[str, Any] = field(default_factory=dict)
    """MCP servers whose tools can be named in ``tools``: by a name of your choice, the options of ``mount_mcp``, such
    as ``{shop: {server: [python, shop.py]}}``."""
    ray_address: str | None = None
    """A Ray cluster to run the processes of tools in, such as auto or host:port; null runs them on this machine."""
    chat_format: str | None = None
    """Name of the chat format; null finds it from the tokenizer's template."""
    repair_calls: bool = False
    """Put small faults of calls right when they are read, and count each; scores then hold calls that were faulty."""
    limits: RolloutLimits = field(default_factory=RolloutLimits)
    """Budgets of an episode."""
    seed: int = 0
    """Seed of the sampling."""
    dtype: str = "float32"
    """Number format of the weights."""
    engine: str = "local"
    """What samples: local (transformers), vllm (in this process), or URLs of vLLM servers that serve the model, as
    a,b."""
    vllm_options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the vllm.LLM in this process, such as ``{gpu_memory_utilization: 0.5}``."""
    concurrent_episodes: int = 32
    """Episodes played side by side; memory grows with it."""

    def __post_init__(self) -> None:
        if self.chat_format is not None:
            from opd_env.formats import format_named

            format_named(self.chat_format)


@dataclass(frozen=True, kw_only=True)
class EvalSettings(PlaySettings):
    """Scores a model on tasks, with 95 % intervals. Stopped at any time, the same command continues."""

    task: tuple[str, ...]
    """Names of tasks, as a,b."""
    split: str = "test"
    """Split of the tasks."""
    problems: int | None = None
    """How many problems, the first of the split; null takes all."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the most likely token."""
    server_model: str = ""
    """Name of the model at a chat server; empty takes the only one that it serves. A key is read from
    $OPENAI_API_KEY."""
    output: str = "runs/eval"
    """Results go to output/MODEL/TASK-HASH: one folder for every model, task version and sampling."""


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(PlaySettings):
    """Plays a few episodes as training would, and shows every token's kind."""

    task: str
    """Name of the task."""
    split: str = "train"
    """Split of the task."""
    first: int = 0
    """Number of the first problem."""
    problems: int = 3
    """How many problems."""
    temperature: float = 1.0
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
    from opd_env.evaluation.run import evaluate, results_table

    _register(settings)
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
        with progress_of(f"{task.name} ({task.split})") as meter:
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
    from opd_env.evaluation.settings import describe, fingerprint_of

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

    _register(settings)
    task = load_task(settings.task, settings.split, **settings.task_options)
    last = min(settings.first + settings.problems, len(task))
    if not 0 <= settings.first < last:
        raise ConfigError(
            f"first={settings.first} and problems={settings.problems} name none of the {len(task)} of {task.name}"
        )
    engine, chat, _ = _open(settings)
    with progress_of(f"{task.name} ({task.split})") as meter:
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


def _register(settings: PlaySettings) -> None:
    import_files(settings.imports)
    register_mcp_servers(settings.mcp_servers)
    if settings.ray_address:
        connect_ray(settings.ray_address)


def _open(settings: PlaySettings) -> tuple[Engine, ChatFormat, LoadedModel]:
    from opd_env.engines.local import LocalEngine
    from opd_env.engines.models import load_model
    from opd_env.engines.servers.client import client_of
    from opd_env.engines.servers.engine import HttpEngine
    from opd_env.engines.servers.probe import probe_servers, probe_vllm
    from opd_env.engines.servers.urls import is_url
    from opd_env.engines.vllm import VLLMEngine
    from opd_env.formats import get_format

    if settings.dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype={settings.dtype!r} is unknown; use float32, bfloat16 or float16")
    if is_url(settings.model):
        raise ConfigError(f"model={settings.model!r}: a chat server tells no tokens; score it with opd-env eval")
    # For vLLM the copy here is only compared with, and must not take its memory.
    loaded = load_model(settings.model, dtype=settings.dtype, device="cpu" if settings.engine == "vllm" else None)
    chat = get_format(loaded.tokenizer, settings.chat_format, repair=settings.repair_calls)
    if settings.engine == "local":
        engine = LocalEngine(loaded.model, chat.stop_token_ids, chat.vocab_size, settings.concurrent_episodes)
        return engine, chat, loaded
    if settings.engine == "vllm":
        in_process = VLLMEngine(
            settings.model, chat.stop_token_ids, chat.vocab_size, capacity=settings.concurrent_episodes,
            max_context=settings.limits.max_tokens, dtype=settings.dtype, **settings.vllm_options,
        )  # fmt: skip
        probe_vllm(in_process, chat, loaded.model)
        return in_process, chat, loaded
    if not is_url(settings.engine):
        raise ConfigError(f"engine={settings.engine!r} is unknown; set local, vllm, or URLs of vLLM servers, as a,b")
    client = client_of(settings.engine, settings.concurrent_episodes)
    probe_servers(client, chat, loaded.model)
    return HttpEngine(client, chat.stop_token_ids, chat.vocab_size), chat, loaded


def _show(console: Console, trajectory: Trajectory, chat: ChatFormat) -> None:
    from opd_env.cli.tables import transcript_text

    verdict = "[green]correct[/]" if trajectory.correct else f"[red]wrong[/] ({trajectory.grade_reason})"
    console.rule(f"{trajectory.task} {trajectory.example_id} – {verdict}, {trajectory.stop_reason}")
    console.print(transcript_text(trajectory, chat.decode))


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("_.") or "model"
