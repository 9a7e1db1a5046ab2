"""``opd-env tools`` and ``opd-env tasks``: what is registered, shown and tried out.

Test it alone: ``pytest tests/cli/test_cli.py``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd_env.cli.arguments import ArgumentParser
from opd_env.settings.fields import ConfigError, import_files


def run(command: str, arguments: Sequence[str]) -> int:
    """Carries out one of the two commands."""
    return _tools(arguments) if command == "tools" else _tasks(arguments)


def _tools(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="opd-env tools",
        description="opd-env tools lists the tools; opd-env tools NAME shows one as the student sees it; "
        "opd-env tools test NAME calls it with good and bad arguments (exit code 1 when a check fails).",
    )
    parser.add_argument("words", nargs="*", metavar="[test] NAME")
    parser.add_argument("--options", default="{}", help='JSON options of the tool, such as {"passages": "file.jsonl"}')
    parser.add_argument("--imports", action="append", default=[], help="a Python file that registers your own")
    parser.add_argument("--example", action="append", default=[], help="JSON arguments that the tool must answer")
    options = parser.parse_args(list(arguments))
    from opd_env.report.transcript import visible
    from opd_env.tools import get_tool, list_tools
    from opd_env.tools.catalogue import describe_tool
    from opd_env.tools.trial import try_tool

    import_files(options.imports)
    console = Console()
    match options.words:
        case []:
            table = Table("tool", "what it does", "options", box=None)
            for name in list_tools():
                table.add_row(*map(Text, (name, *describe_tool(name))))
            console.print(table)
        case ["test", name]:
            tool = get_tool(name, **_json_object(options.options))
            checks = try_tool(tool, [_json_object(example) for example in options.example])
            table = Table.grid(padding=(0, 2))
            for check in checks:
                mark = Text("ok", "green") if check.passed else Text("FAILED", "red")
                table.add_row(mark, Text(visible(check.name)), Text(visible(check.detail), "dim"))
            console.print(table)
            failed = sum(not check.passed for check in checks)
            found = f"{failed} of {len(checks)} checks failed" if failed else "all checks passed"
            console.print(f"{name}: {found}", markup=False, highlight=False)
            return 1 if failed else 0
        case [name]:
            console.print_json(json.dumps(get_tool(name, **_json_object(options.options)).schema))
        case _:
            raise ValueError(f"opd-env tools takes NAME or test NAME, got {' '.join(options.words)!r}")
    return 0


def _tasks(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="opd-env tasks",
        description="opd-env tasks lists the tasks; opd-env tasks NAME shows one (NAME may be a YAML file); "
        "opd-env tasks check A:train B:test looks for questions of the second in the first (exit code 1 when it "
        "finds any).",
    )
    parser.add_argument("words", nargs="*", metavar="NAME | check A:SPLIT B:SPLIT")
    parser.add_argument("--split", help="of NAME (default: its first)")
    parser.add_argument("--options", default="{}", help='JSON options of the task, such as {"levels": [1, 2]}')
    parser.add_argument("--test-options", help="check only: options of the second task (default: --options)")
    parser.add_argument("--run-length", type=int, help="check only: equal words in a row that count (default 13)")
    parser.add_argument("--count", type=int, default=3, help="examples, or findings, to show (default 3)")
    parser.add_argument("--imports", action="append", default=[], help="a Python file that registers your own")
    options = parser.parse_args(list(arguments))
    import_files(options.imports)
    match options.words:
        case []:
            return _list_tasks()
        case ["check", train, test]:
            return _check(train, test, options)
        case [name] if name != "check":
            return _show_task(name, options)
        case _:
            got = " ".join(options.words)
            raise ValueError(f"opd-env tasks takes NAME, or check A:train B:test, got {got!r}")


def _list_tasks() -> int:
    from opd_env.tasks import list_tasks
    from opd_env.tasks.registry import get_task

    table = Table("task", "licence", "what it asks", box=None)
    for name in list_tasks():
        task: Any = get_task(name)
        document = (task.__doc__ or "").strip().splitlines() or [""]
        licence = getattr(task, "licence", "")  # one that is made of others has a licence only when it is loaded
        table.add_row(*map(Text, (name, "" if isinstance(licence, property) else licence, document[0])))
    Console().print(table)
    return 0


def _show_task(name: str, options: argparse.Namespace) -> int:
    from opd_env.tasks import load_task, prompt_hash
    from opd_env.tasks.registry import get_task

    if options.count < 0:
        raise ValueError(f"--count is {options.count}; expected 0 or more")
    split = options.split or next(iter(getattr(get_task(name), "splits", ("train",))))
    task = load_task(name, split, **_json_object(options.options))
    offered = task.tools_of(task[0])
    tools = [tool if isinstance(tool, str) else tool.name for tool in offered]
    own = list(offered) != list(task.tools)
    lines = {
        "task": f"{task.name}, {task.split} split, {len(task)} examples",
        "version": task.version,
        "licence": task.licence,
        "splits": ", ".join(task.splits),
        "training": "allowed" if task.train_allowed else "refused: this split is for evaluation only",
        "tools": (", ".join(tools) or "none") + (" (of the first example; each has its own)" if own else ""),
        "prompt hash": prompt_hash(task),
    }
    console = Console()
    for key, value in lines.items():
        console.print(f"{key:<12} {value}", highlight=False, markup=False)
    for example in task[: options.count]:
        about = f"  difficulty {example.difficulty}, answer {example.answer}"
        console.print(Text.assemble("\n", (example.id, "bold"), about))
        for message in example.messages:
            console.print(f"{message['role']}: {message['content']}", highlight=False, markup=False)
    return 0


def _check(train: str, test: str, options: argparse.Namespace) -> int:
    from opd_env.tasks import load_task
    from opd_env.tasks.data.contamination import WORDS, overlap

    loaded = []
    test_options = options.options if options.test_options is None else options.test_options
    for word, given in ((train, options.options), (test, test_options)):
        name, colon, split = word.rpartition(":")
        if not colon or not name:
            raise ValueError(f"got {word!r}, expected a task and its split, such as {word.strip(':')}:test")
        loaded.append(load_task(name, split, **_json_object(given)))
    trained, tested = loaded
    found = overlap(trained, tested, words=WORDS if options.run_length is None else options.run_length)
    print(
        f"{found.shared} of {found.test} questions of {test} share {found.words} words in a row with one of "
        f"{found.train} of {train}; {found.identical} are identical"
    )
    for hit in found.hits[: options.count]:
        what = "identical to" if hit.identical else f"{100 * hit.share:.0f} % shared, most with"
        print(f"  {hit.test_id}  {what} {hit.train_id}: … {hit.example[:100]} …")
    return 1 if found.hits else 0


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f'{text!r} is not a JSON object; write {{"name": value}}')
    return value
