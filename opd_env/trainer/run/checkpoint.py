"""Checkpoints that are either whole or not there, and what a run needs to continue as if it had never stopped.

Worked example::

    checkpoints = Checkpoints(run / "checkpoints", keep=2)
    checkpoints.save(step, state_files(updater, Progress(config_hash, step, updates, seconds)))
    checkpoint = checkpoints.newest()          # damaged ones are skipped, and said so
    progress = restore(updater, checkpoint)

A checkpoint is a folder ``step_00000025`` with a manifest of sizes and SHA-256 sums. It is written under another
name, forced to the disk and renamed: a kill at any moment leaves the previous checkpoints as they were.

It holds the weights, both moments and the step count of every parameter's optimiser, the random state of every process
and the number of finished steps. The rest follows from these: the learning rate from the number of updates, the
problems and seeds of the next step from the number of steps. No episode is under way at a checkpoint. All is plain
tensors (safetensors) and JSON; nothing is pickled, so a checkpoint can be read safely.

Test it alone: ``pytest tests/trainer/run/test_checkpoint.py``
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd_env.episode.files import UNFINISHED, remove_unfinished
from opd_env.errors import UserError
from opd_env.trainer.learn.update import Updater

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PREFIX = "step_"
_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


class CheckpointError(UserError):
    """A checkpoint cannot be written or used; the message says why and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been found whole."""

    folder: Path
    step: int


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: made when the first checkpoint is written.
        keep: older ones than the newest ``keep`` are removed after every save.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self._keep = keep

    def save(self, step: int, files: Mapping[str, Callable[[Path], Any]]) -> Checkpoint:
        """Writes a checkpoint, whole or not at all; replaces one of the same step.

        Args:
            step: finished steps.
            files: for every file name, a function that writes the file at the path that it is given.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written. Earlier checkpoints are untouched.
        """
        final = self._path(step)
        unfinished = self.folder / f".{final.name}{UNFINISHED}"
        try:
            remove_unfinished(self.folder)
            unfinished.mkdir(parents=True)
            for name, write in files.items():
                write(unfinished / name)
                _sync(unfinished / name)
            manifest = {name: _entry(unfinished / name) for name in files}
            (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            _sync(unfinished / MANIFEST)
            _sync(unfinished)
            if final.exists():
                shutil.rmtree(final)
            os.rename(unfinished, final)
            _sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            kept = self.steps()
            before = f"the one of step {kept[-1]} is kept" if kept else "there is no earlier one"
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be written to {self.folder}: {reason}; {before}; free space, "
                "then start the same command again to continue"
            ) from error
        self._remove_all_but_the_last(step)
        return Checkpoint(final, step)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, sound or not, rising."""
        if not self.folder.is_dir():
            return []
        names = (path.name.removeprefix(_PREFIX) for path in self.folder.iterdir() if path.name.startswith(_PREFIX))
        return sorted(int(name) for name in names if name.isdigit())

    def newest(self) -> Checkpoint | None:
        """The newest sound checkpoint, to continue from. Later ones are damaged: they are removed, with a warning.

        Raises:
            CheckpointError: there are checkpoints, and none of them is sound.
        """
        steps = self.steps()
        for step in reversed(steps):
            folder = self._path(step)
            problem = find_damage(folder)
            if problem is None:
                self._remove_all_but_the_last(step)
                return Checkpoint(folder, step)
            logger.warning("the checkpoint %s is damaged (%s); the one before it is used", folder, problem)
        if steps:
            raise CheckpointError(
                f"all checkpoints in {self.folder} are damaged; remove the folder, or start anew with "
                "--run.resume never"
            )
        return None

    def _remove_all_but_the_last(self, newest: int) -> None:
        """Removes checkpoints older than the last ``keep`` up to ``newest``, which is sound, and those after it."""
        steps = self.steps()
        for step in set(steps) - set([step for step in steps if step <= newest][-self._keep :]):
            shutil.rmtree(self._path(step), ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step:08d}"


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None when every byte is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        for name, entry in manifest.items():
            found = _entry(folder / name)
            if found["bytes"] != entry["bytes"]:
                return f"{name} has {found['bytes']} bytes, not {entry['bytes']}"
            if found != entry:
                return f"{name} has another checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, AttributeError, TypeError, KeyError):
        return f"{MANIFEST} is not readable"
    return None


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    config_hash: str
    step: int
    """Finished steps. They fix the problems and seeds of the next one."""
    updates: int
    seconds: float
    """Wall time of training and evaluation so far."""


def state_files(updater: Updater, progress: Progress) -> dict[str, Callable[[Path], Any]]:
    """The files of a checkpoint, for ``Checkpoints.save``. Every process calls it; one of them saves."""
    parallel = updater.parallel
    weights = {name: parallel.weight(name).cpu().contiguous() for name in parallel.parameters}
    optimizer = {
        f"{name}/{key}": value.cpu().contiguous()
        for name in parallel.parameters
        for key, value in parallel.moments(name).items()
    }
    state = {"progress": asdict(progress), "random": gather_object([_random_state()])}
    return {
        _WEIGHTS: lambda path: save_file(weights, path),
        _OPTIMIZER: lambda path: save_file(optimizer, path),
        _STATE: lambda path: path.write_text(json.dumps(state), encoding="utf-8"),
    }


def restore(updater: Updater, checkpoint: Checkpoint) -> Progress:
    """Puts everything back; returns how far the run was.

    Raises:
        CheckpointError: the checkpoint is of a model with other parameters.
    """
    weights = load_file(checkpoint.folder / _WEIGHTS)
    if {name: tuple(value.shape) for name, value in weights.items()} != updater.shapes:
        raise CheckpointError(
            f"{checkpoint.folder} holds other parameters than the student has; start anew with --run.resume never"
        )
    moments: dict[str, dict[str, Tensor]] = {}
    for path, value in load_file(checkpoint.folder / _OPTIMIZER).items():
        name, _, key = path.rpartition("/")
        moments.setdefault(name, {})[key] = value
    updater.parallel.load(weights, moments)
    updater.gather()
    state = json.loads((checkpoint.folder / _STATE).read_text(encoding="utf-8"))
    progress = Progress(**state["progress"])
    updater.updates = progress.updates
    rank = updater.accelerator.process_index
    if rank < len(state["random"]):
        _restore_random_state(state["random"][rank])
    return progress


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [str(name), np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([torch.tensor(one, dtype=torch.uint8) for one in state["cuda"]])


def _entry(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """Forces a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
