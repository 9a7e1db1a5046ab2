"""What ``test_updates.py`` starts on several processes under DeepSpeed: the same five updates at a stage of ZeRO."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType

from opd_env.errors import TrainingError
from opd_env.trainer.learn.update import Updater
from opd_env.trainer.run.checkpoint import Checkpoints, Progress, restore, state_files
from opd_env.trainer.run.setup import leave
from tests.trainer.learn.distributed_updates import TRAJECTORIES, train, updater_of
from tests.trainer.toy import row_of

KINDS = ("full", "recomputed", "lora", "tied", "continued", "lost", "forgotten", "bf16")


def accelerator_of(stage: int, precision: str = "no") -> Any:
    """As ``accelerate launch`` sets it up with the shipped settings, but on CPUs, where by itself it would use DDP.

    Nothing is too small to be shared out.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)  # gloo; accelerate prepares DeepSpeed for accelerators only
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    plugin = DeepSpeedPlugin(zero_stage=stage, zero3_init_flag=False)
    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return Accelerator(deepspeed_plugin=plugin, mixed_precision=precision)


def lose(updater: Updater) -> None:
    """An update whose loss is not finite in one process of all."""
    factor = math.nan if updater.accelerator.is_main_process else 1.0
    rows = [row_of(one) for one in TRAJECTORIES[:2]]
    try:
        updater.update(rows, lambda batch, hidden_NH, head, n: factor * head(hidden_NH).sum() / n, 1e-2)
    except TrainingError:
        return
    raise AssertionError("an update with a loss of nan was taken")


def continued(folder: Path, stage: int) -> Any:
    """Three updates after a checkpoint that ``updater`` wrote after two, from other weights and moments."""
    updater = updater_of("full", accelerator_of(stage), dtype=torch.float32)
    train(updater, 2)
    files = state_files(updater, Progress("hash", 2, updater.updates, 0.0))
    if updater.accelerator.is_main_process:
        Checkpoints(folder / "checkpoints").save(2, files)
    updater.accelerator.wait_for_everyone()
    updater = updater_of("full", accelerator_of(stage), dtype=torch.float32, seed=99)
    train(updater, 1)
    restore(updater, Checkpoints(folder / "checkpoints").newest())  # type: ignore[arg-type]
    return updater


def main(folder: Path, stage: int) -> None:
    """Leaves ``KIND.pt`` with the whole weights for every kind, and a checkpoint that ZeRO wrote."""
    found = {}
    for kind in KINDS:
        if kind == "continued":
            updater, updates = continued(folder, stage), 3
        else:
            accelerator = accelerator_of(stage, "bf16" if kind == "bf16" else "no")
            updater, updates = updater_of(kind, accelerator, dtype=torch.float32), 5
        first = train(updater, 1)
        if kind == "lost":
            lose(updater)
        if kind == "forgotten":
            updater.forget()
        last = train(updater, updates - 1)
        found[kind] = {"loss": last.loss, "grad_norm": first.grad_norm, "tokens": last.num_tokens}
        if updater.accelerator.is_main_process:
            assert updater._whole is not None
            torch.save({name: value.detach().clone() for name, value in updater._whole.items()}, folder / f"{kind}.pt")
    if updater.accelerator.is_main_process:
        (folder / "found.json").write_text(json.dumps(found))
    updater.accelerator.wait_for_everyone()
    leave(updater.accelerator)
