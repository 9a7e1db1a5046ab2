"""Runs a program, or the cells of a session, in the process that it is called in.

This side is not trusted: once the code runs, everything in this process belongs to it. What is here
makes it behave as plain Python does; what holds it back was put in place before.

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_python.py``
"""

from __future__ import annotations

import _thread
import ast
import atexit
import linecache
import os
import random
import struct
import sys
import threading
import traceback
import types
from collections.abc import Callable

CELL_HEADER = struct.Struct("<I")
"""A cell on its way in: the length of its code, which follows."""
CELL_REPLY = struct.Struct("<IB")
"""The answer: the number of the cell, counted from 1, and one of the outcomes below."""
CELL_OK, CELL_ERROR, CELL_EXIT = range(3)


def prepare() -> dict[str, object]:
    """Makes a fresh ``__main__``, its streams, and the random state of seed 0; returns its namespace.

    Apart from :func:`run_program`, so that it can be done once, before a fork: what a new process does
    itself costs it copies of the memory pages that it touches, and these are most of what a call costs.
    """
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    sys.argv = ["main.py"]
    sys.path.insert(0, "")  # modules that lie beside the program, in its working folder
    # Line-buffered: a program that is killed has shown what it printed, in order with its errors.
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.__stdout__, sys.__stderr__, sys.__stdin__ = sys.stdout, sys.stderr, sys.stdin  # type: ignore[misc]
    seed_all(0)
    return main.__dict__


def warm_up() -> None:
    """Runs what every program runs, so that the interpreter has specialised it before the fork."""
    for _ in range(10):
        _execute("x = 1\nprint(x + 1)", "main.py", {"__builtins__": __builtins__}, False)
        _flush()
    linecache.clearcache()


def run_program(code: str, seed: int, namespace: dict[str, object], before_code: Callable[[], None]) -> int:
    """Runs ``code`` as ``__main__`` and returns its exit code.

    Args:
        code: the program.
        seed: for ``random`` and numpy.
        namespace: from :func:`prepare`.
        before_code: what closes the last doors; called when everything that needs them is done.
    """
    exit_functions = atexit._ncallbacks()
    if seed:
        seed_all(seed)
    before_code()
    exit_code = _exit_code_of(_execute, code, "main.py", namespace, False)
    return _finish(exit_code, exit_functions)


def run_cells(channel: int, seed: int, namespace: dict[str, object], before_code: Callable[[], None]) -> int:
    """Runs the cells that arrive on the descriptor ``channel`` until it is closed; returns the exit code."""
    exit_functions = atexit._ncallbacks()
    if seed:
        seed_all(seed)
    before_code()
    number = 0
    while True:
        header = _read_exactly(channel, CELL_HEADER.size)
        if header is None:
            return _finish(0, exit_functions)
        code = _read_exactly(channel, CELL_HEADER.unpack(header)[0])
        if code is None:
            return _finish(0, exit_functions)
        number += 1
        exits = False
        try:
            _execute(code.decode("utf-8", "surrogatepass"), f"cell_{number}.py", namespace, True)
            outcome = CELL_OK
        except SystemExit as error:
            exit_code = _code_of_exit(error)
            outcome, exits = CELL_EXIT, True
        except BaseException as error:
            _report(error)
            outcome = CELL_ERROR
        _flush()
        os.write(channel, CELL_REPLY.pack(number, outcome))
        if exits:
            return _finish(exit_code, exit_functions)


def _execute(code: str, name: str, namespace: dict[str, object], echo: bool) -> None:
    # Known to linecache, so that tracebacks show the line that failed.
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    tree: ast.Module = compile(code, name, "exec", flags=ast.PyCF_ONLY_AST)  # type: ignore[assignment]
    last = tree.body[-1] if echo and tree.body else None
    if isinstance(last, ast.Expr):
        tree.body.pop()
    if tree.body:
        exec(compile(tree, name, "exec"), namespace)
    if isinstance(last, ast.Expr):
        sys.displayhook(eval(compile(ast.Expression(last.value), name, "eval"), namespace))


def _exit_code_of(function: Callable[..., None], *arguments: object) -> int:
    try:
        function(*arguments)
    except SystemExit as error:
        return _code_of_exit(error)
    except BaseException as error:
        _report(error)
        return 1
    return 0


def _code_of_exit(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _report(error: BaseException) -> None:
    """Prints the traceback of the user's own frames."""
    _flush()
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    try:
        if sys.excepthook is sys.__excepthook__:
            traceback.print_exception(type(error), error, trace)
        else:
            sys.excepthook(type(error), error, trace)
    except BaseException as second:  # a hostile __str__ or hook: say what can be said
        os.write(2, f"{type(error).__name__} (its report failed: {type(second).__name__})\n".encode())


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue  # the code closed or replaced it: there is nothing to flush


def _finish(exit_code: int, exit_functions: int) -> int:
    """What the interpreter does at its end, where there is something to do: threads, atexit, flushing.

    Args:
        exit_code: is returned.
        exit_functions: how many functions atexit had before the code ran: those of modules that it shares.
    """
    try:
        if _thread._count():
            threading._shutdown()  # type: ignore[attr-defined]
        logging = sys.modules.get("logging")
        if atexit._ncallbacks() > exit_functions or (logging is not None and logging._handlerList):
            atexit._run_exitfuncs()
    except BaseException as error:
        _report(error)
    _flush()
    return exit_code


def seed_all(seed: int) -> None:
    """Seeds ``random``, and numpy where it is loaded."""
    random.seed(seed)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(seed % 2**32)


def _read_exactly(channel: int, size: int) -> bytes | None:
    """``size`` bytes, or None at the end of the stream."""
    data = bytearray()
    while len(data) < size:
        part = os.read(channel, size - len(data))
        if not part:
            return None
        data += part
    return bytes(data)
