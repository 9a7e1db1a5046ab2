"""What a run needs to continue as if it had never stopped: weights, optimiser, random numbers, progress.

Weights, both moments and the step count of every parameter's optimiser, the random state of every process and the
number of finished steps. The rest follows from these: the learning rate from the number of updates, the problems and
seeds of the next step from the number of steps. No episode is under way at a checkpoint; those that were trained on lie
in ``trajectories/``, and the lines of ``metrics.jsonl`` after the checkpoint are dropped when a run continues.

Everything is plain tensors (safetensors) and JSON; nothing is pickled, so a checkpoint can be read safely::

    checkpoints.save(step, state_files(updater, Progress(config.config_hash, step, updates, seconds)))
    progress = restore(updater, checkpoints.newest())

Test it alone: ``pytest tests/trainer/run/test_checkpoint.py``
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd_env.trainer.learn.update import Updater
from opd_env.trainer.run.checkpoint import Checkpoint, CheckpointError

_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


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
            f"{checkpoint.folder} holds other parameters than the student has; start anew with --resume never"
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
