"""DeepSpeed's ZeRO stages 1 to 3 as a way to share out the optimiser, the gradients and the weights.

DeepSpeed by itself steps after a fixed number of micro-batches. Here that number differs from update to update, so it
is told which micro-batch is the last; every process has as many, some perhaps with weight 0. Clipping, the norm and the
averaging over processes are DeepSpeed's; they are the formulas of ``TorchParallel``. Weights and moments are read and
set whole, in float32, so that a checkpoint continues on any number of processes and under any kind of parallelism.

The trainer takes it up by name (``parallel_of``) when ``accelerate`` is set up for DeepSpeed.

Test it alone: ``make test-deepspeed`` (an environment of its own)
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.zero.partition_parameters import register_external_parameter
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor

from opd_env.trainer.batch import PolicyModule, Row, make_batch
from opd_env.trainer.learn.parallel import Moments, Parallel, trained

_SHARED = ("exp_avg", "exp_avg_sq")


class DeepSpeedParallel(Parallel):
    """A DeepSpeed engine, made by ``accelerate`` from the settings of its launcher."""

    def __init__(self, policy: PolicyModule, accelerator: Any, *, weight_decay: float, max_grad_norm: float) -> None:
        self.parameters = trained(policy)
        self._shapes = {name: value.shape for name, value in self.parameters.items()}  # before stage 3 empties them
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings |= {
            "train_micro_batch_size_per_gpu": 1,  # has to be said; nothing here depends on it
            "gradient_accumulation_steps": 1,  # a larger number would divide the loss
            "gradient_clipping": max_grad_norm,
            "data_types": {"grad_accum_dtype": "fp32"},
        }
        super().__init__(policy, accelerator, weight_decay)
        if settings["zero_optimization"]["stage"] == 3:
            self._hold_head(policy)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Any:
        self.policy.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.policy.backward(loss)

    def step(self, learning_rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.policy.step()  # drops gradients that are not finite
        return float(self.policy.get_global_grad_norm())

    def discard(self) -> None:
        self._idle_step(float("nan"))  # DeepSpeed drops them all when it finds one that is not finite

    def weight(self, name: str) -> Tensor:
        weight: Tensor = safe_get_full_fp32_param(self.parameters[name]).view(self._shapes[name])
        return weight

    def moments(self, name: str) -> Moments:
        if not self._states:
            return {}
        parameter = self.parameters[name]
        shared = {key: safe_get_full_optimizer_state(parameter, key).view(self._shapes[name]) for key in _SHARED}
        return {**shared, "step": self._states[0]["step"].clone()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Moments]) -> None:
        for name, parameter in self.parameters.items():
            safe_set_full_fp32_param(parameter, weights[name].to(self._accelerator.device, torch.float32))
        with torch.enable_grad():
            self._idle_step(0.0)  # at learning rate 0: hands the weights to the model, and makes the moments
        self.forget()
        for name, one in moments.items():
            for key in _SHARED:
                value = one[key].to(self._accelerator.device, torch.float32)
                safe_set_full_optimizer_state(self.parameters[name], value, key)
            for state in self._states:
                state["step"].copy_(one["step"])

    def forget(self) -> None:
        for state in self._states:
            for value in state.values():
                value.zero_()

    @staticmethod
    def _hold_head(policy: PolicyModule) -> None:
        """Keeps the head whole while the policy computes.

        It is called once per chunk of tokens, so how often differs between processes, and each call of the module would
        be a collective.
        """
        model = policy.model
        head = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_output_embeddings()
        for parameter in head.parameters():
            register_external_parameter(policy, parameter)
        head._forward_pre_hooks.clear()  # DeepSpeed's, which would gather and release it at every call
        head._forward_hooks.clear()

    def _idle_step(self, factor: float) -> None:
        """A step with gradients of 0, or of nan."""
        batch = make_batch([Row(np.zeros(2, dtype=np.int32), np.array([False, True]))])
        with self.micro_batch(last=True):
            loss = self.policy(batch.to(self._accelerator.device), lambda hidden_NH, head: head(hidden_NH).sum())
            self.backward(factor * loss)
        self.step(0.0)

    @property
    def _states(self) -> list[dict[str, Tensor]]:
        """What AdamW keeps of every flat buffer of this process's parameters."""
        return list(self.policy.optimizer.optimizer.state.values())
