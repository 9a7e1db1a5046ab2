"""Log-probs, entropies and whole-vocabulary sums without ever holding a ``[B, T, V]`` tensor.

Only the hidden states of the positions that matter are kept, ``hidden_NH`` (N sampled tokens). The head is
applied to a chunk of positions at a time; each chunk is checkpointed, so that its logits are computed again
in the backward pass instead of being stored. Values and gradients equal the naive computation. Logits are
normalised in float32 at least, whatever the model's dtype.

Worked example::

    decoder, head = split_model(student)                       # head(hidden_NH) -> logits_NV
    hidden_BTH = decoder(input_ids=ids_BT).last_hidden_state
    hidden_NH = hidden_BTH[:, :-1][mask_BT[:, 1:]]             # position t scores token t + 1
    scores = token_logprobs(hidden_NH, head, ids_BT[:, 1:][mask_BT[:, 1:]])
    scores.logprobs_N.sum().backward()                         # reaches the decoder and the head

    exact = full_divergence(hidden_NH, head, teacher_hidden_NH, teacher_head, "jsd")
    mean_loss(exact.loss_N, num_tokens).backward()             # the gradient of D_f at every prefix

    top = topk_logprobs(teacher_hidden_NH, teacher_head, token_ids_N, k=32)     # or from a scoring server
    topk_divergence(hidden_NH, head, top.topk_ids_NK, top.topk_logprobs_NK, "jsd").loss_N

Where only the teacher's top k are known, all other tokens are put together into one tail bucket, so that both sides
stay distributions (over k + 1 outcomes) and the result stays a divergence: never negative, 0 only at agreement on every
bucket, never above the divergence over the whole vocabulary. A sum over the top k alone is none of these, and used as a
scalar advantage its expected gradient is 0.

Test it alone: ``pytest tests/trainer/math/test_logprobs.py tests/trainer/math/test_topk.py``
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd_env.trainer.math.advantages import parse_mode
from opd_env.trainer.math.divergences import Divergence, get_divergence
from opd_env.trainer.math.modes import Mode

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Head = Callable[[Tensor], Tensor]
"""From hidden states ``[N, H]`` to logits ``[N, V]``: the model's last layer, scaling and soft-capping included."""


@dataclass(frozen=True)
class TokenScores:
    """What one model says about given tokens."""

    logprobs_N: Tensor
    """Log-prob of each token, with gradient."""
    entropy_N: Tensor
    """Entropy of the distribution that it was drawn from, in nats, detached."""


@dataclass(frozen=True)
class DivergenceScores:
    """Teacher and student compared at N prefixes. All but ``loss_N`` and ``logprobs_N`` are detached."""

    loss_N: Tensor
    """Value: D_f. Gradient: ``-Σ_v p(v) A_v ∇log p(v)``, which for the OPD+ modes is ∇D_f exactly."""
    divergence_N: Tensor
    """``D_f(q || p) = Σ_v p(v) f(q(v) / p(v))``."""
    teacher_kl_N: Tensor
    """``KL(p || q)``, the field's common yardstick, whatever the divergence."""
    baseline_N: Tensor
    """``E_p[w_f(u)]``: the exact value baseline of the ``sampled`` estimator (see ``advantage``)."""
    entropy_N: Tensor
    """The student's entropy over the whole vocabulary."""
    logprobs_N: Tensor | None = None
    """The student's log-prob of the sampled tokens, with gradient, when they were given."""
    log_ratio_N: Tensor | None = None
    """log u of the sampled tokens, when they were given."""


Record = TypeVar("Record", bound="DataclassInstance")


def positions_per_chunk(vocab_size: int) -> int:
    """A chunk size that holds about 16 million logits (64 MB in float32): a fair trade of memory for speed."""
    return max(1, 2**24 // vocab_size)


def token_logprobs(
    hidden_NH: Tensor,
    head: Head,
    token_ids_N: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int = 256,
) -> TokenScores:
    """Log-probs of given tokens, and the entropies of the distributions that they come from.

    Args:
        hidden_NH: hidden states at the positions *before* the tokens.
        head: maps them to logits.
        token_ids_N: the tokens.
        temperature: logits are divided by it, as the sampler did.
        vocab_size: the tokenizer's size: logits beyond it (padding of the embedding) are cut off. None
        keeps all.
        chunk_size: positions whose logits exist at one time (``positions_per_chunk`` suggests one).

    Raises:
        ValueError: lengths differ, an option is out of range, or a token lies outside the vocabulary.
    """
    rows = {"hidden_NH": hidden_NH, "token_ids_N": token_ids_N}
    check_rows(temperature, chunk_size, rows)

    def score(hidden_CH: Tensor, ids_C: Tensor) -> TokenScores:
        logprobs_CV = log_softmax(head(hidden_CH), temperature, vocab_size)
        return TokenScores(gather(logprobs_CV, ids_C), entropy(logprobs_CV))

    return in_chunks(score, chunk_size, *rows.values())


def full_divergence(
    student_hidden_NH: Tensor,
    student_head: Head,
    teacher_hidden_NH: Tensor,
    teacher_head: Head,
    divergence: str | Divergence = "reverse_kl",
    mode: str | Mode = Mode.OPD_PLUS_CENTRED,
    *,
    token_ids_N: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    clip_log_ratio: float | None = None,
    chunk_size: int = 256,
) -> DivergenceScores:
    """The ``full`` estimator: the sampled update averaged over the student's whole vocabulary, without
    noise.

    Args:
        student_hidden_NH: with gradient.
        student_head: maps them to logits.
        teacher_hidden_NH: the teacher's at the same positions; its width may differ. No gradient flows into
        it.
        teacher_head: the teacher's head.
        divergence: a name or a ``Divergence``.
        mode: what stands for A_v in the gradient; the loss's *value* is D_f in every mode.
        token_ids_N: the sampled tokens, to be scored along the way.
        temperature: divides both models' logits.
        vocab_size: the tokenizer's size; needed when the two models pad their embeddings differently.
        clip_log_ratio: bound on ``|log u|`` in A_v and in the reported sums.
        chunk_size: positions whose logits exist at one time, for both models.

    Raises:
        ValueError: lengths or vocabularies differ, an option is out of range, or a token lies outside the
        vocabulary.
    """
    divergence = get_divergence(divergence) if isinstance(divergence, str) else divergence
    mode = parse_mode(mode)
    rows = {"student_hidden_NH": student_hidden_NH, "teacher_hidden_NH": teacher_hidden_NH}
    if token_ids_N is not None:
        rows["token_ids_N"] = token_ids_N
    check_rows(temperature, chunk_size, rows)

    def compare(student_CH: Tensor, teacher_CH: Tensor, *ids: Tensor) -> DivergenceScores:
        student_CV = log_softmax(student_head(student_CH), temperature, vocab_size)
        with torch.no_grad():
            teacher_CV = log_softmax(teacher_head(teacher_CH), temperature, vocab_size).to(student_CV)
        if student_CV.shape != teacher_CV.shape:
            raise ValueError(
                f"the student has {student_CV.shape[1]} logits, the teacher {teacher_CV.shape[1]}; where the "
                "tokenizers are equal and only the padding differs, set vocab_size to the tokenizer's size"
            )
        chosen = [gather(student_CV, ids_C) for ids_C in ids]  # first: the recomputation ends in expected_update
        update = expected_update(student_CV, teacher_CV, divergence, mode, clip_log_ratio)
        return DivergenceScores(
            *update,
            entropy_N=entropy(student_CV),
            logprobs_N=chosen[0] if ids else None,
            log_ratio_N=gather(teacher_CV, ids[0]) - chosen[0].detach() if ids else None,
        )

    return in_chunks(compare, chunk_size, *rows.values())


def expected_update(
    student_NB: Tensor, teacher_NB: Tensor, divergence: Divergence, mode: Mode, clip_log_ratio: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the B outcomes of each of N distributions, from their log-probs (the student's with gradient).

    Returns:
        ``loss_N``, ``divergence_N``, ``teacher_kl_N`` and ``baseline_N`` of ``DivergenceScores``.
    """
    with torch.no_grad():
        # p f(q / p) would be 0 * inf where the student all but excludes what the teacher likes. Raising p there to
        # q e^-43 (float32; e^-353 in float64) keeps u and u² finite; the sums change by less than rounding for
        # every divergence whose weight grows like u or slower, and for the others they stay finite.
        widest = math.log(torch.finfo(student_NB.dtype).max) / 2 - 1
        raised_NB = torch.maximum(student_NB, teacher_NB - widest)
        probs_NB = raised_NB.exp()
        exact_NB = torch.where(probs_NB > 0, teacher_NB - raised_NB, 0.0)  # no outcome of both: counts for nothing
        log_u_NB = exact_NB if clip_log_ratio is None else exact_NB.clamp(-clip_log_ratio, clip_log_ratio)
        if mode is Mode.OPD:
            weight_NB = probs_NB * divergence.minus_f(log_u_NB)
        elif mode is Mode.OPD_PLUS:
            weight_NB = probs_NB * divergence.weight(log_u_NB)
        else:
            weight_NB = probs_NB * divergence.centred_weight(log_u_NB)
    nothing_N: Tensor = _GradientOnly.apply(student_NB, weight_NB)  # type: ignore[no-untyped-call]
    # The recomputation for the backward pass ends here; what follows is computed once.
    with torch.no_grad():
        divergence_N = -(probs_NB * divergence.minus_f(log_u_NB)).sum(1)
        kl_N = -(probs_NB * exact_NB).sum(1)
        if mode is Mode.OPD:
            baseline_N = (probs_NB * divergence.weight(log_u_NB)).sum(1)
        else:
            baseline_N = weight_NB.sum(1) + (0.0 if mode is Mode.OPD_PLUS else divergence.slope_at_one)
    return divergence_N + nothing_N, divergence_N, kl_N, baseline_N


class _GradientOnly(torch.autograd.Function):
    """0 for each of N distributions, with the gradient ``-weight`` with respect to its log-probs."""

    @staticmethod
    def forward(ctx: Any, logprobs_NB: Tensor, weight_NB: Tensor) -> Tensor:
        ctx.save_for_backward(weight_NB)
        return logprobs_NB.new_zeros(len(logprobs_NB))

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor, None]:
        (weight_NB,) = ctx.saved_tensors
        return -upstream_N[:, None] * weight_NB, None


def in_chunks(score: Callable[..., Record], chunk_size: int, *rows: Tensor) -> Record:
    """``score`` of a few positions at a time, results joined; logits are recomputed in the backward pass.

    But for the last chunk: the backward pass begins with it, so that nothing is gained by dropping it.
    """
    chunks = list(zip(*(torch.split(tensor, chunk_size) for tensor in rows), strict=True))
    parts = [checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks[:-1]]
    parts.append(score(*chunks[-1]))
    joined: dict[str, Any] = {}
    for field in fields(parts[0]):
        column = [getattr(part, field.name) for part in parts]
        joined[field.name] = None if column[0] is None else torch.cat(column)
    record: Record = type(parts[0])(**joined)
    return record


def log_softmax(logits_NV: Tensor, temperature: float, vocab_size: int | None) -> Tensor:
    """Log-probs in float32 at least, over the first ``vocab_size`` logits."""
    if vocab_size is not None:
        if vocab_size > logits_NV.shape[1]:
            raise ValueError(f"vocab_size={vocab_size}, but the model has only {logits_NV.shape[1]} logits")
        logits_NV = logits_NV[:, :vocab_size]
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    logits_NV = logits_NV.to(wide)
    return torch.log_softmax(logits_NV if temperature == 1 else logits_NV / temperature, dim=1)


def gather(logprobs_NV: Tensor, token_ids_N: Tensor) -> Tensor:
    """The entry of each row's own token; a ``ValueError`` names a token outside the vocabulary."""
    outside = (token_ids_N < 0) | (token_ids_N >= logprobs_NV.shape[1])
    if bool(outside.any()):
        bad = int(token_ids_N[outside][0])
        raise ValueError(f"token {bad} is outside the vocabulary of {logprobs_NV.shape[1]}")
    return logprobs_NV.gather(1, token_ids_N.long().unsqueeze(1)).squeeze(1)


def entropy(logprobs_NV: Tensor) -> Tensor:
    """Shannon entropy of each row in nats, detached."""
    with torch.no_grad():
        lowest = torch.finfo(logprobs_NV.dtype).min  # 0 * -inf is no number, 0 * this is 0
        return -(logprobs_NV.exp() * logprobs_NV.clamp(min=lowest)).sum(1)


def check_rows(temperature: float, chunk_size: int, rows: dict[str, Tensor]) -> None:
    """Refuses options that are out of range and tensors of unequal length."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive; a greedy sampler has no log-probs to train on")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1 position")
    if len({len(tensor) for tensor in rows.values()}) > 1:
        lengths = ", ".join(f"{name} {len(tensor)}" for name, tensor in rows.items())
        raise ValueError(f"one row per sampled token is expected everywhere; got {lengths}")


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
