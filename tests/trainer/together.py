"""Several training processes in a second: forked from a server that has imported everything, with no launcher.

Worked example::

    with together(2, tmp_path, work, "argument") as lives:          # work(rank, "argument") in each
        lives[1].signal(signal.SIGKILL)
        assert ends(lives) == [2, -9]                               # within a time limit
        lives[0].text()                                             # what it wrote

Nobody ends the others when one ends, as ``accelerate launch`` would: whoever hangs here is found.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ports import kept_port

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "accelerate"
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["tests.trainer.run.test_loop", "tests.trainer.learn.distributed_updates", "torch.profiler._cupti_monitor",
     "pandas", "pyarrow.parquet", "opd_env.cli.train", "opd_env.cli.tables", "opd_env.tools.builtin.calculator",
     "docstring_parser"]
)  # fmt: skip


@dataclass
class Life:
    """One of the processes."""

    process: Any
    log: Path

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def text(self) -> str:
        return self.log.read_text()


@contextlib.contextmanager
def together(
    processes: int,
    folder: Path,
    work: Callable[..., Any],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
) -> Iterator[list[Life]]:
    """Calls ``work(rank, *arguments)`` in each of so many processes, which find one another."""
    kept = contextlib.ExitStack()
    port = kept.enter_context(kept_port())
    folder.mkdir(parents=True, exist_ok=True)
    lives = []
    for rank in range(processes):
        variables = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        log = folder / f"process_{rank}.log"
        values = {**{name: str(value) for name, value in variables.items()}, **(environment or {})}
        process = _SERVER.Process(target=_live, args=(log, values, work, rank, *arguments))
        process.start()
        lives.append(Life(process, log))
    try:
        yield lives
    finally:
        for life in lives:
            life.process.kill()
            life.process.join()
        kept.close()


def ends(lives: list[Life], within: float = 150) -> list[int]:
    """Exit codes; all processes must end in so many seconds."""
    deadline = time.monotonic() + within
    for life in lives:
        life.process.join(max(0, deadline - time.monotonic()))
    codes = [life.process.exitcode for life in lives]
    assert None not in codes, f"still running: {codes}\n" + "\n".join(life.text() for life in lives)
    return codes


def launcher_environment(name: str) -> dict[str, str]:
    """What ``accelerate launch --config_file configs/accelerate/NAME`` sets in the processes that it starts."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = load_config_from_file(str(CONFIGS / name))
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / name), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == config.num_processes
    environment: dict[str, str] = prepare_multi_gpu_env(arguments)
    return environment


def _live(log: Path, environment: Mapping[str, str], work: Callable[..., Any], rank: int, *arguments: Any) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    code = work(rank, *arguments)
    sys.exit(code or 0)
