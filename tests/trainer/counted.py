"""Every episode that can happen to a transformer with three tokens: what expected updates are counted over.

A prompt, two sampled tokens, tool output that depends on them, a last sampled token; or an early end.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from opd_env.episode.trajectory import StopReason, Trajectory, TurnRecord
from opd_env.formats.base import TokenKind
from opd_env.trainer.math.advantages import advantage
from opd_env.trainer.math.divergences import Divergence
from opd_env.trainer.math.logprobs import token_logprobs
from opd_env.trainer.math.loss import policy_loss

VOCABULARY = 3
PROMPT = (1, 2)
END = 0


def tool_output(sampled: tuple[int, ...]) -> tuple[int, ...]:
    """What the environment appends after the second token: forced, but it depends on what was sampled."""
    return (sampled[0], 2, (sampled[0] + sampled[1]) % 3)


def transformer(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.6,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


@dataclass
class Episodes:
    """Every episode that can happen, as padded rows: prompt, two sampled tokens, tool output, a last sampled token.
    An episode whose second token is END has neither tool output nor last token."""

    ids_BT: Tensor
    attention_BT: Tensor
    sampled_BT: Tensor

    @classmethod
    def every(cls, padding: str = "right") -> Episodes:
        rows: list[tuple[list[int], list[bool]]] = []
        for first, second in itertools.product(range(VOCABULARY), repeat=2):
            start, own = [*PROMPT, first, second], [False, False, True, True]
            if second == END:
                rows.append((start, own))
                continue
            forced = tool_output((first, second))
            for last in range(VOCABULARY):
                rows.append(([*start, *forced, last], [*own, *[False] * len(forced), True]))
        return cls.pad(rows, padding)

    @classmethod
    def pad(cls, rows: list[tuple[list[int], list[bool]]], padding: str) -> Episodes:
        length = 2 + max(len(ids) for ids, _ in rows)
        ids, attention, sampled = [], [], []
        for row, own in rows:
            gap = length - len(row)
            left, right = (gap, 0) if padding == "left" else (0, gap)
            ids.append([1] * left + row + [1] * right)
            attention.append([0] * left + [1] * len(row) + [0] * right)
            sampled.append([False] * left + own + [False] * right)
        return cls(torch.tensor(ids), torch.tensor(attention), torch.tensor(sampled))

    def hidden(self, model: LlamaForCausalLM) -> Tensor:
        """Hidden states at the positions before the sampled tokens."""
        positions = (self.attention_BT.cumsum(1) - 1).clamp(min=0)
        output = model.model(input_ids=self.ids_BT, attention_mask=self.attention_BT, position_ids=positions)
        return output.last_hidden_state[:, :-1][self.sampled_BT[:, 1:]]

    def logprobs(self, model: LlamaForCausalLM, chunk_size: int = 7) -> Tensor:
        """``[B, T]``, NaN where not sampled: no use of those may go unnoticed."""
        own = self.sampled_BT
        scores = token_logprobs(self.hidden(model), model.lm_head, self.ids_BT[own], chunk_size=chunk_size)
        return torch.full(own.shape, math.nan, dtype=torch.float64).masked_scatter(own, scores.logprobs_N)


def flat_gradient(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@dataclass
class World:
    student: LlamaForCausalLM
    teacher: LlamaForCausalLM
    episodes: Episodes

    @classmethod
    def make(cls, padding: str = "right") -> World:
        return cls(transformer(0), transformer(1).requires_grad_(False), Episodes.every(padding))

    def probabilities(self, logprobs_BT: Tensor) -> Tensor:
        """Probability of each whole episode under the student."""
        return torch.where(self.episodes.sampled_BT, logprobs_BT, 0.0).sum(1).exp()

    def objective(
        self,
        divergence: Divergence,
        gamma: int,
        *,
        topk: int = VOCABULARY,
        weights_N: Tensor | float = 1.0,
        sampler: LlamaForCausalLM | None = None,
    ) -> Tensor:
        """Enumerated, naive: ``E_y Σ_n f(u_n)``; for γ = 0 with the distribution of the prefixes held fixed, and then
        also for the divergence over top k and tail, for weights of the single tokens, and for prefixes that another
        policy sampled."""
        episodes = self.episodes
        logprobs_BT, teacher_BT = episodes.logprobs(self.student), episodes.logprobs(self.teacher)
        if gamma == 1:
            values = torch.where(episodes.sampled_BT, divergence.f((teacher_BT - logprobs_BT).exp()), 0.0).sum(1)
            return (self.probabilities(logprobs_BT) * values).sum()
        p = self.student.lm_head(episodes.hidden(self.student)).softmax(1)
        q = self.teacher.lm_head(episodes.hidden(self.teacher)).softmax(1)
        per_prefix_BT = torch.zeros(episodes.ids_BT.shape, dtype=torch.float64)
        if topk < VOCABULARY:
            likely = q.topk(topk).indices
            p, q = (torch.cat([one.gather(1, likely), 1 - one.gather(1, likely).sum(1, True)], 1) for one in (p, q))
        values_N = weights_N * (p * divergence.f(q / p)).sum(1)
        per_prefix_BT = per_prefix_BT.masked_scatter(episodes.sampled_BT, values_N)
        reached_BT = logprobs_BT if sampler is None else episodes.logprobs(sampler)
        return (self.probabilities(reached_BT).detach() * per_prefix_BT.sum(1)).sum()

    def losses(self, divergence: Divergence, mode: str, gamma: float) -> tuple[Tensor, Tensor]:
        """The probability of every episode, and the training loss on each alone."""
        logprobs_BT = self.episodes.logprobs(self.student)
        mask_BT, behaviour_BT = self.episodes.sampled_BT, logprobs_BT.detach()
        log_ratio_BT = self.episodes.logprobs(self.teacher) - behaviour_BT
        advantages_BT = advantage(log_ratio_BT, divergence, mode, gamma=gamma, mask=mask_BT)
        losses = [
            policy_loss(logprobs_BT[b], behaviour_BT[b], advantages_BT[b], mask_BT[b], num_tokens=1)
            for b in range(len(mask_BT))
        ]
        return self.probabilities(behaviour_BT), torch.stack(losses)

    def expected_update(self, divergence: Divergence, mode: str, gamma: float) -> Tensor:
        probabilities, losses = self.losses(divergence, mode, gamma)
        return flat_gradient((probabilities * losses).sum(), self.student)

    def every_update(self, divergence: Divergence, gamma: float) -> tuple[Tensor, Tensor]:
        """The probability and the gradient of every episode."""
        probabilities, losses = self.losses(divergence, "opd_plus_centred", gamma)
        parameters = list(self.student.parameters())
        rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        return probabilities, torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def trajectories(world: World, sampler: LlamaForCausalLM | None = None) -> list[Trajectory]:
    """The same episodes as the rollouts would record them, with the log-probs of the student or of another sampler;
    solved if they end in 1 or 2."""
    logprobs_BT = world.episodes.logprobs(sampler or world.student).detach()
    found = []
    for b, length in enumerate(world.episodes.attention_BT.sum(1).tolist()):
        sampled = world.episodes.sampled_BT[b, :length].numpy()
        turns = [TurnRecord(2, 4, "first")] + [TurnRecord(7, 8, "second")] * (length == 8)
        kinds = [TokenKind.PROMPT] * 2 + [TokenKind.TOOL_CALL] * 2 + [TokenKind.TOOL_OUTPUT] * 3 + [TokenKind.TEXT]
        found.append(
            Trajectory(
                task="counted", example_id="only", sample=b,
                token_ids=world.episodes.ids_BT[b, :length].numpy().astype(np.int32), sampled=sampled,
                kind=np.array(kinds[:length], dtype=np.uint8),
                turn=np.array([0, 0, 1, 1, 1, 1, 1, 2][:length], dtype=np.int16),
                logprobs=torch.where(world.episodes.sampled_BT, logprobs_BT, 0.0)[b, :length].float().numpy(),
                turns=tuple(turns), stop_reason=StopReason.ANSWER, answer="",
                correct=int(world.episodes.ids_BT[b, length - 1]) != END,
            )
        )  # fmt: skip
    return found


def assert_same_direction_and_size(got: Tensor, exact: Tensor) -> None:
    assert float(torch.cosine_similarity(got, exact, dim=0)) > 0.999999
    assert float((got - exact).norm() / exact.norm()) < 1e-6
