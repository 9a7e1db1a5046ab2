"""Where the weights that are trained and their optimiser live: whole in every process, or shared out by FSDP2.

``Updater`` computes losses; a ``Parallel`` takes the gradients through the processes, steps the optimiser and gives the
weights back whole. DeepSpeed's is in ``opd_env.plugins.deepspeed``.

    parallel = parallel_of(policy, accelerator, weight_decay=0.0, max_grad_norm=1.0)
    with parallel.micro_batch(last=True):
        parallel.backward(parallel.policy(batch, score))
    grad_norm = parallel.step(learning_rate=1e-3)

Test it alone: ``pytest tests/trainer/learn/test_update.py tests/trainer/learn/test_distributed.py``
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_

from opd_env.trainer.batch import PolicyModule

Moments = Mapping[str, Tensor]
"""State of AdamW for one parameter: ``exp_avg``, ``exp_avg_sq`` and ``step``; empty before the first step."""


def trained(policy: PolicyModule) -> dict[str, Tensor]:
    """The parameters that get gradients, by their name in the model."""
    return {name: value for name, value in policy.model.named_parameters() if value.requires_grad}


class Parallel(ABC):
    """One policy, its AdamW, and the processes that share them. Every process calls every method.

    Attributes:
        policy: what computes; called as the ``PolicyModule`` is.
        parameters: what is trained, by name; shards where the weights are shared out.
    """

    parameters: dict[str, Tensor]

    def __init__(self, policy: PolicyModule, accelerator: Any, weight_decay: float) -> None:
        self._accelerator = accelerator
        # The learning rate is set at each step.
        adamw = torch.optim.AdamW(trained(policy).values(), lr=0.0, weight_decay=weight_decay, fused=True)
        self.policy, self.optimizer = accelerator.prepare(policy.eval(), adamw)

    @abstractmethod
    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Holds the forward and backward pass of a micro-batch; ``last`` of the update."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients, which are means over processes."""

    @abstractmethod
    def step(self, learning_rate: float) -> float:
        """Clips, steps and drops the gradients; returns their norm before. One that is not finite takes no step."""

    @abstractmethod
    def discard(self) -> None:
        """Drops the gradients."""

    @abstractmethod
    def weight(self, name: str) -> Tensor:
        """A trained parameter, whole."""

    @abstractmethod
    def moments(self, name: str) -> Moments:
        """The optimiser's state of a trained parameter, whole."""

    @abstractmethod
    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Moments]) -> None:
        """Takes over whole weights and moments, both by parameter."""

    @abstractmethod
    def forget(self) -> None:
        """Starts the optimiser anew."""


class TorchParallel(Parallel):
    """One process, DDP or FSDP2: PyTorch's own, as ``accelerate`` prepares it."""

    def __init__(self, policy: PolicyModule, accelerator: Any, *, weight_decay: float, max_grad_norm: float) -> None:
        super().__init__(policy, accelerator, weight_decay)
        self._max_grad_norm = max_grad_norm
        self.parameters = trained(self.policy if accelerator.is_fsdp2 else policy)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        # Processes exchange gradients in the last one only.
        return contextlib.nullcontext() if last else self._accelerator.no_sync(self.policy)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def step(self, learning_rate: float) -> float:
        grad_norm = float(_whole(clip_grad_norm_(self.parameters.values(), self._max_grad_norm)))
        if math.isfinite(grad_norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.discard()
        return grad_norm

    def discard(self) -> None:
        self.optimizer.zero_grad()

    def weight(self, name: str) -> Tensor:
        return _whole(self.parameters[name].detach())

    def moments(self, name: str) -> Moments:
        return {key: _whole(value) for key, value in self.optimizer.state[self.parameters[name]].items()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Moments]) -> None:
        self.forget()
        for name, parameter in self.parameters.items():
            parameter.copy_(_shared_out(weights[name], parameter))
            self.optimizer.state[parameter] = {
                key: value if key == "step" else _shared_out(value, parameter)
                for key, value in moments.get(name, {}).items()
            }

    def forget(self) -> None:
        self.optimizer.state.clear()


def parallel_of(policy: PolicyModule, accelerator: Any, *, weight_decay: float, max_grad_norm: float) -> Parallel:
    """What fits the settings of ``accelerate``."""
    kind: Any = TorchParallel
    if accelerator.distributed_type == "DEEPSPEED":
        # By name: plugins import the trainer, never the other way round, and this one needs DeepSpeed.
        kind = import_module("opd_env.plugins.deepspeed").DeepSpeedParallel
    parallel: Parallel = kind(policy, accelerator, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    return parallel


def _whole(value: Tensor) -> Tensor:
    """The tensor itself, or all of one that is sharded."""
    full: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return full


def _shared_out(value: Tensor, like: Tensor) -> Tensor:
    """``value`` on the device of ``like``, and sharded as ``like`` is."""
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value
