"""``opd-env tools`` and ``opd-env tasks``: what is registered, shown and tried out.

Test it alone: ``pytest tests/core/test_cli.py``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from opd_env.configuration import ConfigError, import_files


def run(command: str, arguments: Sequence[str]) -> int:
    """Carries out one of the two commands."""
    return _tools(arguments) if command == "tools" else _tasks(arguments)


def _tools(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="opd-env tools",
        description="opd-env tools lists the tools; opd-env tools NAME shows one as the student sees it; "
        "opd-env tools test NAME calls it with good and bad arguments (exit code 1 when a check fails).",
    )
    parser.add_argument("words", nargs="*", metavar="[test] NAME")
    parser.add_argument("--options", default="{}", help='JSON options of the tool, such as {"passages": "file.jsonl"}')
    parser.add_argument("--imports", action="append", default=[], help="a Python file that registers your own")
    parser.add_argument("--example", action="append", default=[], help="JSON arguments that the tool must answer")
    options = parser.parse_args(list(arguments))
    from rich.console import Console
    from rich.table import Table

    from opd_env.tools import get_tool, list_tools
    from opd_env.tools.exercise import exercise_tool
    from opd_env.tools.registry import describe_tool

    import_files(options.imports)
    console = Console()
    match options.words:
        case []:
            table = Table("tool", "what it does", "options", box=None)
            for name in list_tools():
                table.add_row(name, *describe_tool(name))
            console.print(table)
        case ["test", name]:
            tool = get_tool(name, **_json_object(options.options))
            checks = exercise_tool(tool, [_json_object(example) for example in options.example])
            for check in checks:
                mark = "[green]ok[/]" if check.passed else "[red]FAILED[/]"
                console.print(mark, check.name, "–", check.detail, highlight=False)
            return 0 if all(check.passed for check in checks) else 1
        case [name]:
            console.print_json(json.dumps(get_tool(name, **_json_object(options.options)).schema))
        case _:
            raise ValueError(f"opd-env tools takes NAME or test NAME, got {' '.join(options.words)!r}")
    return 0


def _tasks(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="opd-env tasks",
        description="opd-env tasks lists the tasks; opd-env tasks NAME shows a few examples of one.",
    )
    parser.add_argument("name", nargs="?")
    parser.add_argument("--split", default="train")
    parser.add_argument("--options", default="{}", help='JSON options of the task, such as {"levels": [1, 2]}')
    parser.add_argument("--count", type=int, default=3, help="examples to show (default 3)")
    parser.add_argument("--imports", action="append", default=[], help="a Python file that registers your own")
    options = parser.parse_args(list(arguments))
    from rich.console import Console
    from rich.table import Table

    from opd_env.tasks import list_tasks, load_task
    from opd_env.tasks.registry import get_task

    import_files(options.imports)
    console = Console()
    if options.name is None:
        table = Table("task", "version", "splits", "licence", "what it asks", box=None)
        for name in list_tasks():
            task: Any = get_task(name)
            document = (task.__doc__ or "").strip().splitlines() or [""]
            table.add_row(
                name,
                getattr(task, "version", ""),
                ", ".join(getattr(task, "splits", ())),
                getattr(task, "licence", ""),
                document[0],
            )
        console.print(table)
        return 0
    task = load_task(options.name, options.split, **_json_object(options.options))
    tools = [tool if isinstance(tool, str) else tool.name for tool in task.tools]
    console.print(
        f"{task.name} version {task.version}, split {task.split}: {len(task)} examples, tools: {', '.join(tools)}, "
        f"licence {task.licence}, {'may' if task.train_allowed else 'must not'} be trained on",
        highlight=False,
    )
    for example in task[: options.count]:
        console.print(
            f"\n[bold]{example.id}[/]  difficulty {example.difficulty}, answer {example.answer}", highlight=False
        )
        for message in example.messages:
            console.print(f"{message['role']}: {message['content']}", highlight=False, markup=False)
    return 0


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f'{text!r} is not a JSON object; write {{"name": value}}')
    return value
