"""What an evaluation was: everything that its numbers depend on, as JSON values.

Worked example::

    settings = describe(task, chat, model="smollm2", samples=4, tools=None, limits=limits, sampling=sampling, seed=0)
    settings["prompt_hash"]                     # what is asked: equal for every model
    fingerprint_of(settings)                    # names the folder in which results are kept

Test it alone: ``pytest tests/evaluation/test_run.py``
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Any

from opd_env.engines.base import SamplingParams
from opd_env.episode.limits import RolloutLimits
from opd_env.formats import ChatFormat
from opd_env.messages import system, tool_message, user
from opd_env.tasks import Task
from opd_env.tools import Tool, Toolbox


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
        chat: the model's chat format; None for a model that is asked as text, whose server has a format of its own.
        model: its name.
        weights_hash: of its weights, when they can be read: tells two models of one name apart.
        server: address of the chat server, which tells them apart where the weights cannot be read.
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


def _template_hash(chat: ChatFormat) -> str:
    """Tells apart two ways of writing the same conversation, whatever the task."""
    tool = {"name": "probe", "description": "Probes.", "parameters": {"type": "object", "properties": {}}}
    prompt = chat.render_prompt(
        [system("Be a probe."), user("What is asked?")], [{"type": "function", "function": tool}]
    )
    return fingerprint_of(chat.decode(prompt + chat.render_tool_results([tool_message("probe", "This.")])))


def installed_versions() -> dict[str, str]:
    """Versions of the kit and of what its numbers depend on; packages that are not installed are left out."""
    versions = {"python": python_version()}
    for package in ("opd-env", "torch", "transformers", "tokenizers", "gymnasium", "numpy", "datasets", "peft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
