"""Checkpoints that are either whole or not there.

Worked example::

    checkpoints = Checkpoints(run / "checkpoints", keep=2)
    checkpoints.save(25, {"state.json": lambda path: path.write_text("{}")})
    checkpoint = checkpoints.newest()          # damaged ones are skipped, and said so
    (checkpoint.folder / "state.json").read_text()

A checkpoint is a folder ``step_00000025`` with a manifest of sizes and SHA-256 sums. It is written under another
name, forced to the disk and renamed: a kill at any moment leaves the previous checkpoints as they were.

Test it alone: ``pytest tests/trainer/run/test_checkpoint.py``
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from opd_env.episode.files import UNFINISHED, remove_unfinished
from opd_env.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PREFIX = "step_"


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
        final = self.folder / f"{_PREFIX}{step:08d}"
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
                f"all checkpoints in {self.folder} are damaged; remove the folder, or start anew with --resume never"
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
