"""Evaluates a model on a task: plays every problem, grades it, and reports numbers with their intervals.

Worked example::

    result = evaluate(load_task("arithmetic", "test"), engine, chat, limit=200, folder="runs/eval")
    print(result.summary.accuracy)                  # 84.0 % [78.3, 88.4]
    rich.print(results_table([result]))

With a folder it can be killed at any time and started again: finished episodes are read back, never played
twice, and a change of settings is refused. The folder then holds ``settings.json``, ``trajectories.parquet``,
``results.json`` and ``results.md``.

Test it alone: ``pytest tests/evaluation/test_run.py``
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from opd_env.engines.base import GREEDY, Engine, SamplingParams
from opd_env.episode.files import explained, write_whole
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.rollouts import EpisodeError, rollout
from opd_env.episode.store import JOURNAL, TrajectoryWriter, load_written
from opd_env.episode.trajectory import Trajectory
from opd_env.evaluation.chat_player import play_by_chat
from opd_env.evaluation.chat_server import ChatServer
from opd_env.evaluation.counts import summarise
from opd_env.evaluation.result import EvaluationResult, results_markdown
from opd_env.formats import ChatFormat
from opd_env.messages import system, tool_message, user
from opd_env.tasks import Task
from opd_env.tools import Tool, Toolbox

_TRAJECTORIES = "trajectories"


def evaluate(
    task: Task,
    engine: Engine | ChatServer,
    chat: ChatFormat | None = None,
    *,
    model: str = "",
    weights_hash: str = "",
    samples: int = 1,
    limit: int | None = None,
    tools: Sequence[str | Tool] | None = None,
    limits: RolloutLimits | None = None,
    sampling: SamplingParams = GREEDY,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_finished: Callable[[Trajectory], None] | None = None,
) -> EvaluationResult:
    """Plays the first ``limit`` problems of ``task``, ``samples`` times each.

    Args:
        task: the problems; any split.
        engine: samples the model's turns, idle; or a chat server, which is asked in plain text.
        chat: the format of the model's tokenizer; a chat server has its own.
        model: the model's name, for the results; a folder is not continued with another model.
        weights_hash: of its weights (``opd_env.engines.models.weights_hash``); nor with other weights of that name.
        samples: episodes of each problem.
        limit: problems; None takes all.
        tools: what the model may call; by default the task's own. An empty list offers none.
        limits: budgets of an episode.
        sampling: greedy by default.
        seed: of the sampling.
        folder: where to store everything, and to continue from.
        progress: called with finished and all episodes, as they finish.
        on_finished: called with every episode that was played now, before ``progress``.

    Raises:
        ValueError: the settings make no sense together, or differ from those of the folder's results.
        StoreError: the folder cannot be used.
    """
    if samples < 1 or (limit is not None and limit < 1):
        raise ValueError(f"samples={samples} and limit={limit}: both must be at least 1")
    if samples > 1 and sampling.temperature == 0:
        raise ValueError(f"samples={samples} of greedy decoding would all be the same; set a temperature, or samples=1")
    play = _player(engine, chat)
    limits = limits or RolloutLimits()
    problems = len(task) if limit is None else min(limit, len(task))
    index_of = {task[index].id: index for index in range(problems)}
    if len(index_of) < problems:
        raise ValueError(
            f"task {task.name!r} has {len(index_of)} different ids for its first {problems} examples; results are kept "
            "by id, so every example needs its own"
        )
    settings = describe(
        task, chat, model=model, weights_hash=weights_hash, samples=samples, tools=tools, limits=limits,
        sampling=sampling, seed=seed, server=engine.url if isinstance(engine, ChatServer) else "",
    )  # fmt: skip
    started = time.perf_counter()
    finished: dict[tuple[str, int], Trajectory] = {}
    if folder is not None:
        _claim(Path(folder), settings)
        stored = load_written(folder, _TRAJECTORIES) or ()
        finished = {(one.example_id, one.sample): one for one in stored if one.example_id in index_of}
    missing = [
        (index, sample) for key, index in index_of.items() for sample in range(samples) if (key, sample) not in finished
    ]
    errors: list[EpisodeError] = []
    journal = folder is not None and (Path(folder) / f"{_TRAJECTORIES}{JOURNAL}").exists()  # a kill prevented its end
    if missing or journal:
        with ExitStack() as stack:
            writer = None if folder is None else stack.enter_context(TrajectoryWriter(folder, _TRAJECTORIES))

            def keep(trajectory: Trajectory) -> None:
                if writer is not None:
                    writer.append(trajectory)
                finished[trajectory.example_id, trajectory.sample] = trajectory
                if on_finished is not None:
                    on_finished(trajectory)
                if progress is not None:
                    progress(len(finished), problems * samples)

            errors = play(
                task, episodes=missing, tools=tools, limits=limits, sampling=sampling, seed=seed, on_finished=keep
            )
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
        write_whole(Path(folder) / "results.md", results_markdown([result]))
    return result


def describe(
    task: Task,
    chat: ChatFormat | None,
    *,
    model: str,
    samples: int,
    tools: Sequence[str | Tool] | None,
    limits: RolloutLimits,
    sampling: SamplingParams,
    seed: int,
    weights_hash: str = "",
    server: str = "",
) -> dict[str, Any]:
    """The settings of an evaluation; equal for evaluations that may share their episodes.

    Args:
        task, samples, tools, limits, sampling, seed: as for ``evaluate``.
        chat: the model's chat format; None for a chat server, which has its own.
        model: its name.
        weights_hash: of its weights, when they can be read: tells two models of one name apart.
        server: address of the chat server; tells them apart where the weights cannot be read.
    """
    first = task.tools_of(task[0]) if tools is None else tools
    with Toolbox(first) as toolbox:
        schemas, levels = toolbox.schemas, toolbox.sandbox_levels()
    names = [schema["function"]["name"] for schema in schemas]
    each_its_own = tools is None and list(first) != list(task.tools)
    return {
        "model": model,
        "weights_hash": weights_hash,
        "server": server,
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
        "chat_format": "chat completions" if chat is None else chat.name,
        "prompt_hash": fingerprint_of([task[0].messages, schemas]),
        "template_hash": "" if chat is None else _template_hash(chat),
        # Said only when on: folders from before there was a choice can still be continued.
        **({"repair_calls": True} if chat is not None and chat.repair else {}),
    }


def fingerprint_of(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a JSON value."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _player(engine: Engine | ChatServer, chat: ChatFormat | None) -> Callable[..., list[EpisodeError]]:
    if isinstance(engine, ChatServer):
        return partial(play_by_chat, server=engine)
    if chat is None:
        raise ValueError("an engine needs the chat format of its model's tokenizer: chat=get_format(tokenizer)")
    return lambda task, **options: rollout(task, engine, chat, **options).errors


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


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _template_hash(chat: ChatFormat) -> str:
    """Tells apart two ways of writing the same conversation, whatever the task."""
    tool = {"name": "probe", "description": "Probes.", "parameters": {"type": "object", "properties": {}}}
    prompt = chat.render_prompt(
        [system("Be a probe."), user("What is asked?")], [{"type": "function", "function": tool}]
    )
    return fingerprint_of(chat.decode(prompt + chat.render_tool_results([tool_message("probe", "This.")])))
