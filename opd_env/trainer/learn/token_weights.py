"""How much each sampled token counts in the distillation signal: by kind, turn, place, failed calls, or drift.

Worked example::

    TokenWeights(error_turns=0.0, tool_call=2.0).of_tokens(trajectory)      # [1, 1, 2, 2, 0, 0, …]
    scheme_weights(Scheme.SOD, log_ratio_BS, turn_BS, mask_BS, progress=0.5)

Weights multiply the divergence at a token (its own term, and its share of earlier tokens' rewards when γ > 0); N stays
the number of all sampled tokens. What stays exact:

- A weight that the prefix decides (``turn_decay``, ``token_decay``) gives the gradient of the weighted divergence,
  with every estimator.
- Every other weight looks at the sampled token itself or at what follows it. ``full`` and ``topk`` then still follow
  the exact gradient at each prefix, only by more or less. ``sampled`` prefers some samples to others, which is a bias;
  and a constant in the advantage is then no longer free, so that ``mode=opd_plus`` is refused without a baseline.

Test it alone: ``pytest tests/trainer/learn/test_token_weights.py``
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from opd_env.episode.trajectory import Trajectory
from opd_env.evaluation.counts import NOT_JUDGED
from opd_env.formats.base import TokenKind
from opd_env.settings.fields import ConfigError, Settings, number

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_GAP = 100.0
"""Bound on |log u| where drift is measured, in nats: so far away is a token that the teacher forbids."""


class Scheme(StrEnum):
    """Weights from the drift between student and teacher, or from the shape of the episode."""

    NONE = "none"
    SOD = "sod"
    """Turns count less the further they have drifted (arXiv 2605.07725)."""
    TURN_OPD = "turn_opd"
    """From equal tokens to equal turns in the course of the run (arXiv 2607.05804)."""
    IW_OPD = "iw_opd"
    """Tokens count more while little drift has added up before them (arXiv 2606.22600)."""


@dataclass(frozen=True, kw_only=True)
class TokenWeights(Settings):
    """Weights of sampled tokens in the distillation signal. All factors multiply; 1 everywhere changes nothing."""

    path = "objective.token_weights"
    text: float = number(1.0, low=0, high=10)
    """Factor of text outside calls and thinking, 0 to 10."""
    thinking: float = number(1.0, low=0, high=10)
    """Factor of thinking, 0 to 10."""
    tool_call: float = number(1.0, low=0, high=10)
    """Factor of tool calls, 0 to 10."""
    error_turns: float = number(1.0, low=0, high=10)
    """Factor of turns with a failed call, 0 to 10; 0 drops them."""
    turn_decay: float = number(1.0, above=0, high=1)
    """Factor per further turn of the episode, above 0 up to 1."""
    token_decay: float = number(1.0, above=0, high=1)
    """Factor per further sampled token of the episode, above 0 up to 1."""

    def check(self) -> None:
        """Refuses weights under which nothing counts."""
        if self.text == self.thinking == self.tool_call == 0:
            names = " and ".join(self.key(name) for name in ("text", "thinking", "tool_call"))
            raise ConfigError(f"{names} are all 0: nothing would be learnt")

    @property
    def known_before_the_token(self) -> bool:
        """Whether the prefix alone decides every weight."""
        return self.text == self.thinking == self.tool_call and self.error_turns == 1

    def of_tokens(self, trajectory: Trajectory) -> NDArray[np.float32]:
        """The weight of each sampled token by kind, turn, place and failed calls."""
        sampled = trajectory.sampled
        factors = np.ones(max(TokenKind) + 1)
        factors[[TokenKind.TEXT, TokenKind.THINKING, TokenKind.TOOL_CALL]] = self.text, self.thinking, self.tool_call
        turn_N = trajectory.turn[sampled].astype(np.int64)
        failed = np.array([False, *(_failed(trajectory, number) for number in range(len(trajectory.turns)))])
        weight_N = factors[trajectory.kind[sampled]] * np.where(failed[turn_N], self.error_turns, 1.0)
        weight_N *= self.turn_decay ** (turn_N - 1.0) * self.token_decay ** np.arange(len(turn_N), dtype=np.float64)
        return weight_N.astype(np.float32)


def scheme_weights(scheme: Scheme, log_ratio_BS: Tensor, turn_BS: Tensor, mask_BS: Tensor, progress: float) -> Tensor:
    """The scheme's weight of each sampled token, one episode per row; entries outside the mask mean nothing.

    Args:
        scheme: 1 everywhere with ``none``.
        log_ratio_BS: log u of the sampled tokens.
        turn_BS: the turn of each, from 1.
        mask_BS: which entries exist.
        progress: share of the run that is done, 0 to 1.
    """
    if scheme is Scheme.SOD:
        return sod(log_ratio_BS, turn_BS, mask_BS)
    if scheme is Scheme.TURN_OPD:
        return turn_opd(turn_BS, mask_BS, progress).to(log_ratio_BS.dtype)
    if scheme is Scheme.IW_OPD:
        return iw_opd(log_ratio_BS, mask_BS)
    return log_ratio_BS.new_ones(log_ratio_BS.shape)


def sod(log_ratio_BS: Tensor, turn_BS: Tensor, mask_BS: Tensor, bound: float = 1.5) -> Tensor:
    """Step-wise on-policy distillation: ``w_k = min(d_1 / d_k, bound)`` for all tokens of turn k.

    ``d_k`` is the mean ``|log u|`` of turn k (arXiv 2605.07725, equations 6 and 7; the paper's product of
    ``d_u / d_(u+1)`` over earlier turns telescopes to this, its bound is 1 + δ with δ = 0.5). A turn that has drifted
    counts less, one that has recovered counts fully again. Shapes as in ``scheme_weights``.
    """
    gap_BK, count_BK = _by_turn(_gap(log_ratio_BS, mask_BS), turn_BS, mask_BS), _by_turn(None, turn_BS, mask_BS)
    mean_BK = gap_BK / count_BK.clamp(min=1) + 1e-6
    first_B1 = mean_BK.gather(1, turn_BS[:, :1].long())
    return (first_B1 / mean_BK).clamp(max=bound).gather(1, turn_BS.long())


def turn_opd(turn_BS: Tensor, mask_BS: Tensor, share: float) -> Tensor:
    """From equal tokens to equal turns: ``(1 - share) + share · S / (K S_k)`` for the S_k tokens of turn k of K.

    At ``share`` = 1 every turn of an episode has the same total weight, however long it is; the mean weight of an
    episode's S tokens is 1 at any share. After the progressive turn-normalised loss of TurnOPD (arXiv 2607.05804),
    which moves from the one to the other during training; its rollout-depth controller is not part of this.
    """
    count_BK = _by_turn(None, turn_BS, mask_BS)
    turns_B1 = (count_BK > 0).sum(1, keepdim=True).clamp(min=1)
    balanced_BK = count_BK.sum(1, keepdim=True) / (turns_B1 * count_BK.clamp(min=1))
    return (1 - share) + share * balanced_BK.gather(1, turn_BS.long())


def iw_opd(log_ratio_BS: Tensor, mask_BS: Tensor, boost: float = 0.5) -> Tensor:
    """Importance-weighted OPD: ``1 + boost · (1 - Σ_{k<n} |log u_k| / Σ_k |log u_k|)``.

    From 1 + boost at the first token down to 1 where all of the episode's drift lies behind (arXiv 2606.22600,
    algorithm 1; boost is its γ). Shapes as in ``scheme_weights``.
    """
    gap_BS = _gap(log_ratio_BS, mask_BS)
    before_BS = gap_BS.cumsum(1) - gap_BS
    return 1 + boost * (1 - before_BS / gap_BS.sum(1, keepdim=True).clamp(min=1e-8))


def _failed(trajectory: Trajectory, turn: int) -> bool:
    return any(call.error is not None and call.error not in NOT_JUDGED for call in trajectory.turns[turn].calls)


def _gap(log_ratio_BS: Tensor, mask_BS: Tensor) -> Tensor:
    return log_ratio_BS.detach().abs().clamp(max=LARGEST_GAP).where(mask_BS, log_ratio_BS.new_zeros(()))


def _by_turn(values_BS: Tensor | None, turn_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Sums over the existing tokens of each turn (their number when no values are given), by the turn's number."""
    values_BS = mask_BS.float() if values_BS is None else values_BS
    sums_BK = values_BS.new_zeros(len(values_BS), int(turn_BS.max()) + 1)
    return sums_BK.scatter_add(1, turn_BS.long(), values_BS)
