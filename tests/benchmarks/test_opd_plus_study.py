"""The study of advantages: its arms are what they are called, and a stopped one is finished without repetition."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.opd_plus_study import __main__ as study
from benchmarks.opd_plus_study.analysis import OverSeeds, answers, holm, summaries
from benchmarks.opd_plus_study.arms import ARMS, COMPARISONS, REFERENCE, arm_named, register_control
from benchmarks.opd_plus_study.report import tables
from opd_env.trainer import advantage
from opd_env.trainer.math import divergences

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "opd_plus_study" / "results"
LOG_U = torch.linspace(-6, 6, 241)
TINY = {
    "run.steps": 1, "sampling.episodes_per_step": 8, "optimizer.warmup_steps": 0, "run.checkpoint_every": 1,
}  # fmt: skip


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_a_valid_run(arm, tmp_path):
    assert arm.config(seed=3, output=tmp_path).run.seed == 3


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


@pytest.fixture(autouse=True)
def _forget_the_control(monkeypatch):
    """No other test may find it among the registered divergences."""
    monkeypatch.setattr(divergences, "_REGISTERED", {})


def test_the_control_gives_every_token_minus_one():
    register_control()
    settings = arm_named("constant").settings
    advantages = advantage(2 * LOG_U, settings["objective.divergence"], settings["objective.mode"], clip_log_ratio=6.0)
    torch.testing.assert_close(advantages, -torch.ones_like(LOG_U), rtol=0, atol=1e-6)


def record(arm, seed, greedy, final=None, kl=0.5):
    measured = {"sampled": greedy, "over_call": "0" * len(greedy), "response_length": 34.0, "teacher_kl": kl}
    return {
        "arm": arm,
        "seed": seed,
        "chosen": measured | {"greedy": greedy},
        "final": None if final is None else measured | {"greedy": final},
        "curves": {"grad_norm": [3.0, 1.0, 2.0], "clip_fraction": [0.25, 0.75]},
    }


def test_an_interval_over_seeds_is_students():
    low, high = OverSeeds((1.0, 2.0, 3.0)).interval
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert not OverSeeds((1.0, 2.0, 3.0)).excludes_zero
    assert OverSeeds((2.0, 2.1, 1.9)).excludes_zero
    assert not OverSeeds((5.0,)).excludes_zero


def test_p_values_are_corrected_by_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1.0, 1.0]


def test_an_arm_is_summarised_over_its_seeds():
    (arm,) = summaries([record("jsd_opd", 0, "1100", final="0000"), record("jsd_opd", 1, "1111")])
    assert (arm.arm.name, arm.seeds, arm.accuracy_final.values) == ("jsd_opd", 2, (0, 1))
    assert arm.accuracy.over_seeds.values == (0.5, 1)
    assert arm.accuracy.over_problems.n == 4
    assert arm.accuracy.interval == (0, 1)
    assert (arm.grad_norm, arm.clip_fraction) == (2.0, 0.5)


def test_equal_seeds_do_not_hide_that_problems_are_few():
    (arm,) = summaries([record("student", seed, "1110") for seed in range(3)])
    assert arm.accuracy.over_seeds.interval == (0.75, 0.75)
    assert arm.accuracy.interval == (arm.accuracy.over_problems.low, arm.accuracy.over_problems.high)
    assert arm.accuracy.over_problems.low < 0.5


def test_a_difference_is_supported_by_seeds_and_problems_together():
    many, few = "1" * 40, "1" + "0" * 39
    clear = [record(arm, seed, bits) for arm, bits in (("jsd_opd", few), ("jsd_opd_plus", many)) for seed in range(3)]
    (answer,) = answers(clear)
    assert answer.supported
    assert (answer.accuracy.mean, answer.gained, answer.lost) == (pytest.approx(39 / 40), 39, 0)
    (one_seed,) = answers(clear[::3])
    assert not one_seed.supported
    (few_problems,) = answers(
        [one | {"chosen": one["chosen"] | {"greedy": one["chosen"]["greedy"][:4]}} for one in clear]
    )
    assert few_problems.accuracy.excludes_zero
    assert not few_problems.supported


def test_a_study_is_continued_and_reported(tmp_path, monkeypatch, capsys):
    arms = ["student", REFERENCE, "sft"]
    command = ["study", "--seeds", "1", "--arms", *arms, "--output", str(tmp_path), "--test", "4", "--validation", "2",
               "--settings", json.dumps(TINY)]  # fmt: skip
    monkeypatch.setattr("sys.argv", [*command, "--finished"])
    with pytest.raises(SystemExit, match="no seed is whole"):
        study.main()
    monkeypatch.setattr("sys.argv", command)
    study.main()
    assert "3 runs, 0 finished" in capsys.readouterr().err
    monkeypatch.setattr(study, "measure_run", None)
    study.main()
    assert "3 runs, 3 finished" in capsys.readouterr().err

    results = json.loads((tmp_path / "results.json").read_text())
    _, reference, supervised = results["runs"]
    assert [(run["arm"], run["seed"], run["failure"]) for run in results["runs"]] == [(arm, 0, None) for arm in arms]
    assert results["settings"]["run.steps"] == len(reference["curves"]["teacher_kl"]) == 1
    assert supervised["tokens"] == pytest.approx(reference["tokens"], rel=0.3)
    assert all(len(run["chosen"]["greedy"]) == len(run["chosen"]["sampled"]) == 4 for run in results["runs"])
    assert list((tmp_path / "work").iterdir()) == []
    assert "| student before | 1 |" in (tmp_path / "tables.md").read_text()
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("accuracy.svg", "curves.svg"))


def test_the_documented_tables_are_those_of_the_committed_results():
    records = json.loads((RESULTS / "results.json").read_text())["runs"]
    assert tables(records) == (RESULTS / "tables.md").read_text()
    assert tables(records) in (ROOT / "docs" / "opd_plus_study.md").read_text()
