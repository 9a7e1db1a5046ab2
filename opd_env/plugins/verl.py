"""OPD+ advantages and the kit's tools inside verl (tried with 0.9.1), for training beyond one machine.

verl imports this module in every process when it is told to::

    VERL_USE_EXTERNAL_MODULES=opd_env.plugins.verl python -m verl.trainer.main_ppo \
        distillation.enabled=true distillation.distillation_loss.loss_mode=opd_plus_centred_jsd \
        distillation.distillation_loss.loss_max_clamp=null distillation.distillation_loss.use_task_rewards=false …

Every divergence has three names, ``MODE_DIVERGENCE`` with the modes ``opd``, ``opd_plus`` and ``opd_plus_centred``, in
two of verl's registries:

- distillation losses, where verl's own teacher servers give the teacher's log-probs (above);
- advantage estimators (``algorithm.adv_estimator``), which read log u as the reward of a token: that is what
  ``algorithm.use_kl_in_reward=true``, ``algorithm.kl_penalty=kl``, ``algorithm.kl_ctrl.kl_coef=1``, the teacher as
  reference model and a reward function that returns 0 make of it.

Tools go into verl's tool configuration, each with its own state in an episode::

    tools:
      - class_name: opd_env.plugins.verl.VerlTool
        config: {type: native, name: calculator}

Test it alone: ``pytest tests/plugins/test_verl_plugin.py`` (needs verl)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import product
from typing import Any
from uuid import uuid4

from torch import Tensor
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse
from verl.trainer.distillation.losses import DistillationLossSettings, register_distillation_loss
from verl.trainer.ppo.core_algos import register_adv_est
from verl.workers.utils.padding import no_padding_2_padding

from opd_env.configuration import import_files
from opd_env.tools import Toolbox, get_tool
from opd_env.trainer.advantages import advantage
from opd_env.trainer.divergences import list_divergences
from opd_env.trainer.modes import Mode


def estimator(divergence: str, mode: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """An advantage estimator for ``register_adv_est``; rewards ``[B, T]`` hold log u = teacher - student."""

    def estimate(token_level_rewards: Tensor, response_mask: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        advantages_BT = advantage(token_level_rewards, divergence, mode, mask=response_mask.bool())
        return advantages_BT, advantages_BT

    return estimate


def distillation_loss(divergence: str, mode: str) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """A loss for ``register_distillation_loss``: verl turns ``[B, T]`` minus advantages into a policy gradient."""

    def losses(config: Any, distillation_config: Any, model_output: Any, data: Any) -> tuple[Tensor, dict[str, Any]]:
        settings = distillation_config.distillation_loss
        if not settings.use_policy_gradient or settings.loss_max_clamp is not None:
            raise ValueError(
                f"{settings.loss_mode} gives advantages: it needs use_policy_gradient=true (got "
                f"{settings.use_policy_gradient}) and loss_max_clamp=null (got {settings.loss_max_clamp}), which would "
                "cut them"
            )
        mask_BT, student_BT = (_padded(data[name]) for name in ("response_mask", "old_log_probs"))
        teacher_BT = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
        log_ratio_BT = teacher_BT - student_BT
        advantages_BT = advantage(log_ratio_BT, divergence, mode, mask=mask_BT.bool())
        kl = -log_ratio_BT[mask_BT.bool()].mean()
        return -advantages_BT, {"distillation/teacher_kl": kl.item()}

    return losses


class VerlTool(BaseTool):  # type: ignore[misc]  # verl has no types
    """A registered tool of the kit as verl calls it: checked arguments, time limits, and errors that are told.

    Args:
        config: ``name`` of the tool; ``imports``, Python files that register it, if it is none of the built-in ones.
        tool_schema: leave it out; the tool has its own.
    """

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema | None = None) -> None:
        import_files(config.get("imports", ()))
        self._tool = get_tool(config["name"])
        self._episodes: dict[str, Toolbox] = {}
        super().__init__(config, tool_schema or OpenAIFunctionToolSchema.model_validate(self._tool.schema))

    async def create(self, instance_id: str | None = None, **_: Any) -> tuple[str, ToolResponse]:
        """Begins an episode."""
        instance_id = instance_id or str(uuid4())
        self._episodes[instance_id] = Toolbox([self._tool])
        return instance_id, ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **_: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        """Runs one call, in a thread, so that a slow tool holds no other episode."""
        result = await asyncio.to_thread(self._episodes[instance_id].call, self.name, parameters)
        return ToolResponse(text=result.content), 0.0, {"error": "" if result.error is None else str(result.error)}

    async def release(self, instance_id: str, **_: Any) -> None:
        """Ends an episode."""
        self._episodes.pop(instance_id).close()


def _padded(values: Tensor) -> Tensor:
    return values.to_padded_tensor(0) if values.is_nested else values


def _register() -> None:
    for name, mode in product(list_divergences(), Mode):
        full_name = f"{mode}_{name}"
        register_adv_est(full_name)(estimator(name, mode))
        settings = DistillationLossSettings(names=[full_name], use_estimator=True)
        register_distillation_loss(settings)(distillation_loss(name, mode))


_register()
