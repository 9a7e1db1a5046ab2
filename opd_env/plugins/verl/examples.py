"""Writes the examples of a task as the Parquet file that verl trains or validates on.

Worked example::

    python -m opd_env.plugins.verl.examples --task gsm8k --split train --model Qwen/Qwen2.5-1.5B-Instruct \
        --output gsm8k_train.parquet

With ``--model`` the longest prompt is counted, tools included: ``data.max_prompt_length`` must not be lower. verl may
read several such files together, of several tasks.

Test it alone: ``pytest tests/plugins/verl/test_examples.py`` (needs verl)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opd_env.episode.files import explained, whole_or_nothing
from opd_env.errors import UserError
from opd_env.plugins.verl.agent_loop import AGENT_NAME
from opd_env.settings.fields import import_files
from opd_env.settings.read import configure
from opd_env.tasks import Task, load_task
from opd_env.tasks.base import require_trainable
from opd_env.tools import Tool, Toolbox


@dataclass(frozen=True, kw_only=True)
class ExampleSettings:
    """Writes the examples of a task as verl's data file."""

    task: str
    """Name of a registered task, or path of a YAML file that describes one."""
    output: str
    """Parquet file to write."""
    split: str = "train"
    """Split of the task."""
    validation: bool = False
    """The file is to validate on: splits that may not be trained on are written too."""
    task_options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the task."""
    imports: tuple[str, ...] = ()
    """Python files to run first, so that their @register_task takes effect; name their modules to verl too."""
    model: str | None = None
    """Whose tokenizer counts the prompts; null counts none."""
    chat_format: str | None = None
    """Name of the chat format; null finds it from the tokenizer's template."""


def example_rows(name: str, split: str = "train", options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """One row of verl's data file per example of a task; the arguments are those of ``load_task``.

    Raises:
        ValueError, OSError: as ``load_task``.
    """
    task = load_task(name, split, **(options or {}))
    known = {"task": name, "split": split, "version": task.version, "options": json.dumps(dict(options or {}))}
    return [
        {
            "data_source": name,
            "agent_name": AGENT_NAME,
            "prompt": [{"role": message["role"], "content": message["content"]} for message in example.messages],
            "reward_model": {"style": "rule", "ground_truth": example.answer},
            "extra_info": {"index": index, "id": example.id, **known},
        }
        for index, example in enumerate(task)
    ]


def longest_prompt(task: Task, model: str, chat_format: str | None = None) -> int:
    """Tokens of the task's longest prompt, tools included."""
    from opd_env.engines.models import load_tokenizer
    from opd_env.formats import get_format

    chat = get_format(load_tokenizer(model), chat_format)

    schemas: dict[tuple[str | Tool, ...], list[dict[str, Any]]] = {}
    longest = 0
    for example in task:
        tools = tuple(task.tools_of(example))
        if tools not in schemas:
            with Toolbox(tools) as toolbox:
                schemas[tools] = toolbox.schemas
        longest = max(longest, len(chat.render_prompt(example.messages, schemas[tools])))
    return longest


def main(arguments: Sequence[str]) -> int:
    """Writes a file; returns the exit code."""
    settings = configure(ExampleSettings, arguments, prog="python -m opd_env.plugins.verl.examples")
    import_files(settings.imports)
    task = load_task(settings.task, settings.split, **settings.task_options)
    if not settings.validation:
        require_trainable(task)
    rows = example_rows(settings.task, settings.split, settings.task_options)
    output = Path(settings.output)
    with explained(output), whole_or_nothing(output) as unfinished:
        pq.write_table(pa.Table.from_pylist(rows), unfinished)
    print(f"{output}: {len(rows)} examples of {settings.task}/{settings.split}")
    if settings.model is not None:
        longest = longest_prompt(task, settings.model, settings.chat_format)
        print(f"the longest prompt has {longest} tokens: data.max_prompt_length must be at least that")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, ValueError, OSError) as error:
        sys.exit(f"opd-env: {error}")
