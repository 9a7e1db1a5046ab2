"""What ``test_distributed.py`` starts on several processes: the same five updates under DDP and FSDP2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model

from opd_env.trainer.batch import PolicyModule, Row
from opd_env.trainer.learn.update import Updater
from opd_env.trainer.run.checkpoint import Checkpoints, Progress, restore, state_files
from opd_env.trainer.run.setup import leave
from opd_env.trainer.run.sft import supervised_objective
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.toy import made_trajectory, row_of

TRAJECTORIES = [made_trajectory(seed, prompt=3 + seed, turns=(1 + seed % 4, 2)) for seed in range(7)]
"""Seven of different lengths: no number of processes from 2 to 6 shares them out evenly."""
KINDS = ("ddp", "ddp-recomputed", "fsdp2", "fsdp2-recomputed", "fsdp2-lora", "fsdp2-tied", "ddp-uneven", "fsdp2-uneven")


def accelerator_of(kind: str) -> Any:
    """An accelerator that uses FSDP2 where ``kind`` says so: by itself ``accelerate`` does that on GPUs only.

    Its settings are those of the environment variables that ``accelerate launch`` sets.
    """
    accelerator = Accelerator(cpu=True)
    sharded = "fsdp2" in kind
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP if sharded else DistributedType.MULTI_CPU
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"]
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin() if sharded else None
    return accelerator


def updater_of(kind: str, accelerator: Any, seed: int = 3, dtype: torch.dtype = torch.float64) -> Updater:
    """A model under the given kind of parallelism, split into micro-batches of 30 tokens."""
    model: Any = tiny_llama(seed=seed, initializer_range=0.2, tie_word_embeddings="tied" in kind).to(dtype)
    if "lora" in kind:
        torch.manual_seed(seed)
        adapters = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, adapters).eval().to(dtype)
    policy = PolicyModule(model, len(tiny_tokenizer()), gradient_checkpointing="recomputed" in kind)
    return Updater(policy, accelerator, tokens_per_microbatch=30)


def train(updater: Updater, updates: int) -> Any:
    """Updates on this process's share of the trajectories; returns the last."""
    rank, processes = updater.accelerator.process_index, updater.accelerator.num_processes
    mine = [row_of(one) for one in TRAJECTORIES][rank::processes]
    return [updater.update(mine, supervised_objective, 1e-2) for _ in range(updates)][-1]


def train_unevenly(updater: Updater, updates: int) -> Any:
    """The same updates with nothing to learn from but on the first process: no row, or none with a sampled token."""
    rows = [row_of(one) for one in TRAJECTORIES]
    unsampled = [Row(row.token_ids_T, np.zeros_like(row.sampled_T)) for row in rows]
    mine = {0: rows, 1: []}.get(updater.accelerator.process_index, unsampled)
    return [updater.update(mine, supervised_objective, 1e-2) for _ in range(updates)][-1]


def main(folder: Path) -> None:
    """Leaves ``KIND.pt`` with the whole weights for every kind, and a checkpoint that FSDP2 wrote."""
    found = {}
    for kind in KINDS:
        accelerator = accelerator_of(kind)
        updater = updater_of(kind, accelerator)
        if kind == "fsdp2":  # stopped after two updates, and continued from other weights
            train(updater, 2)
            files = state_files(updater, Progress("hash", 2, updater.updates, 0.0))
            if accelerator.is_main_process:
                Checkpoints(folder / "checkpoints").save(2, files)
            accelerator.wait_for_everyone()
            updater = updater_of(kind, accelerator, seed=99)
            restore(updater, Checkpoints(folder / "checkpoints").newest())  # type: ignore[arg-type]
            update = train(updater, 3)
        elif kind.endswith("-uneven"):
            update = train_unevenly(updater, 5)
        else:
            update = train(updater, 5)
        weights = updater._whole or updater.parameters
        found[kind] = {"loss": update.loss, "grad_norm": update.grad_norm, "tokens": update.num_tokens}
        found[kind]["shards"] = sorted({type(value).__name__ for value in updater.parameters.values()})
        if accelerator.is_main_process:
            torch.save({name: value.detach().clone() for name, value in weights.items()}, folder / f"{kind}.pt")
    if accelerator.is_main_process:
        (folder / "found.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    leave(accelerator)
