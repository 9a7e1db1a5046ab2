"""The divergence between teacher and student when only the teacher's top-k log-probs are known.

All other tokens are put together into one tail bucket, so that both sides stay distributions (over k + 1 outcomes)
and the result stays a divergence: never negative, 0 only at agreement on every bucket, never above the
divergence over the whole vocabulary. A sum over the top k alone is none of these, and used as a scalar advantage
its expected gradient is 0.

Worked example; a scoring server may give the same record::

    top = topk_logprobs(teacher_hidden_NH, teacher_head, token_ids_N, k=32)
    scores = topk_divergence(hidden_NH, head, top.topk_ids_NK, top.topk_logprobs_NK, "jsd")
    mean_loss(scores.loss_N, num_tokens).backward()

Test it alone: ``pytest tests/trainer/math/test_topk.py``
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_env.trainer.math.advantages import parse_mode
from opd_env.trainer.math.divergences import Divergence, get_divergence
from opd_env.trainer.math.logprobs import (
    DivergenceScores,
    Head,
    check_rows,
    entropy,
    expected_update,
    gather,
    in_chunks,
    log_softmax,
)
from opd_env.trainer.math.modes import Mode


@dataclass(frozen=True, eq=False)
class TopKScores:
    """What a teacher says about N sampled tokens and about the tokens that it would rather have seen there."""

    logprobs_N: Tensor
    """Natural log-prob of each sampled token, normalised over the whole vocabulary; -inf where it is forbidden."""
    topk_ids_NK: Tensor
    """The teacher's K most likely tokens at each place, all different, int64."""
    topk_logprobs_NK: Tensor
    """Their log-probs, normalised as ``logprobs_N``."""


@torch.no_grad()
def topk_logprobs(
    hidden_NH: Tensor, head: Head, token_ids_N: Tensor, k: int, *, temperature: float = 1.0, chunk_size: int = 256
) -> TopKScores:
    """Scores tokens and finds the k most likely ones; arguments and errors as in ``token_logprobs``."""
    rows = {"hidden_NH": hidden_NH, "token_ids_N": token_ids_N}
    check_rows(temperature, chunk_size, rows)

    def score(hidden_CH: Tensor, ids_C: Tensor) -> TopKScores:
        logprobs_CV = log_softmax(head(hidden_CH), temperature, None)
        top = logprobs_CV.topk(k, dim=1)
        return TopKScores(gather(logprobs_CV, ids_C), top.indices, top.values)

    return in_chunks(score, chunk_size, *rows.values())


def topk_divergence(
    student_hidden_NH: Tensor,
    student_head: Head,
    topk_ids_NK: Tensor,
    teacher_logprobs_NK: Tensor,
    divergence: str | Divergence = "reverse_kl",
    mode: str | Mode = Mode.OPD_PLUS_CENTRED,
    *,
    token_ids_N: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    clip_log_ratio: float | None = None,
    chunk_size: int = 256,
) -> DivergenceScores:
    """The ``full`` estimator on k tokens and a tail bucket; exact for that coarser divergence.

    A teacher tail below the rounding of float32 (1.2e-7) is taken as that: its log-prob cannot be known from the
    k others.

    Args:
        student_hidden_NH: hidden states before the sampled tokens, with gradient.
        student_head: maps them to logits.
        topk_ids_NK: k different tokens per position (the teacher's most likely; more may be among them).
        teacher_logprobs_NK: the teacher's log-probs of these, normalised over its whole vocabulary, at the same
            temperature.
        divergence: a name or a ``Divergence``.
        mode: what stands for A in the gradient.
        token_ids_N: the sampled tokens, to be scored by the student along the way.
        temperature: divides the student's logits.
        vocab_size: the tokenizer's size: logits beyond it are cut off. None keeps all.
        clip_log_ratio: bound on ``|log u|``.
        chunk_size: positions whose logits exist at one time.

    Returns:
        As ``full_divergence``, but for k + 1 outcomes; ``entropy_N`` is over the whole vocabulary, and ``log_ratio_N``
        stays None (the teacher's log-prob of a sampled token need not be among its top k).

    Raises:
        ValueError: shapes differ, a token is repeated, or the teacher's probabilities add up to more than 1.
    """
    divergence = get_divergence(divergence) if isinstance(divergence, str) else divergence
    mode = parse_mode(mode)
    if topk_ids_NK.shape != teacher_logprobs_NK.shape or topk_ids_NK.dim() != 2:
        raise ValueError(
            f"topk_ids_NK {tuple(topk_ids_NK.shape)} and teacher_logprobs_NK {tuple(teacher_logprobs_NK.shape)} "
            "must have one shape [N, K]"
        )
    rows = {
        "student_hidden_NH": student_hidden_NH,
        "topk_ids_NK": topk_ids_NK,
        "teacher_logprobs_NK": teacher_logprobs_NK,
    }
    if token_ids_N is not None:
        rows["token_ids_N"] = token_ids_N
    check_rows(temperature, chunk_size, rows)
    repeated_N = (topk_ids_NK.sort(1).values.diff(dim=1) == 0).any(1)
    total_N = teacher_logprobs_NK.float().logsumexp(1)
    for bad_N, problem in (
        (repeated_N, "a token is repeated in topk_ids_NK"),
        (~(total_N <= 1e-3), "the teacher's probabilities add up to more than 1: they must be log-probs"),
    ):
        if bool(bad_N.any()):
            raise ValueError(f"{problem}, first in row {int(bad_N.nonzero()[0])}")

    def compare(hidden_CH: Tensor, ids_CK: Tensor, teacher_CK: Tensor, *own: Tensor) -> DivergenceScores:
        student_CV = log_softmax(student_head(hidden_CH), temperature, vocab_size)
        chosen_C = gather(student_CV, own[0]) if own else None
        rest_CV = student_CV.scatter(1, ids_CK, -math.inf)
        student_tail_C = rest_CV.logsumexp(1) if ids_CK.shape[1] < student_CV.shape[1] else rest_CV[:, 0]
        student_CB = torch.cat([student_CV.gather(1, ids_CK), student_tail_C[:, None]], dim=1)
        teacher_CK = teacher_CK.to(student_CB)
        teacher_CB = torch.cat([teacher_CK, _log_rest(teacher_CK)], dim=1)
        loss_C, divergence_C, kl_C, baseline_C = expected_update(
            student_CB, teacher_CB, divergence, mode, clip_log_ratio
        )
        return DivergenceScores(loss_C, divergence_C, kl_C, baseline_C, entropy(student_CV), chosen_C)

    return in_chunks(compare, chunk_size, *rows.values())


def _log_rest(logprobs_NK: Tensor) -> Tensor:
    """``log(1 - Σ exp(logprobs))``, shape ``[N, 1]``, at least the log of float32's rounding."""
    smallest = torch.finfo(torch.float32).eps
    rest_N1 = -torch.expm1(logprobs_NK.logsumexp(1, keepdim=True))
    return rest_N1.clamp(min=smallest).log()
