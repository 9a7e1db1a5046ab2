"""What verl's trainer computes from the episodes of its workers: the advantages of the kit's own trajectories."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("verl", reason="needs verl: make test-verl")

from verl.trainer.distillation.losses import get_distillation_loss_fn
from verl.trainer.ppo.core_algos import get_kl_controller
from verl.trainer.ppo.ray_trainer import apply_kl_penalty, compute_advantage
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.padding import left_right_2_no_padding

from opd_env.errors import UserError
from opd_env.trainer.math.advantages import advantage
from tests.plugins.verl.verl_worker import (
    ROWS,
    Server,
    distilling,
    expected,
    play,
)


def test_the_advantages_of_verls_batch_are_those_of_the_kits_trajectories(config: Any) -> None:
    """verl's worker asks its teacher, verl pads, packs and shifts; the loss must meet the same tokens again."""
    config = distilling(config, "opd_plus_centred_jsd")

    def teacher_logprobs(ids: list[int]) -> list[float]:
        return [-((7 * position + token) % 11) / 4 for position, token in enumerate(ids)]

    def score(ids: list[int], _: Any) -> dict[str, Any]:  # as verl's servers answer: the first token has none
        scores = [[value] for value in [*teacher_logprobs(ids)[1:], 0.0]]
        told = {"prompt_ids": [[token] for token in [*ids[1:], 0]], "prompt_logprobs": scores}
        return {"token_ids": [0], "extra_fields": told}

    batch = play(config, Server(), ROWS[:8], teacher=Server(score))
    data = left_right_2_no_padding(batch.batch)
    data["old_log_probs"] = data["rollout_log_probs"]
    settings = omega_conf_to_dataclass(config.distillation)
    losses, _ = get_distillation_loss_fn("opd_plus_centred_jsd")(None, settings, {}, data)
    trajectories = [expected(index) for index in range(8)]
    sampled = [one.sampled for one in trajectories]
    teacher = [np.asarray(teacher_logprobs(one.token_ids.tolist()), dtype=np.float32) for one in trajectories]
    log_ratio = [(t - one.logprobs)[mask] for t, one, mask in zip(teacher, trajectories, sampled, strict=True)]
    wanted = advantage(torch.from_numpy(np.concatenate(log_ratio)), "jsd", "opd_plus_centred")
    found = -losses[data["response_mask"].bool()]
    torch.testing.assert_close(found, wanted)


def test_an_estimators_rewards_are_log_u_without_the_grade(config: Any) -> None:
    """verl adds log-ratios to the score before our estimator reads them: the grade must not stand among them."""
    config = config.copy()
    config.algorithm.adv_estimator = "opd_plus_jsd"
    config.algorithm.update({"use_kl_in_reward": True, "kl_ctrl": {"type": "fixed", "kl_coef": 1.0}})
    batch = play(config, Server(), ROWS)
    assert batch.non_tensor_batch["acc"].sum() > 0
    data = batch.batch
    data["token_level_scores"], data["old_log_probs"] = data["rm_scores"], data["rollout_log_probs"]
    data["ref_log_prob"] = -data["responses"] / 100
    batch, _ = apply_kl_penalty(batch, get_kl_controller(config.algorithm.kl_ctrl), config.algorithm.kl_penalty)
    mask = data["response_mask"].bool()
    found = compute_advantage(batch, config.algorithm.adv_estimator, config=config.algorithm).batch["advantages"]
    wanted = advantage(data["ref_log_prob"] - data["old_log_probs"], "jsd", "opd_plus", mask=mask)
    torch.testing.assert_close(found, wanted)
    config.algorithm.kl_ctrl.kl_coef = 0.001
    with pytest.raises(UserError, match=r"set algorithm.kl_ctrl.kl_coef=1 \(got 0.001\)"):
        compute_advantage(batch, config.algorithm.adv_estimator, config=config.algorithm)
