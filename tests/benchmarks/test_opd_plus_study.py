"""The study of advantages: its arms are what they are called, and a stopped one is finished without repetition."""

import json

import pytest
import torch

from benchmarks.opd_plus_study.arms import ARMS, COMPARISONS, REFERENCE, arm_named
from benchmarks.opd_plus_study.runs import Evaluations, measure_run
from opd_env.trainer import advantage

LOG_U = torch.linspace(-6, 6, 241)
TINY = {"steps": 1, "episodes_per_step": 8, "warmup_steps": 0, "checkpoint_every": 1}


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_a_valid_run(arm, tmp_path):
    assert arm.config(seed=3, output=tmp_path).seed == 3


def test_names_and_comparisons_are_of_arms():
    names = [arm.name for arm in ARMS]
    assert len(set(names)) == len(names)
    assert {name for pair in COMPARISONS for name in pair} | {REFERENCE} <= set(names)
    with pytest.raises(ValueError, match="no arm 'jsd'"):
        arm_named("jsd")


@pytest.mark.parametrize("divergence", ["jsd", "total_variation", "hellinger"])
def test_corrected_and_centred_are_one_arm_where_the_slope_at_agreement_is_zero(divergence):
    assert torch.equal(advantage(LOG_U, divergence, "opd_plus"), advantage(LOG_U, divergence, "opd_plus_centred"))


def test_reverse_kl_stop_gradient_and_centred_are_one_arm():
    assert torch.equal(advantage(LOG_U, "reverse_kl", "opd"), advantage(LOG_U, "reverse_kl", "opd_plus_centred"))


def test_the_value_baseline_of_forward_kl_is_its_centre():
    student_V, teacher_V = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(
        1
    )
    value = (student_V * advantage((teacher_V / student_V).log(), "forward_kl", "opd_plus")).sum()
    assert value == pytest.approx(1, abs=1e-12)
    with_baseline = advantage(LOG_U, "forward_kl", "opd_plus", baseline=torch.ones_like(LOG_U))
    torch.testing.assert_close(with_baseline, advantage(LOG_U, "forward_kl", "opd_plus_centred"))


def test_the_control_gives_every_token_minus_one():
    settings = arm_named("constant").settings
    advantages = advantage(2 * LOG_U, settings["divergence"], settings["mode"], clip_log_ratio=6.0)
    torch.testing.assert_close(advantages, -torch.ones_like(LOG_U), rtol=0, atol=1e-6)


def test_runs_are_measured_and_supervision_takes_the_tokens_of_the_reference(tmp_path):
    sizes = Evaluations(validation=3, test=4)
    reference = measure_run(arm_named(REFERENCE), 0, tmp_path, sizes, TINY)
    supervised = measure_run(arm_named("sft"), 0, tmp_path, sizes, TINY)
    for record in (reference, supervised):
        assert record == json.loads((tmp_path / "records" / f"{record['arm']}_0.json").read_text())
        assert record["failure"] is None
        assert len(record["chosen"]["greedy"]) == len(record["final"]["sampled"]) == 4
    assert len(reference["curves"]["teacher_kl"]) == 1
    assert supervised["tokens"] == pytest.approx(reference["tokens"], rel=0.3)
    assert not (tmp_path / "work" / f"{REFERENCE}_0").exists()
