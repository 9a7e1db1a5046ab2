"""An evaluation as a log of ``inspect_ai``, for ``inspect view`` and ``read_eval_log``.

The JSON form of log version 2 (https://inspect.aisi.org.uk/eval-logs.html). A problem is a sample there, and each of
its episodes an epoch. Text is what the model wrote; calls stand beside it with the errors that their tools answered.

Test it alone: ``pytest tests/plugins/exports/test_exports.py``
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opd_env.episode.files import write_whole
from opd_env.episode.trajectory import CallRecord, StopReason, Trajectory, TurnRecord
from opd_env.evaluation.comparison import Side
from opd_env.evaluation.counts import fractions, rate_of
from opd_env.evaluation.run import fingerprint_of
from opd_env.evaluation.statistics import standard_error
from opd_env.formats import FORMATS, parse_hermes
from opd_env.formats.json_calls import DECODER
from opd_env.tools import ToolErrorKind

_ERRORS = {
    ToolErrorKind.TIMEOUT: "timeout",
    ToolErrorKind.OUTPUT_LIMIT: "limit",
    ToolErrorKind.BUDGET: "limit",
    ToolErrorKind.SANDBOX: "sandbox_unavailable",
    ToolErrorKind.EXCEPTION: "unknown",
}
"""The other kinds say that the call could not be read or did not fit: ``parsing``."""
_LIMITS = {
    StopReason.TURN_LENGTH: ("token", "max_turn_tokens"),
    StopReason.EPISODE_LENGTH: ("token", "max_tokens"),
    StopReason.MAX_TURNS: ("message", "max_turns"),
    StopReason.MAX_TOOL_CALLS: ("operator", "max_tool_calls"),
    StopReason.MAX_ERRORS: ("operator", "max_errors"),
    StopReason.TIME: ("time", "max_seconds"),
}


def write_inspect_log(side: Side, output: Path) -> list[Path]:
    """Writes one log."""
    settings = side.settings
    name = f"{settings['task']}{'_with_tools' if settings['tools'] else ''}"
    finished = datetime.fromtimestamp(side.finished, UTC).replace(microsecond=0).isoformat()
    identity = fingerprint_of([dict(settings), finished])
    path = output / f"{finished.replace(':', '-')}_{name.replace('_', '-')}_{identity}.json"
    log = {
        "version": 2,
        "status": "success",
        "eval": _spec(side, name, identity, finished),
        "plan": {"name": "plan", "steps": [{"solver": "opd_env", "params": {"tools": settings["tools"]}}]},
        "results": _results(side),
        "stats": {"started_at": finished, "completed_at": finished, "model_usage": {}},
        "samples": [_sample(one, settings) for one in side.trajectories],
    }
    write_whole(path, json.dumps(log, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    return [path]


def _spec(side: Side, name: str, identity: str, finished: str) -> dict[str, Any]:
    settings = side.settings
    sampling = settings["sampling"]
    generate = {name: sampling[name] for name in ("temperature", "top_p", "max_tokens") if name in sampling}
    return {
        **dict.fromkeys(("eval_id", "run_id", "task_id"), identity),
        "created": finished,
        "task": name,
        "task_version": settings["version"],
        "task_display_name": side.label,
        "dataset": {"name": f"{settings['task']} ({settings['split']})", "samples": len(side.table.played)},
        "model": f"opd_env/{settings['model']}",
        "model_generate_config": generate | {"seed": settings["seed"]},
        "config": {"epochs": settings["samples"], "limit": settings.get("problems")},
        "packages": dict(side.versions),
        "metadata": {"settings": dict(settings)},
    }


def _results(side: Side) -> dict[str, Any]:
    metrics: dict[str, dict[str, Any]] = {}
    for name, fraction in fractions(side.table).items():
        found = rate_of(fraction)
        if found.n:
            numbers = {name: found.value, f"{name}_stderr": standard_error(*fraction)}
            numbers |= {f"{name}_low": found.low, f"{name}_high": found.high}
            metrics |= {key: {"name": key, "value": value} for key, value in numbers.items() if value == value}
    episodes = len(side.trajectories)
    score = {"name": "correct", "scorer": "opd_env", "scored_samples": episodes, "metrics": metrics}
    return {"total_samples": episodes, "completed_samples": episodes, "scores": [score]}


def _sample(one: Trajectory, settings: Mapping[str, Any]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": one.question, "source": "input"}]
    for number, turn in enumerate(one.turns):
        messages += _turn(turn, number, settings)
        if turn.user is not None:
            messages.append({"role": "user", "content": turn.user, "source": "input"})
    said = [message for message in messages if message["role"] == "assistant"]
    choices = [{"message": said[-1], "stop_reason": _stop_reason(one)}] if said else []
    score = {
        "value": "C" if one.correct else "I",
        "answer": one.extracted if one.extracted is not None else one.answer,
        "explanation": one.grade_reason,
        "metadata": dict(one.scores),
    }
    sample: dict[str, Any] = {
        "id": one.example_id,
        "epoch": one.sample + 1,
        "input": one.question,
        "target": "",
        "messages": messages,
        "output": {"model": settings["model"], "choices": choices, "completion": said[-1]["content"] if said else ""},
        "scores": {"correct": score},
        "metadata": {
            "stop_reason": str(one.stop_reason),
            "difficulty": one.difficulty,
            "category": one.category,
            "sampled_tokens": one.num_sampled if len(one.token_ids) else None,
            "drift": one.drift,
            "rows": len(one.row_starts),
        },
        "total_time": one.seconds,
    }
    if one.stop_reason in _LIMITS:
        kind, name = _LIMITS[one.stop_reason]
        sample["limit"] = {"type": kind, "limit": settings["limits"][name], "reason": str(one.stop_reason)}
    return sample


def _turn(turn: TurnRecord, number: int, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    family = FORMATS.get(settings.get("chat_format", ""))
    parsed = (parse_hermes if family is None else family.parser)(turn.text)
    # The blocks are left out of the text where they are known to be these calls.
    content = parsed.content if len(parsed.calls) == len(turn.calls) and turn.calls else turn.text
    message = {"role": "assistant", "content": content, "source": "generate", "model": settings["model"]}
    named = [(call, f"call_{number}_{index}") for index, call in enumerate(turn.calls)]
    if named:
        message["tool_calls"] = [_call(*pair) for pair in named]
    return [message, *(_answer(*pair) for pair in named)]


def _call(call: CallRecord, identity: str) -> dict[str, Any]:
    try:
        arguments = DECODER.decode(call.arguments)  # a log may hold neither NaN nor half of a surrogate pair
    except (ValueError, RecursionError):
        arguments = None
    made = {"id": identity, "function": call.name or "unreadable", "arguments": arguments}
    return made if isinstance(arguments, dict) else {**made, "arguments": {}, "parse_error": call.arguments}


def _answer(call: CallRecord, identity: str) -> dict[str, Any]:
    made = {"role": "tool", "content": call.output, "tool_call_id": identity, "function": call.name or "unreadable"}
    if call.error is None:
        return made
    return {**made, "error": {"type": _ERRORS.get(call.error, "parsing"), "message": f"{call.error}: {call.output}"}}


def _stop_reason(one: Trajectory) -> str:
    if one.stop_reason is StopReason.TURN_LENGTH:
        return "max_tokens"
    if one.stop_reason is StopReason.EPISODE_LENGTH:
        return "model_length"
    return "tool_calls" if one.turns and one.turns[-1].calls else "stop"
