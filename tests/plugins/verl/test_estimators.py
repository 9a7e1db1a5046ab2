"""Estimators against verl's own functions: what its trainer would compute from our registrations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("verl", reason="needs verl: make test-verl")

from verl.protocol import DataProto
from verl.trainer.distillation import losses as verl_losses
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import apply_kl_penalty, compute_advantage

import opd_env.plugins.verl.estimators as plugin
from opd_env.trainer.math.advantages import advantage
from opd_env.trainer.math.divergences import list_divergences

MASK_BT = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]])


def logprobs(seed: int) -> Tensor:
    return -torch.rand(2, 4, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("divergence", list_divergences())
@pytest.mark.parametrize("mode", ["opd", "opd_plus", "opd_plus_centred"])
def test_verls_advantages_with_the_teacher_as_reference_are_ours(divergence: str, mode: str) -> None:
    """Its own KL-in-reward makes log u of a reward of 0; its own trainer function calls our estimator."""
    student_BT, teacher_BT = logprobs(1), logprobs(2)
    data = DataProto.from_dict(
        {
            "token_level_scores": torch.zeros(2, 4), "response_mask": MASK_BT, "old_log_probs": student_BT,
            "ref_log_prob": teacher_BT,
        }
    )  # fmt: skip
    control = core_algos.FixedKLController(1.0)
    data, _ = apply_kl_penalty(data, control, kl_penalty="kl")
    found = compute_advantage(data, adv_estimator=f"{mode}_{divergence}", config={}).batch["advantages"]
    expected = advantage(teacher_BT - student_BT, divergence, mode, mask=MASK_BT.bool())
    torch.testing.assert_close(found, expected)
    assert (found[MASK_BT == 0] == 0).all()


def distilled(divergence: str, mode: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Tensor, Tensor]:
    """The gradient that verl's distillation loss gives the student's log-probs, and what it should be."""
    student_BT, teacher_BT = logprobs(1).requires_grad_(), logprobs(2)
    # Rows with padding are verl's input to its loss when it is not told to remove it; its unpacking is its own.
    for module in (plugin, verl_losses):
        monkeypatch.setattr(module, "no_padding_2_padding", lambda values, data: values)
    settings = SimpleNamespace(
        loss_mode=f"{mode}_{divergence}", use_policy_gradient=True, loss_max_clamp=None, policy_loss_mode="vanilla",
        global_batch_info={}, clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2,
    )  # fmt: skip
    vars(settings).update(changes)
    settings.get = lambda name, default=None: getattr(settings, name, default)
    batch = {
        "response_mask": MASK_BT, "old_log_probs": student_BT.detach(), "teacher_logprobs": teacher_BT[..., None],
        "dp_size": 1, "batch_num_tokens": 4, "global_batch_size": 2,
    }  # fmt: skip
    actor = SimpleNamespace(loss_agg_mode="token-mean", global_batch_info={}, loss_scale_factor=None)
    loss, metrics = verl_losses.distillation_loss(
        actor, SimpleNamespace(distillation_loss=settings), {"log_probs": student_BT}, batch
    )
    loss.backward()
    log_ratio_BT = teacher_BT - student_BT.detach()
    assert metrics["distillation/teacher_kl"] == pytest.approx(-log_ratio_BT[MASK_BT.bool()].mean().item(), rel=1e-5)
    expected = -advantage(log_ratio_BT, divergence, mode, mask=MASK_BT.bool()) / MASK_BT.sum()
    return student_BT.grad, expected  # type: ignore[return-value]


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "forward_kl"])
def test_the_gradient_of_verls_distillation_loss_is_that_of_our_advantages(
    divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, expected = distilled(divergence, "opd_plus_centred", monkeypatch)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("changes", [{"loss_max_clamp": 10.0}, {"use_policy_gradient": False}])
def test_settings_that_would_bias_the_update_are_refused(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"needs use_policy_gradient=true .* and loss_max_clamp=null"):
        distilled("jsd", "opd_plus", monkeypatch, **changes)
