"""Draws against the distribution function written out, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_env.engines.base import GREEDY, SamplingParams
from opd_env.engines.local import draw_tokens

LOGITS = st.lists(st.integers(-40, 40), min_size=5, max_size=5, unique=True).map(lambda row: [one / 5 for one in row])


def drawn_by_hand(logits: list[float], params: SamplingParams, uniform: float) -> tuple[set[int], list[float]]:
    """The tokens whose part of [0, 1) the number lies in, give or take 1e-4, and the log-probs of all."""
    temperature = params.temperature or 1.0
    weights = [math.exp(logit / temperature) for logit in logits]
    probabilities = [weight / sum(weights) for weight in weights]
    if params.temperature == 0:
        most = max(probabilities)
        return {index for index, one in enumerate(probabilities) if one == most}, [
            math.log(one) for one in probabilities
        ]
    found, low = set(), 0.0
    for index, probability in enumerate(probabilities):
        high = low + probability
        if low - 1e-4 <= uniform <= high + 1e-4:
            found.add(index)
        low = high
    return found, [math.log(one) for one in probabilities]


@given(
    st.lists(
        st.tuples(
            LOGITS,
            st.sampled_from([SamplingParams(), SamplingParams(0.5), SamplingParams(2.0), GREEDY]),
            st.floats(0, 1, exclude_max=True),
        ),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_every_row_draws_by_its_own_settings_and_number(rows: list[tuple[list[float], SamplingParams, float]]) -> None:
    logits, params, uniforms = zip(*rows, strict=True)
    chosen_N, logprobs_N = draw_tokens(torch.tensor(logits), params, uniforms)
    for row, token, logprob in zip(rows, chosen_N.tolist(), logprobs_N.tolist(), strict=True):
        tokens, expected = drawn_by_hand(*row)
        assert token in tokens
        assert logprob == pytest.approx(expected[token], abs=1e-4)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_random_numbers_draw_tokens_that_can_be_drawn(uniform: float) -> None:
    impossible = float("-inf")
    logits_NV = torch.tensor([[impossible, 1.0, 2.0, impossible]])
    chosen_N, logprobs_N = draw_tokens(logits_NV, [SamplingParams()], [uniform])
    assert chosen_N.tolist() == [1 if uniform == 0 else 2]
    assert torch.isfinite(logprobs_N).all()
