"""Tasks by name: the built-in ones, the user's own, and those of installed packages.

Worked example::

    @register_task("double")
    class Double(Task):
        def __init__(self, split: str = "train", size: int = 100) -> None: ...

    load_task("double", split="test", size=20)
    load_task("duoble")     # ValueError: no task is named 'duoble' (did you mean 'double'?); known: …

Another package adds a task through the entry-point group ``opd_env.tasks``: the task's name, and its class
or a function that returns a Task. Its module is imported when it is asked for.

Test it alone: ``pytest tests/tasks/test_registry.py``
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from opd_env.errors import unknown
from opd_env.tasks.base import Task

ENTRY_POINT_GROUP = "opd_env.tasks"

TaskFactory = Callable[..., Task]
"""A Task class, or a function that returns a Task; it takes ``split``, and options of its own."""

FactoryT = TypeVar("FactoryT", bound=TaskFactory)

_BUILT_IN = {
    "arithmetic": "opd_env.tasks.arithmetic:Arithmetic",
    "bfcl": "opd_env.tasks.function_calls.bfcl_task:BFCL",
    "bfcl_multi_turn": "opd_env.tasks.function_calls.bfcl_multi_turn:BFCLMultiTurn",
    "country_search": "opd_env.tasks.countries.country_search:CountrySearch",
    "curriculum": "opd_env.tasks.mixture:Curriculum",
    "gsm8k": "opd_env.tasks.gsm8k:GSM8K",
    "hotpotqa": "opd_env.tasks.multi_hop:HotpotQA",
    "math500": "opd_env.tasks.math500:Math500",
    "mixture": "opd_env.tasks.mixture:Mixture",
    "musique": "opd_env.tasks.multi_hop:MuSiQue",
    "reasoning_gym": "opd_env.tasks.reasoning_gym:ReasoningGym",
    "svamp": "svamp.yaml",
    "tooluse68": "opd_env.tasks.function_calls.tooluse68:ToolUse68",
}
"""Name to ``module:attribute`` or to a YAML file beside this one, so that listing the tasks imports none of them."""

_registered: dict[str, TaskFactory] = {}


def register_task(name: str) -> Callable[[FactoryT], FactoryT]:
    """Decorator that makes a Task class, or a function that returns a Task, known under ``name``.

    Registering the same class again (a reloaded module, a notebook cell) replaces it.

    Raises:
        ValueError: the name is empty, or belongs to another task.
    """
    if not name or name != name.strip():
        raise ValueError(f"a task's name is a word or two without spaces around it, got {name!r}")

    def register(factory: FactoryT) -> FactoryT:
        owner = _path_of(_registered[name]) if name in _registered else _BUILT_IN.get(name)
        if owner not in (None, _path_of(factory)):
            raise ValueError(f"the name {name!r} belongs to {owner}; register {_path_of(factory)} under another name")
        if isinstance(factory, type) and issubclass(factory, Task):
            factory.name = name
        _registered[name] = factory
        return factory

    return register


def get_task(name: str) -> TaskFactory:
    """The class (or function) that ``load_task`` would call, by name or by the path of a YAML file.

    Raises:
        ValueError: no task has this name.
        ImportError: the task's module cannot be imported; the message names the package and the reason.
    """
    if name in _registered:
        return _registered[name]
    if _is_table(name) or _is_table(_BUILT_IN.get(name, "")):
        from opd_env.tasks.data.table import table_task

        return table_task(name if _is_table(name) else Path(__file__).with_name(_BUILT_IN[name]))
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        factory: TaskFactory = getattr(importlib.import_module(module), attribute)
        return factory
    plugins = _plugins()
    if name in plugins:
        return _load_plugin(plugins[name])
    raise ValueError(unknown("task", name, sorted({*_registered, *_BUILT_IN, *plugins})))


def load_task(name: str, split: str = "train", **options: Any) -> Task:
    """Builds one split of the task called ``name``.

    Args:
        name: as registered, see ``list_tasks``; or the path of a YAML file, see ``opd_env.tasks.data.table``.
        split: one of the task's own splits.
        options: the task's own, such as ``size``, ``seed`` or ``path``.

    Raises:
        ValueError: the name, the split or an option is unknown, or the task refuses an option's value.
        TypeError: what is registered under the name makes something else than a task.
        OSError: the task's data cannot be read.
    """
    factory = get_task(name)
    parameters = inspect.signature(factory).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        known = set(parameters) - {"split"}
        if options and not known:
            raise ValueError(f"task {name!r} takes no options, got {', '.join(options)}; set task_options to {{}}")
        for option in options:
            if option not in parameters:
                raise ValueError(unknown(f"option of task {name!r}", option, sorted(known)))
    needed = [one.name for one in parameters.values() if one.kind is one.KEYWORD_ONLY and one.default is one.empty]
    if missing := [option for option in needed if option not in ("split", *options)]:
        raise ValueError(f"task {name!r} needs the option {' and '.join(missing)}; its page is docs/tasks.md")
    task = factory(split=split, **options)
    if not isinstance(task, Task):
        raise TypeError(f"task {name!r} made a {type(task).__name__}, expected a Task")
    task.name = Path(name).stem if _is_table(name) else name
    return task


def list_tasks() -> list[str]:
    """Names of all tasks that can be loaded, sorted.

    A plug-in that cannot be imported is left out, with a warning.
    """
    names = {*_registered, *_BUILT_IN}
    for name, plugin in _plugins().items():
        try:
            _load_plugin(plugin)
        except ImportError as error:
            warnings.warn(str(error), stacklevel=2)
        else:
            names.add(name)
    return sorted(names)


def _is_table(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _path_of(factory: TaskFactory) -> str:
    return f"{factory.__module__}:{factory.__qualname__}"


def _plugins() -> dict[str, EntryPoint]:
    """Entry points of installed packages, not yet imported. A name that is taken stays with its owner."""
    plugins: dict[str, EntryPoint] = {}
    for plugin in entry_points(group=ENTRY_POINT_GROUP):
        if plugin.name in _BUILT_IN or plugin.name in plugins:
            warnings.warn(
                f"task {plugin.name!r} of {_package(plugin)} is ignored: the name is already taken",
                stacklevel=3,
            )
        else:
            plugins[plugin.name] = plugin
    return plugins


def _load_plugin(plugin: EntryPoint) -> TaskFactory:
    where = f"task {plugin.name!r} of {_package(plugin)} ({plugin.value})"
    try:
        factory = plugin.load()
    except Exception as error:  # a plug-in's module may raise anything while it is imported
        raise ImportError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(factory):
        raise ImportError(f"{where} is a {type(factory).__name__}, expected a Task class or a function")
    return factory  # type: ignore[no-any-return]


def _package(plugin: EntryPoint) -> str:
    return plugin.dist.name if plugin.dist is not None else "an unknown package"
