"""Finds the command, runs it, and turns what a user can mend into one sentence.

Exit codes: 0 done; 1 a check found something wrong; 2 the request cannot be carried out; 130 stopped by Ctrl-C.

Test it alone: ``pytest tests/cli/test_cli.py``
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
import threading
from collections.abc import Sequence

from opd_env.errors import UserError, unknown

COMMANDS = {
    "train": ("opd_env.cli.train", "distil a student: settings from YAML files and --options"),
    "eval": ("opd_env.cli.play", "score a model on tasks, with confidence intervals"),
    "rollout": ("opd_env.cli.play", "play a few episodes and show every token's kind"),
    "compare": ("opd_env.cli.compare", "set evaluations of the same problems against each other"),
    "export": ("opd_env.cli.export", "write an evaluation as an inspect_ai log or lm-eval results"),
    "publish": ("opd_env.cli.publish", "write a trained student's model card, and upload it"),
    "report": ("opd_env.cli.train", "write report.html of a run folder again"),
    "certify": ("opd_env.cli.certify", "prove each divergence's expected update against its exact gradient"),
    "tools": ("opd_env.cli.listing", "list the tools, show one, or test one"),
    "tasks": ("opd_env.cli.listing", "list the tasks, or show examples of one"),
    "doctor": ("opd_env.cli.doctor", "say what this machine can do"),
}
"""Name to the module that holds ``run(command, arguments) -> exit code``, and a line of help."""

_FOR_USERS = (ValueError, OSError, ImportError, UserError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. ``OPD_ENV_TRACEBACK=1`` shows where an error arose."""
    # Threads that wait for one another must not spin: on a busy machine that makes small models slower a hundredfold.
    # Read by OpenMP when torch is loaded, so it is set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Other libraries' progress bars have no place in a log file. Read by tqdm when it is imported.
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("OPD_ENV_TRACEBACK") or not isinstance(error, _FOR_USERS):
            raise  # a bug keeps its traceback
        return _fail(str(error))


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(), flush=True)
        return 0
    if words[0] in ("-V", "--version"):
        from opd_env import __version__

        print(f"opd-env {__version__}")
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        return _fail(unknown("command", command, COMMANDS))
    if command in ("train", "eval", "rollout", "tasks", "doctor"):
        _go_offline_without_network()
    code: int = importlib.import_module(COMMANDS[command][0]).run(command, rest)
    return code


def _go_offline_without_network() -> None:
    """Sets ``HF_HUB_OFFLINE`` when the hub's name does not resolve, so that only the cache is looked at.

    Without network the hub's client would retry for a minute. It reads the variable when it is imported. With a proxy,
    or when the user has set the variable, nothing is done.
    """
    from urllib.parse import urlparse
    from urllib.request import getproxies

    if "HF_HUB_OFFLINE" in os.environ or getproxies():
        return
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or ""
    answers: list[bool] = []

    def resolve() -> None:
        try:
            socket.getaddrinfo(host, 443)
            answers.append(True)
        except OSError:
            answers.append(False)

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(3.0)
    if answers != [True]:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _fail(sentence: str) -> int:
    print(f"opd-env: {sentence}", file=sys.stderr)
    return 2


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items())
    return (
        "usage: opd-env COMMAND …\n\n"
        "Teaches small language models to use tools by on-policy distillation (OPD+).\n\n"
        f"{commands}\n\n"
        "opd-env COMMAND --help tells more. A first run: opd-env train configs/demo.yaml\n"
        "OPD_ENV_TRACEBACK=1 opd-env COMMAND … shows where in the code an error arose."
    )
