"""Kill a training run at random moments, continue it, and compare it with a run that nothing disturbed.

A small run of the packaged student (seconds) is killed with SIGKILL, started again, perhaps killed again, and then left
to finish. Its weights, optimiser state, random state, episodes and metrics must be those of the undisturbed run to the
bit, and nothing half-written may be left. ``--moments`` kills at random times; ``--changes`` kills immediately before a
change of the disk (a file opened to write, a rename, a removal …), which finds the orders that random times miss.

    python benchmarks/kill_resume.py --moments 200
    python benchmarks/kill_resume.py --moments 0 --changes all
    python benchmarks/kill_resume.py --moments 200 --ahead          # the same with rollout_ahead

Every life is a fork of one process that has imported and loaded everything, so that a life costs about a second.
Exit code 1 when any difference is found.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_env.engines.models import load_model
from opd_env.episode.store import load_trajectories
from opd_env.evaluation.read_run import read_metrics
from opd_env.settings.fields import build
from opd_env.trainer import OPDConfig, OPDTrainer

STEPS, EPISODES = 8, 4
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
rollout_ahead = False
_STUDENT, _TEACHER = (load_model(f"packaged:{name}") for name in ("student", "teacher"))


def main() -> int:
    """Plays the lives and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=200, help="kills at random times (default 200)")
    parser.add_argument("--changes", default="0", help="kills before a change of the disk: a number, or all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--ahead", action="store_true", help="roll out one step ahead")
    global rollout_ahead
    options = parser.parse_args()
    rollout_ahead = options.ahead
    rng = random.Random(options.seed)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        straight, other = Path(folder) / "straight", Path(folder) / "killed"
        seconds, changes = _measure(straight)
        print(f"an undisturbed life: {seconds:.2f} s, {changes} changes of the disk")
        count = changes if options.changes == "all" else min(changes, int(options.changes))
        trials: list[list[tuple[float, int]]] = [[(0.0, at)] for at in sorted(rng.sample(range(1, changes + 1), count))]
        found, hits, runs = [], Counter[str](), 0
        while trials or hits.total() < options.moments + count:
            kills = trials.pop(0) if trials else [(rng.uniform(0, seconds), 0) for _ in range(rng.randint(1, 3))]
            shutil.rmtree(other, ignore_errors=True)
            for after, change in kills:
                if _live(other, kill_after=None if change else after, kill_at=change):
                    hits[_where(other)] += 1
            problems = [] if _live(other) is False else ["the last life failed"]
            problems = problems or differences(straight, other)
            found += [f"run {runs} {kills}: {problem}" for problem in problems]
            runs += 1
    print(f"{hits.total()} kills in {runs} runs, {time.perf_counter() - started:.0f} s; each time there was")
    print("\n".join(f"  {count:4d}  {where}" for where, count in sorted(hits.items())))
    print(f"{len(found)} differences from the undisturbed run", *found, sep="\n")
    return 1 if found else 0


def differences(straight: Path, other: Path) -> list[str]:
    """What the two finished runs do not have in common, wall times aside."""
    found = []
    last = f"checkpoints/step_{STEPS:08d}"
    for name in (f"{last}/weights.safetensors", f"{last}/optimizer.safetensors", "model/model.safetensors"):
        if (straight / name).read_bytes() != (other / name).read_bytes():
            found.append(f"{name} differs")
    readers: dict[str, Callable[[Path], Any]] = {
        "random state": lambda run: json.loads((run / last / "state.json").read_text())["random"],
        "metrics": lambda run: [_untimed(row) for row in read_metrics(run / "metrics.jsonl")],
        "episodes": _episodes,
        "results": lambda run: _untimed(json.loads((run / "results.json").read_text())),
        "files": lambda run: sorted(str(path.relative_to(run)) for path in run.rglob("*")),
    }
    for name, read in readers.items():
        one, two = read(straight), read(other)
        if one != two:
            found.append(f"{name}: {_first_difference(str(one), str(two))}")
    return found


def _first_difference(one: str, two: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    return f"expected …{one[max(0, at - 60) : at + 60]}…, got …{two[max(0, at - 60) : at + 60]}…"


def _episodes(run: Path) -> list[tuple[Any, ...]]:
    """Every stored episode with its tokens and log-probs, file by file; a checkpoint's episodes are stored in order."""
    return [
        (path.name, *episode)
        for path in sorted((run / "trajectories").iterdir())
        for episode in sorted(
            (one.example_id, one.sample, one.token_ids.tolist(), one.logprobs.tolist(), one.correct)
            for one in load_trajectories(path)
        )
    ]


def _untimed(value: Any) -> Any:
    """Without what a clock says."""
    if isinstance(value, dict):
        timed = ("seconds", "time/", "tokens_per_s")
        return {name: _untimed(entry) for name, entry in value.items() if not any(word in name for word in timed)}
    return [_untimed(entry) for entry in value] if isinstance(value, list) else value


def _where(run: Path) -> str:
    """How far a killed run was."""
    steps = sorted(run.glob("checkpoints/step_*"))
    place = f"the checkpoint of step {int(steps[-1].name[-8:])}" if steps else "no checkpoint"
    if (run / "model").exists():
        return f"{place}, the model"
    return place + (", one half-written" if list(run.glob("checkpoints/.*.unfinished")) else "")


def _measure(run: Path) -> tuple[float, int]:
    """Plays an undisturbed life; returns its seconds and how often it changes the disk."""
    measured = run.with_suffix(".json")
    if _live(run, measure_into=measured) is not False:
        raise SystemExit("the undisturbed run failed")
    seconds, changes = json.loads(measured.read_text())
    return seconds, changes


def _live(
    run: Path, *, kill_after: float | None = None, kill_at: int = 0, measure_into: Path | None = None
) -> bool | None:
    """One process from start to end; True when it was killed, False when it finished, None when it failed.

    Args:
        run: its folder.
        kill_after: seconds from the moment when it begins to train.
        kill_at: the change of the disk that it does not live to make, from 1; 0 for none.
        measure_into: where to leave the seconds that it took and the changes that it made.
    """
    ready, begins = os.pipe()
    child = os.fork()
    if child == 0:
        os._exit(_child(run, begins, kill_at, measure_into))
    os.close(begins)
    os.read(ready, 1)
    os.close(ready)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return True if code == -signal.SIGKILL else False if code == 0 else None


def _child(run: Path, begins: int, kill_at: int, measure_into: Path | None) -> int:
    """The life of a run: nothing is shown unless it fails."""
    changes = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not writes and event not in _CHANGES:
            return
        here = any(isinstance(word, str | os.PathLike) and str(run) in str(word) for word in arguments)
        if here or (event in ("os.remove", "os.rmdir") and arguments[1] >= 0):  # rmtree names files by folder handle
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    random.seed(0)  # Python seeds it anew in every fork
    sys.addaudithook(watch)
    shown = os.open(os.devnull, os.O_WRONLY)
    log = os.dup(2)
    os.dup2(shown, 2)
    try:
        trainer = OPDTrainer(_config(run), student=_STUDENT, teacher=_TEACHER)
        os.write(begins, b".")
        started = time.perf_counter()
        trainer.train()
    except BaseException:
        os.dup2(log, 2)
        traceback.print_exc()
        return 1
    if measure_into is not None:
        measure_into.write_text(json.dumps([time.perf_counter() - started, changes]))
    return 0


def _config(run: Path) -> OPDConfig:
    return build(OPDConfig, {
        "student": {"model": "packaged:student"}, "teacher": {"model": "packaged:teacher"}, "task": "arithmetic",
        "sampling": {
            "episodes_per_step": EPISODES, "rollout_ahead": rollout_ahead,
            "limits": {"max_turns": 2, "max_turn_tokens": 12, "max_tokens": 320},
        },
        "optimizer": {"learning_rate": 1e-3},
        "evaluation": {"every": 2, "problems": 1},
        "run": {"steps": STEPS, "checkpoint_every": 2, "trackers": (), "output": str(run)},
    })  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
