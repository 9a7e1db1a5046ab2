"""Token weights: each against a loop over tokens, and their updates against the gradient that they must have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from opd_env.episode.trajectory import CallRecord, Trajectory
from opd_env.formats.base import TokenKind
from opd_env.settings.fields import ConfigError
from opd_env.tools import ToolErrorKind
from opd_env.trainer.learn.token_weights import Scheme, TokenWeights, iw_opd, scheme_weights, sod, turn_opd
from opd_env.trainer.math.advantages import advantage
from opd_env.trainer.math.divergences import get_divergence
from tests.trainer.counted import World, trajectories
from tests.trainer.learn.test_objective_enumeration import (
    assert_equal_updates,
    decoder_gradient,
    expected_update,
    objective_of,
)
from tests.trainer.settings import config_of
from tests.trainer.toy import made_trajectory

PLAIN = {"student": "s", "teacher": "t", "task": "arithmetic", "estimator": "sampled"}


def with_calls(trajectory: Trajectory, *errors: ToolErrorKind | None) -> Trajectory:
    """The trajectory with one call per turn, over the turn's first token."""
    kind, turns = trajectory.kind.copy(), []
    for turn, error in zip(trajectory.turns, errors, strict=False):
        call = CallRecord("calculator", "{}", turn.start, turn.start + 1, "", error)
        kind[turn.start] = TokenKind.TOOL_CALL
        turns.append(replace(turn, calls=(call,)))
    return replace(trajectory, kind=kind, turns=(*turns, *trajectory.turns[len(turns) :]))


def test_factors_of_kind_turn_place_and_error_multiply():
    one = with_calls(made_trajectory(1, turns=(2, 3, 1)), None, ToolErrorKind.SCHEMA)
    weights = TokenWeights(text=0.5, tool_call=2.0, error_turns=0.25, turn_decay=0.5, token_decay=0.9)
    expected = []
    for place, (kind, turn) in enumerate(zip(one.kind[one.sampled], one.turn[one.sampled], strict=True)):
        factor = (2.0 if kind == TokenKind.TOOL_CALL else 0.5) * (0.25 if turn == 2 else 1.0)
        expected.append(factor * 0.5 ** (turn - 1) * 0.9**place)
    np.testing.assert_allclose(weights.of_tokens(one), expected, rtol=1e-6)
    assert TokenWeights().of_tokens(one).tolist() == [1.0] * 6


@pytest.mark.parametrize(
    ("error", "dropped"), [(ToolErrorKind.INVALID_JSON, True), (ToolErrorKind.SANDBOX, False), (None, False)]
)
def test_only_failures_of_the_student_make_an_error_turn(error, dropped):
    one = with_calls(made_trajectory(1, turns=(2, 3)), error)
    assert TokenWeights(error_turns=0.0).of_tokens(one).tolist() == [0.0 if dropped else 1.0] * 2 + [1.0] * 3


# Two episodes: turns of 3, 1 and 2 tokens; of 2 tokens, then padding.
TURN = torch.tensor([[1, 1, 1, 2, 3, 3], [1, 1, 0, 0, 0, 0]])
MASK = TURN > 0
LOG_U = torch.tensor([[0.1, -0.3, 0.2, -0.8, 0.05, -0.05], [0.4, 0.0, torch.nan, torch.inf, -9.0, 1.0]])


def test_sod_counts_a_turn_by_the_first_turns_drift_over_its_own():
    """Against the paper's product over earlier turns."""
    drift = [0.2, 0.8, 0.05]
    products = [1.0, drift[0] / drift[1], drift[0] / drift[1] * drift[1] / drift[2]]
    expected = [min(product, 1.5) for product in products]
    got = sod(LOG_U, TURN, MASK)
    torch.testing.assert_close(
        got[0], torch.tensor([expected[turn - 1] for turn in TURN[0].tolist()]), rtol=1e-4, atol=0
    )
    assert got[1][MASK[1]].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_turn_opd_goes_from_equal_tokens_to_equal_turns(share):
    got = turn_opd(TURN, MASK, share)
    balanced = torch.tensor([6 / (3 * length) for length in (3, 3, 3, 1, 2, 2)])
    torch.testing.assert_close(got[0], (1 - share) + share * balanced)
    assert got[1][MASK[1]].tolist() == [1.0, 1.0]
    assert float(got[0].mean()) == pytest.approx(1)


def test_iw_opd_falls_with_the_drift_that_lies_behind():
    total = 0.1 + 0.3 + 0.2 + 0.8 + 0.1
    behind = [0.0, 0.1, 0.4, 0.6, 1.4, 1.45]
    got = iw_opd(LOG_U, MASK)
    torch.testing.assert_close(got[0], torch.tensor([1 + 0.5 * (1 - value / total) for value in behind]))
    torch.testing.assert_close(got[1][MASK[1]], torch.tensor([1.5, 1.0]))


@pytest.mark.parametrize("scheme", list(Scheme))
def test_weights_are_finite_when_teacher_and_student_agree_or_a_token_is_forbidden(scheme):
    for value in (0.0, -torch.inf, torch.inf):
        log_u = torch.tensor([[value, 0.1, value, value, 0.0, value]])
        got = scheme_weights(scheme, log_u, TURN[:1], MASK[:1], 0.5)
        assert bool(((got >= 0) & got.isfinite()).all())


@pytest.mark.parametrize("estimator", ["full", "topk"])
@pytest.mark.parametrize("scheme", ["none", "sod", "turn_opd", "iw_opd"])
def test_with_sums_over_outcomes_any_weight_gives_the_weighted_exact_gradient(estimator, scheme):
    world = World.make()
    weights = TokenWeights(text=0.5, tool_call=2.0, token_decay=0.8)
    objective = objective_of(
        world, divergence="jsd", estimator=estimator, topk_tokens=1, token_weights=weights, weight_scheme=scheme
    )
    update = expected_update(world, objective)
    log_u = objective.tokens.log_ratio_N
    expected, start = [], 0
    for one in trajectories(world):
        turn, count = torch.from_numpy(one.turn[one.sampled])[None], one.num_sampled
        own = slice(start, start + count)
        factor = scheme_weights(Scheme(scheme), log_u[own][None], turn, torch.ones_like(turn, dtype=torch.bool), 1.0)
        expected.append(torch.from_numpy(weights.of_tokens(one)) * factor[0])
        start += count
    k = 1 if estimator == "topk" else 3
    exact = world.objective(get_divergence("jsd"), 0, topk=k, weights_N=torch.cat(expected).double())
    assert_equal_updates(update, decoder_gradient(world, exact))


@pytest.mark.parametrize("mode", ["opd_plus", "opd_plus_centred"])
@pytest.mark.parametrize("baseline", ["none", "value"])
def test_weights_that_the_prefix_decides_leave_the_sampled_estimator_exact(mode, baseline):
    world = World.make()
    weights = TokenWeights(turn_decay=0.5, token_decay=0.8)
    objective = objective_of(world, divergence="jsd", mode=mode, baseline=baseline, token_weights=weights)
    weights_N = torch.cat([torch.from_numpy(weights.of_tokens(one)) for one in trajectories(world)]).double()
    exact = world.objective(get_divergence("jsd"), 0, weights_N=weights_N)
    assert_equal_updates(expected_update(world, objective), decoder_gradient(world, exact))


def test_with_reward_to_go_later_tokens_count_by_their_own_weight():
    """γ = 1: the gradient of E_y Σ_n w_n f(u_n), written out for every episode."""
    world, weights, divergence = World.make(), TokenWeights(turn_decay=0.5, token_decay=0.8), get_divergence("jsd")
    logprobs_BT, teacher_BT = (world.episodes.logprobs(model) for model in (world.student, world.teacher))
    values_BT = torch.where(world.episodes.sampled_BT, divergence.f((teacher_BT - logprobs_BT).exp()), 0.0)
    for b, one in enumerate(trajectories(world)):
        scale = torch.ones_like(values_BT)
        scale[b, : len(one.token_ids)][torch.from_numpy(one.sampled)] = torch.from_numpy(
            weights.of_tokens(one)
        ).double()
        values_BT = values_BT * scale
    exact = (world.probabilities(logprobs_BT) * values_BT.sum(1)).sum()
    objective = objective_of(world, divergence="jsd", gamma=1.0, token_weights=weights)
    assert_equal_updates(expected_update(world, objective), decoder_gradient(world, exact))


def test_a_weight_of_zero_drops_a_token_that_could_not_be_trained_on():
    log_u = torch.tensor([[-torch.inf, 0.5]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    kept = advantage(log_u, weights=torch.tensor([[0.0, 2.0]]), mask=mask, gamma=1.0)
    assert kept.tolist() == [[1.0, 1.0]]
    assert float(advantage(log_u, weights=torch.tensor([[1e-9, 1.0]]))[0, 0]) == -torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text": -1.0}, r"weights.text=-1.0 is out of range"),
        ({"error_turns": 11.0}, r"weights.error_turns=11.0 is out of range"),
        ({"turn_decay": 0.0}, r"weights.turn_decay=0.0 is out of range: it must be above 0"),
        ({"text": 0.0, "thinking": 0.0, "tool_call": 0.0}, "nothing would be learnt"),
    ],
)
def test_weights_out_of_range_are_refused(change, reason):
    with pytest.raises(ConfigError, match=reason):
        TokenWeights(**change)


def test_an_advantage_with_a_constant_is_refused_where_the_weight_could_depend_on_the_sample():
    dropped = TokenWeights(error_turns=0.0)
    for change in (
        {"token_weights": dropped},
        {"weight_scheme": "sod"},
        {"token_weights": TokenWeights(tool_call=2.0)},
    ):
        with pytest.raises(ConfigError, match="mode=opd_plus would push the student"):
            config_of(**PLAIN, mode="opd_plus", **change)
        config_of(**PLAIN, mode="opd_plus", baseline="value", **change)
        config_of(**PLAIN, **change)
    config_of(**PLAIN, mode="opd_plus", token_weights=TokenWeights(turn_decay=0.5))
