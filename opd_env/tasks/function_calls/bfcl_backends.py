"""The eight stateful back ends of BFCL's multi-turn problems: a file system, a car, a trading desk, and so on.

They are those of the package ``bfcl-eval``, which needs nothing else of it::

    pip install --no-deps bfcl-eval mpmath

Worked example::

    backends = Backends(["GorillaFileSystem"], {"GorillaFileSystem": {"root": {"home": {"type": "directory", …}}}})
    backends.execute("mkdir", dir_name="notes")     # 'None'
    backends.execute("cd", folder="attic")          # '{"error": "cd: attic: No such directory. …"}'
    backends.execute("rmdri")                       # "Error during execution: name 'rmdri' is not defined"
    backends.states()["GorillaFileSystem"]          # {'root': …, 'long_context': False}

The official harness builds Python source from a call and evaluates it. Here a call is looked up by its name among the
functions that the package documents, and gets its arguments as values: nothing that a model writes is ever code.

Test it alone: ``pytest tests/tasks/function_calls/test_bfcl_multi_turn.py``
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from decimal import localcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import Any

from opd_env.errors import unknown
from opd_env.tasks.data.rows import read_jsonl

MODULES: Mapping[str, str] = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "TwitterAPI": "posting_api",
    "VehicleControlAPI": "vehicle_control",
}
"""Class name to the module that holds it, and to the file that documents it."""
LARGEST_SIZE = 1_000
"""Exponents and numbers of digits beyond it are refused: they could hold the process for minutes."""

_PACKAGE = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code"
_SIZES = ("precision", "exponent", "decimal_places")
_math = RLock()
"""MathAPI sets the precision of the whole process: one call at a time, and put back afterwards."""


class Backends:
    """The back ends of one episode, in the state that its calls have brought about.

    Args:
        classes: which of ``MODULES``.
        config: the initial state of each, as a problem's ``initial_config``; not changed.

    Raises:
        ValueError: an unknown class.
        ImportError: ``bfcl-eval`` or ``mpmath`` is not installed.
    """

    def __init__(self, classes: Sequence[str], config: Mapping[str, Any]) -> None:
        self._instances: dict[str, Any] = {}
        self._methods: dict[str, Any] = {}
        for name in classes:
            if name not in MODULES:
                raise ValueError(unknown("back end", name, MODULES))
            try:
                instance = getattr(importlib.import_module(f"{_PACKAGE}.{MODULES[name]}"), name)()
            except ImportError as error:
                raise ImportError(
                    f"the back end {name!r} needs bfcl-eval and mpmath ({error}); install them without what else the "
                    "package asks for: pip install --no-deps bfcl-eval mpmath"
                ) from error
            if name != "MathAPI":  # has no state
                instance._load_scenario(copy.deepcopy(dict(config.get(name, {}))), long_context=False)
            self._instances[name] = instance
            documented = (document["name"] for document in functions_of([name]))
            self._methods |= {method: getattr(instance, method) for method in documented}

    def call(self, name: str, /, *args: Any, **arguments: Any) -> str:
        """Runs one call; returns its answer as the official harness writes it.

        Raises:
            NameError: no function has this name.
            Exception: whatever the function raises.
        """
        if name not in self._methods:
            raise NameError(f"name {name!r} is not defined")
        for size in _SIZES:
            value = arguments.get(size)
            if isinstance(value, int | float) and abs(value) > LARGEST_SIZE:
                raise ValueError(f"{size} is more than {LARGEST_SIZE}")
        import mpmath

        with _math, mpmath.workdps(mpmath.mp.dps), localcontext():
            # Some functions keep what they are given and change it later.
            value = self._methods[name](*copy.deepcopy(args), **copy.deepcopy(arguments))
            if isinstance(value, dict):
                try:
                    return json.dumps(value)
                except (TypeError, ValueError):
                    return str(value)
            return str(value)

    def execute(self, name: str, /, *args: Any, **arguments: Any) -> str:
        """As ``call``, with an error as text. Total: whatever the arguments are, there is an answer."""
        try:
            return self.call(name, *args, **arguments)
        except Exception as error:  # the functions check little: any argument may break them anywhere
            return f"Error during execution: {error}"

    def named(self, name: str, /, *args: Any, **arguments: Any) -> dict[str, Any]:
        """The arguments of a call, all by name.

        Raises:
            KeyError: no function has this name.
            TypeError: they do not fit the function.
        """
        return dict(inspect.signature(self._methods[name]).bind(*args, **arguments).arguments)

    def states(self) -> dict[str, dict[str, Any]]:
        """What the official checker compares: every public attribute of every back end."""
        return {
            name: {key: value for key, value in vars(instance).items() if not key.startswith("_")}
            for name, instance in self._instances.items()
        }


def functions_of(classes: Sequence[str]) -> list[dict[str, Any]]:
    """The documents of all functions of these classes, in order, in BFCL's own types."""
    return [document for name in classes for document in _documents(name)]


@cache
def _documents(name: str) -> list[dict[str, Any]]:
    fields = {"name": str, "description": str, "parameters": dict}
    return read_jsonl(data_folder() / "multi_turn_func_doc" / f"{MODULES[name]}.json", fields)


def data_folder() -> Path:
    """The data files of the installed package ``bfcl-eval``, found without importing it.

    Raises:
        FileNotFoundError: it is not installed.
    """
    package = find_spec("bfcl_eval")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(
            "no folder with BFCL data: give path=, or install the package that holds it without what it asks for: "
            "pip install --no-deps bfcl-eval"
        )
    return Path(package.submodule_search_locations[0]) / "data"
