"""One optimiser update over any number of rows: micro-batches, processes and padding change nothing.

Worked example, supervised on what is marked as sampled::

    def objective(batch, hidden_NH, head, num_tokens):
        return -token_logprobs(hidden_NH, head, batch.targets_N).logprobs_N.sum() / num_tokens

    updater = Updater(PolicyModule(model, vocab_size), Accelerator())
    updater.update(rows, objective, learning_rate=1e-3).loss

The objective of a micro-batch is a *sum* over its sampled tokens, divided by N, the number of sampled tokens of
the whole update: over all micro-batches and all processes. So the gradient is the same however it is computed.

Test it alone: ``pytest tests/trainer/learn/test_update.py``
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_env.errors import TrainingError
from opd_env.trainer.batch import Head, MicroBatch, PolicyModule, Row, make_batch, num_sampled, pack
from opd_env.trainer.learn.parallel import parallel_of, trained
from opd_env.trainer.learn.settings import Schedule

Objective = Callable[[MicroBatch, Tensor, Head, float], Tensor]
"""Called with a micro-batch, its hidden states ``[N, H]``, the head, and what to divide the sum by."""


@dataclass(frozen=True)
class Update:
    """What one update did."""

    loss: float
    """Over all processes."""
    grad_norm: float
    """Before it was clipped."""
    learning_rate: float
    num_tokens: int
    """Sampled tokens over all processes."""


class Updater:
    """The policy, its optimiser, and how far they are.

    Under FSDP2 and ZeRO the processes share out a copy, and the given policy receives the whole weights after every
    update: whatever samples with it, evaluates or saves it needs to know nothing of shards.

    Args:
        policy: the student. It stays in evaluation mode: it is trained as the policy that it samples with.
        accelerator: of ``accelerate``; one device or many.
        weight_decay: decoupled.
        max_grad_norm: gradients are scaled down to this norm.
        tokens_per_microbatch: padded tokens in one forward and backward pass.
    """

    def __init__(
        self,
        policy: PolicyModule,
        accelerator: Any,
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        tokens_per_microbatch: int = 16384,
    ) -> None:
        self.accelerator = accelerator
        self.updates = 0
        self._tokens_per_microbatch = tokens_per_microbatch
        self._whole: dict[str, Tensor] | None = None
        if accelerator.is_fsdp2 or accelerator.distributed_type == "DEEPSPEED":
            self._whole = trained(policy)
            policy = PolicyModule(
                copy.deepcopy(policy.model),
                policy.vocab_size,
                gradient_checkpointing=policy.gradient_checkpointing,
            )
        self.parallel = parallel_of(policy, accelerator, weight_decay=weight_decay, max_grad_norm=max_grad_norm)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What is trained, by name; shards where the weights are shared out."""
        return self.parallel.parameters

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is trained, whole."""
        return {name: tuple(value.shape) for name, value in (self._whole or self.parameters).items()}

    def update(self, rows: Sequence[Row], objective: Objective, learning_rate: float) -> Update:
        """Takes one optimiser step on this process's ``rows``.

        Raises:
            TrainingError: no process has a sampled token, or the loss or the gradient is not finite; the weights
                are then those of the update before.
        """
        accelerator = self.accelerator
        batches = pack(rows, self._tokens_per_microbatch)
        counts = torch.tensor([num_sampled(rows)], device=accelerator.device)
        num_tokens = int(accelerator.reduce(counts, reduction="sum").item())
        if num_tokens == 0:
            raise TrainingError("no token was sampled in this step, so there is nothing to learn from")
        rounds = int(accelerator.gather(torch.tensor([len(batches)], device=accelerator.device)).max())
        divisor = num_tokens / accelerator.num_processes  # gradients are averaged over processes, not summed
        total = torch.zeros((), device=accelerator.device)
        for number in range(rounds):
            with self.parallel.micro_batch(last=number == rounds - 1):
                if number < len(batches):
                    batch = batches[number].to(accelerator.device)
                    loss = self.parallel.policy(
                        batch, lambda hidden_NH, head, batch=batch: objective(batch, hidden_NH, head, divisor)
                    )
                else:  # Another process has more micro-batches: take part in its communication with weight 0.
                    idle = _IDLE.to(accelerator.device)
                    loss = self.parallel.policy(idle, lambda hidden_NH, head: 0 * head(hidden_NH).sum())
                self.parallel.backward(loss)
            total += loss.detach()
        loss_value = float(accelerator.reduce(total, reduction="mean").item())
        if math.isfinite(loss_value):
            grad_norm = self.parallel.step(learning_rate)
            problem = "" if math.isfinite(grad_norm) else f"the gradient norm is {grad_norm}"
        else:
            self.parallel.discard()
            problem = f"the loss is {loss_value}"
        if problem:
            raise TrainingError(
                f"{problem} at learning rate {learning_rate:g}; this update was not taken; lower learning_rate, or "
                "bound |log u| with clip_log_ratio"
            )
        self.gather()
        self.updates += 1
        return Update(loss_value, grad_norm, learning_rate, num_tokens)

    @torch.no_grad()
    def gather(self) -> None:
        """Gives the policy that was handed in the weights as they are. Every process calls it."""
        for name, value in (self._whole or {}).items():
            value.copy_(self.parallel.weight(name))

    def forget(self) -> None:
        """Starts the optimiser anew, with the weights as they are."""
        self.parallel.forget()
        self.updates = 0


_IDLE = make_batch([Row(np.zeros(2, dtype=np.int32), np.array([False, True]))])


def learning_rate_at(update: int, *, peak: float, warmup: int, total: int, schedule: Schedule) -> float:
    """Learning rate of update number ``update`` (from 0) of ``total``.

    Rises in a straight line over ``warmup`` updates (the first is ``peak / warmup``), then follows ``schedule``.
    """
    if update < warmup:
        return peak * (update + 1) / warmup
    done = (update - warmup) / max(1, total - warmup)
    if schedule is Schedule.LINEAR:
        return peak * max(0.0, 1 - done)
    if schedule is Schedule.COSINE:
        return peak * (1 + math.cos(math.pi * min(1.0, done))) / 2
    return peak
