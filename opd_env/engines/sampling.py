"""Draws one token per row from logits, each row with its own settings and random number.

Worked example::

    chosen_N, logprobs_N = draw_tokens(logits_NV, [SamplingParams(temperature=1.0)] * 8, uniforms)

Test it alone: ``pytest tests/engines/test_sampling.py``
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opd_env.engines.base import SamplingParams


def draw_tokens(
    logits_NV: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws by inverting the distribution function, in float64, at a number from [0, 1).

    Args:
        logits_NV: of one position per row, float32.
        params: of each row; temperature 0 takes the most likely token.
        uniforms: each row's random number, so that what it draws does not depend on the others.

    Returns:
        The tokens and their natural log-probs at the row's temperature (at 1 for greedy), both of shape ``[N]``.
    """
    temperatures = [one.temperature or 1.0 for one in params]
    if any(one != 1.0 for one in temperatures):
        logits_NV = logits_NV / logits_NV.new_tensor(temperatures)[:, None]
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    greedy = [one.temperature == 0 for one in params]
    if all(greedy):
        chosen_N = logprobs_NV.argmax(dim=-1)
    else:
        cumulative_NV = logprobs_NV.exp().cumsum(dim=-1, dtype=torch.float64)
        total_N = cumulative_NV[:, -1]
        uniform_N = torch.tensor(uniforms, dtype=torch.float64, device=logits_NV.device)
        target_N = torch.minimum(uniform_N * total_N, torch.nextafter(total_N, torch.zeros_like(total_N)))
        chosen_N = torch.searchsorted(cumulative_NV, target_N[:, None], right=True)[:, 0]
        if any(greedy):
            greedy_N = torch.tensor(greedy, device=logits_NV.device)
            chosen_N = torch.where(greedy_N, logprobs_NV.argmax(dim=-1), chosen_N)
    return chosen_N, logprobs_NV.gather(1, chosen_N[:, None])[:, 0]
