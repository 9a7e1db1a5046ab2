"""What must be the same in every process of a run, found out before the first step.

    require_same(accelerator, facts_of(config, parts))
    require_one_folder(accelerator, run_folder)

Machines load models, data and settings each from its own disk. Under FSDP2 a student that differs would be put together
of two; a teacher that differs would score half of the episodes; other settings would end in a collective that waits.
The run folder is written by the first process and read by all.

Test it alone: ``pytest tests/trainer/run/test_agreement.py``
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from opd_env.episode.files import UNFINISHED, explained
from opd_env.evaluation.result import installed_versions
from opd_env.settings.fields import ConfigError, flat_dict
from opd_env.tasks import Task
from opd_env.trainer.run.config import OPDConfig
from opd_env.trainer.run.processes import on_each, on_main
from opd_env.trainer.run.setup import Parts
from opd_env.trainer.teachers.base import LocalTeacher

_SAMPLED = 1024
"""Values of each tensor that are compared."""
_PATIENCE_S = 20.0
"""How long a shared disk may take to show a new file."""


def require_same(accelerator: Any, facts: Mapping[str, str]) -> None:
    """Refuses a run whose processes differ in ``facts``, named as in the message. Every process calls it.

    Raises:
        ConfigError: what differs, between which processes; in every process.
    """
    if accelerator.num_processes == 1:
        return
    (host, first), *others = on_each(lambda: (socket.gethostname(), dict(facts)))
    for number, (other_host, other) in enumerate(others, start=1):
        names = [name for name in first if other.get(name) != first[name]]
        if names:
            raise ConfigError(
                f"process {number} on {other_host} has other {' and '.join(names)} than process 0 on {host} "
                f"({names[0]}: {other.get(names[0])}, not {first[names[0]]}); give every machine the same files, "
                "versions and command"
            )


def require_one_folder(accelerator: Any, folder: Path) -> None:
    """Refuses a run folder that is not one for all processes. Every process calls it.

    Raises:
        ConfigError: who does not see what the first process writes; in every process.
    """
    if accelerator.num_processes == 1:
        return

    def write() -> str:
        mark = folder / f".{uuid.uuid4().hex}{UNFINISHED}"
        with explained(mark):
            mark.touch()
        return mark.name

    mark = folder / on_main(accelerator, write)
    deadline = time.monotonic() + _PATIENCE_S
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    everyone = on_each(lambda: (socket.gethostname(), seen))
    if accelerator.is_main_process:
        mark.unlink()
    for number, (host, seen) in enumerate(everyone):
        if not seen:
            raise ConfigError(
                f"the run folder {folder} of process {number} on {host} is not that of process 0 on {everyone[0][0]}: "
                "checkpoints and episodes are read and written by all; set output to a folder on a disk that all "
                "machines share"
            )


def facts_of(config: OPDConfig, parts: Parts) -> dict[str, str]:
    """What decides a run, by name. ``output`` may be another path to the same folder."""
    prompt = parts.chat.render_prompt(parts.task[0].messages)
    return {
        **{f"setting {name}": str(value) for name, value in flat_dict(config).items() if name != "run.output"},
        **{
            f"version of {package}": version for package, version in installed_versions().items() if package != "python"
        },
        "task": task_sample(parts.task),
        "held-out problems": task_sample(parts.eval_task),
        "tokenizer": hashlib.sha256(str(prompt).encode()).hexdigest()[:16],
        "student": weights_sample(parts.student.model),
        **{
            f"teacher {name}": weights_sample(teacher.loaded.model)
            for name, teacher in parts.teachers.members.items()
            if isinstance(teacher, LocalTeacher)
        },
    }


def weights_sample(model: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of all parameters' and buffers' names, types, shapes and some values.

    Two models differ in nearly all values or in none; reading all of a large one would take minutes.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // _SAMPLED)].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def task_sample(task: Task) -> str:
    """A task's name, version and number of problems, and 16 hexadecimal digits of its first and last problem."""
    ends = [[one.id, list(one.messages), one.answer] for one in (task[0], task[len(task) - 1])]
    digest = hashlib.sha256(json.dumps(ends, default=str).encode()).hexdigest()[:16]
    return f"{task.name} {task.version} {len(task)} {digest}"
