"""The certification: what it must find right, what it must find wrong, and how it says so."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from opd_env.trainer.math.advantages import advantage
from opd_env.trainer.math.certify import (
    Certification,
    Row,
    Verdict,
    World,
    measure,
    print_certification,
    run_certification,
)
from opd_env.trainer.math.divergences import get_divergence, list_divergences, register_divergence
from opd_env.trainer.math.loss import policy_loss


@pytest.fixture(scope="module")
def everything() -> Certification:
    return run_certification()


def find(certification: Certification, target: str, update: str, baseline: str = "none") -> Row:
    rows = [row for row in certification.rows if (row.target, row.update) == (target, update)]
    return next(row for row in rows if row.estimator == "sampled" and row.baseline == baseline)


def printed(certification: Certification) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_certification(console, certification)
    return console.file.getvalue()


def test_everything_that_is_built_in_is_as_theory_says(everything):
    assert everything.ok, printed(everything)
    assert {row.target.split("(")[0] for row in everything.rows} >= set(list_divergences())


def test_every_corrected_row_is_exact_whatever_the_estimator_and_baseline(everything):
    corrected = [row for row in everything.rows if row.update.startswith("opd_plus")]
    assert {(row.estimator, row.baseline) for row in corrected} == {
        ("sampled", "none"),
        ("sampled", "value"),
        ("sampled", "top-k value"),
        ("full", "none"),
        ("topk", "none"),
    }
    for row in corrected:
        assert row.measured.cosine > 0.999999, row
        assert row.measured.relative_error < 1e-6, row


def test_only_reverse_kl_survives_the_stop_gradient(everything):
    exact = {row.target for row in everything.rows if row.update == "opd" and row.measured.verdict is Verdict.EXACT}
    assert exact == {"reverse_kl"}
    assert find(everything, "forward_kl", "opd").measured.cosine < -0.9


def test_centring_and_the_value_baseline_lower_the_variance_of_reverse_kl(everything):
    raw = find(everything, "reverse_kl", "opd_plus").measured.variance
    centred = find(everything, "reverse_kl", "opd_plus_centred").measured.variance
    value = find(everything, "reverse_kl", "opd_plus", baseline="value").measured.variance
    assert value < centred < raw / 2


def test_where_nothing_is_sampled_there_is_no_variance(everything):
    assert all(row.measured.variance == 0 for row in everything.rows if row.estimator != "sampled")


@pytest.mark.parametrize(
    ("target", "update", "verdict"),
    [
        ("reverse_kl", "k1 as reward", Verdict.EXACT),
        ("reverse_kl", "k3 as reward", Verdict.BIASED),
        ("reverse_kl", "k1 as loss", Verdict.ZERO),
        ("reverse_kl", "k2 as loss", Verdict.EXACT),
        ("reverse_kl", "k3 as loss", Verdict.BIASED),
        ("forward_kl", "k3 as loss", Verdict.EXACT),
        ("reverse_kl", "top-k KL as reward", Verdict.ZERO),
        ("density power(0.5)", "PowerOPD(0.5)", Verdict.EXACT),
    ],
)
def test_estimates_of_other_frameworks_get_their_verdict(everything, target, update, verdict):
    assert find(everything, target, update).measured.verdict is verdict


def test_a_users_divergence_is_certified_like_any_other():
    register_divergence("mine", lambda u: (u - 1) ** 2 / (u + 1))
    assert "mine" in {row.target for row in run_certification().rows}
    certification = run_certification(["mine"])
    assert certification.ok
    assert find(certification, "mine", "opd_plus_centred").measured.verdict is Verdict.EXACT
    assert find(certification, "mine", "opd").measured.verdict is Verdict.BIASED


def test_scaled_reverse_kl_is_known_to_need_no_correction():
    register_divergence("double", lambda u: -2 * u.log())
    certification = run_certification(["double"])
    assert certification.ok
    assert find(certification, "double", "opd").expected is Verdict.EXACT


def test_a_wrong_weight_is_found_and_named():
    jsd = get_divergence("jsd")
    wrong = replace(jsd, name="slip", centred_of_log=lambda log_u: 1.01 * jsd.centred_of_log(log_u) + 0.05 * log_u)
    certification = run_certification([wrong])
    assert not certification.ok
    assert {row.target for row in certification.rows if not row.ok} == {"slip"}
    text = printed(certification)
    assert "biased, must be exact" in text
    assert "rows are not as theory says" in text


def test_a_wrong_size_alone_is_found():
    half = replace(get_divergence("jsd"), centred_of_log=lambda log_u: get_divergence("jsd").centred_of_log(log_u) / 2)
    row = find(run_certification([half]), "jsd", "opd_plus_centred")
    assert row.measured.cosine > 0.999999
    assert not row.ok


def test_the_table_has_every_row_and_ends_with_the_verdict():
    certification = run_certification(["hellinger"])
    text = printed(certification)
    lines = text.partition("hellinger")[2].partition("reverse_kl")[0].splitlines()
    assert sum("sampled" in line or "full" in line or "topk" in line for line in lines) == 13
    assert f"All {len(certification.rows)} rows are as theory says." in text


def test_the_table_fits_into_eighty_columns(everything):
    console = Console(file=io.StringIO(), width=80)
    print_certification(console, everything)
    lines = console.file.getvalue().splitlines()
    assert "…" not in "".join(lines)
    assert sum(line.rstrip().endswith((" exact", " biased", " zero")) for line in lines) == len(everything.rows)


def test_a_seed_gives_the_same_numbers_again():
    one, same, other = (run_certification(["jsd"], vocab=20, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert other.ok


def test_too_small_a_vocabulary_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="vocab=8 must be above 8"):
        run_certification(vocab=8)
    with pytest.raises(ValueError, match="did you mean 'jsd'"):
        run_certification(["jds"])


def test_rows_of_updates_are_the_gradients_of_single_samples():
    world = World.random(12, seed=3)
    advantages_V = advantage(world.log_ratio_V, "jeffreys")
    rows = world.updates(advantages_V)
    for token in range(12):
        own = slice(token, token + 1)
        logprobs_V = world.logprobs_V
        loss = policy_loss(logprobs_V[own], logprobs_V[own].detach(), advantages_V[own], torch.tensor([True]), 1)
        torch.testing.assert_close(rows[token], world.backward(loss))


def test_no_update_at_all_is_not_called_biased():
    world = World.random(12, seed=3)
    nothing = measure([world], lambda world: world.gradient(get_divergence("jsd")), lambda world: torch.zeros(12))
    assert nothing.verdict is Verdict.ZERO
