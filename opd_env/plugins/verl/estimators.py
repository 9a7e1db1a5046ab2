"""OPD+ advantages as verl's distillation losses and advantage estimators.

Every divergence has three names, ``MODE_DIVERGENCE`` with the modes ``opd``, ``opd_plus`` and ``opd_plus_centred``, in
two of verl's registries:

- distillation losses (``distillation.distillation_loss.loss_mode``), where verl's own teacher servers give the
  teacher's log-probs;
- advantage estimators (``algorithm.adv_estimator``), which read log u as the reward of a token: that is what
  ``algorithm.use_kl_in_reward=true``, ``algorithm.kl_penalty=kl``, ``algorithm.kl_ctrl.kl_coef=1``, the teacher as
  reference model and a score of 0 make of it. The agent loop ``opd_env`` gives that score; others need a reward
  function that returns 0.

Test it alone: ``pytest tests/plugins/verl/test_estimators.py`` (needs verl)
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from torch import Tensor
from verl.trainer.distillation.losses import DistillationLossSettings, register_distillation_loss
from verl.trainer.ppo.core_algos import register_adv_est
from verl.workers.utils.padding import no_padding_2_padding

from opd_env.errors import UserError
from opd_env.trainer.math.advantages import advantage
from opd_env.trainer.math.divergences import list_divergences
from opd_env.trainer.math.modes import Mode


def estimator(divergence: str, mode: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """An advantage estimator for ``register_adv_est``; rewards ``[B, T]`` hold log u = teacher - student."""

    def estimate(
        token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        _check_rewards(config)
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


def _check_rewards(algorithm: Any) -> None:
    """Refuses settings of verl's ``algorithm`` under which the rewards are not log u."""
    if algorithm is None or not len(algorithm):
        return
    found = {key: algorithm.get(key) for key in ("use_kl_in_reward", "kl_penalty")}
    found |= {f"kl_ctrl.{key}": algorithm.kl_ctrl.get(key) for key in ("type", "kl_coef")}
    needed = {"use_kl_in_reward": True, "kl_penalty": "kl", "kl_ctrl.type": "fixed", "kl_ctrl.kl_coef": 1}
    wrong = {key: value for key, value in found.items() if value != needed[key]}
    if wrong:
        right = ", ".join(f"algorithm.{key}={str(needed[key]).lower()}" for key in wrong)
        raise UserError(
            f"{algorithm.get('adv_estimator')} reads the log-ratio of teacher and student as rewards; set {right} (got "
            f"{', '.join(map(str, wrong.values()))})"
        )


def _padded(values: Tensor) -> Tensor:
    return values.to_padded_tensor(0) if values.is_nested else values


def register_estimators() -> None:
    """Makes every divergence and mode known to verl."""
    for name, mode in product(list_divergences(), Mode):
        full_name = f"{mode}_{name}"
        register_adv_est(full_name)(estimator(name, mode))
        settings = DistillationLossSettings(names=[full_name], use_estimator=True)
        register_distillation_loss(settings)(distillation_loss(name, mode))
