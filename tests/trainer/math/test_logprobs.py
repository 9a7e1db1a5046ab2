"""Chunked log-probs and exact divergences: equal to the naive computation, one chunk of logits at a time."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from opd_env.trainer.math.divergences import get_divergence, list_divergences
from opd_env.trainer.math.logprobs import full_divergence, positions_per_chunk, token_logprobs
from opd_env.trainer.math.loss import mean_loss

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def identity(logits_NV: Tensor) -> Tensor:
    return logits_NV


def model(dtype: torch.dtype, rows: int, vocab: int, seed: int = 0, width: int = 6) -> tuple[Tensor, nn.Linear]:
    torch.manual_seed(seed)
    return torch.randn(rows, width, dtype=dtype, requires_grad=True), nn.Linear(width, vocab, dtype=dtype)


def gradients(loss: Tensor, hidden: Tensor, head: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [hidden, *head.parameters()]))


@given(
    rows=st.integers(1, 20),
    vocab=st.integers(2, 30),
    padding=st.integers(0, 5),
    chunk=st.integers(1, 25),
    temperature=st.floats(0.3, 2),
    dtype=st.sampled_from(list(TOLERANCE)),
)
@settings(deadline=None, max_examples=50)
def test_token_logprobs_equal_the_naive_computation(rows, vocab, padding, chunk, temperature, dtype):
    hidden, head = model(dtype, rows, vocab + padding)
    ids, upstream = torch.randint(0, vocab, (rows,)), torch.randn(rows, dtype=dtype)
    scores = token_logprobs(hidden, head, ids, temperature=temperature, vocab_size=vocab, chunk_size=chunk)
    naive_NV = torch.log_softmax(head(hidden)[:, :vocab] / temperature, dim=1)
    naive_N = naive_NV.gather(1, ids[:, None])[:, 0]
    close = {"rtol": TOLERANCE[dtype], "atol": 5 * TOLERANCE[dtype]}
    torch.testing.assert_close(scores.logprobs_N, naive_N, **close)
    torch.testing.assert_close(scores.entropy_N, -(naive_NV.exp() * naive_NV).sum(1).detach(), **close)
    got = gradients((scores.logprobs_N * upstream).sum(), hidden, head)
    expected = gradients((naive_N * upstream).sum(), hidden, head)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **close)
    assert not scores.entropy_N.requires_grad


@pytest.mark.parametrize("name", list_divergences())
@pytest.mark.parametrize("mode", ["opd_plus", "opd_plus_centred"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_full_divergence_has_the_value_and_the_gradient_of_the_divergence(name, mode, dtype):
    hidden, head = model(dtype, 11, 50)
    teacher_hidden, teacher_head = model(dtype, 11, 53, seed=1, width=4)
    upstream = torch.randn(11, dtype=dtype)
    scores = full_divergence(hidden, head, teacher_hidden, teacher_head, name, mode, vocab_size=48, chunk_size=4)
    p, q = head(hidden)[:, :48].softmax(1), teacher_head(teacher_hidden)[:, :48].softmax(1).detach()
    exact_N = (p * get_divergence(name).f(q / p)).sum(1)
    close = {"rtol": 10 * TOLERANCE[dtype], "atol": 5 * TOLERANCE[dtype]}
    torch.testing.assert_close(scores.loss_N, exact_N, **close)
    torch.testing.assert_close(scores.divergence_N, exact_N.detach(), **close)
    got = gradients((scores.loss_N * upstream).sum(), hidden, head)
    expected = gradients((exact_N * upstream).sum(), hidden, head)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **close)


def test_stop_gradient_mode_reports_the_divergence_but_follows_its_own_gradient():
    hidden, head = model(torch.float64, 3, 9)
    teacher = torch.randn(3, 9, dtype=torch.float64)
    scores = full_divergence(hidden, head, teacher, identity, "forward_kl", "opd")
    logp = torch.log_softmax(head(hidden), 1)
    log_u = (torch.log_softmax(teacher, 1) - logp).detach()
    surrogate = -(logp.exp().detach() * -log_u.exp() * log_u * logp).sum()
    for one, other in zip(
        gradients(scores.loss_N.sum(), hidden, head), gradients(surrogate, hidden, head), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_metrics_are_the_naive_ones_and_detached():
    hidden, head = model(torch.float64, 7, 20)
    teacher = torch.randn(7, 20, dtype=torch.float64)
    ids = torch.randint(0, 20, (7,))
    scores = full_divergence(hidden, head, teacher, identity, "jsd", token_ids_N=ids, chunk_size=3)
    logp, logq = torch.log_softmax(head(hidden), 1).detach(), torch.log_softmax(teacher, 1)
    p = logp.exp()
    torch.testing.assert_close(scores.teacher_kl_N, (p * (logp - logq)).sum(1))
    torch.testing.assert_close(scores.entropy_N, -(p * logp).sum(1))
    torch.testing.assert_close(scores.baseline_N, (p * get_divergence("jsd").weight(logq - logp)).sum(1))
    own = ids[:, None]
    torch.testing.assert_close(scores.logprobs_N, logp.gather(1, own)[:, 0])
    torch.testing.assert_close(scores.log_ratio_N, (logq - logp).gather(1, own)[:, 0])
    for name in ("divergence_N", "teacher_kl_N", "entropy_N", "baseline_N", "log_ratio_N"):
        assert not getattr(scores, name).requires_grad
    one, other = (
        gradients(logprobs_N.sum(), hidden, head)
        for logprobs_N in (scores.logprobs_N, token_logprobs(hidden, head, ids).logprobs_N)
    )
    torch.testing.assert_close(one, other)


def test_the_backward_pass_computes_no_metric_again():
    jsd, calls = get_divergence("jsd"), []
    counting = replace(jsd, minus_f_of_log=lambda log_u: (calls.append(1), jsd.minus_f_of_log(log_u))[1])
    hidden, head = model(torch.float64, 7, 20)
    ids = torch.randint(0, 20, (7,))
    teacher = torch.randn(7, 20, dtype=torch.float64)
    scores = full_divergence(hidden, head, teacher, identity, counting, token_ids_N=ids, chunk_size=3)
    assert len(calls) == 3  # once per chunk
    scores.loss_N.sum().backward()
    assert len(calls) == 3


def test_value_baseline_of_reverse_kl_is_minus_one_minus_kl():
    hidden, head = model(torch.float64, 5, 20)
    scores = full_divergence(hidden, head, torch.randn(5, 20, dtype=torch.float64), identity)
    torch.testing.assert_close(scores.baseline_N, -1 - scores.teacher_kl_N)


def test_only_one_chunk_of_logits_is_alive():
    hidden, head = model(torch.float32, 40, 30)
    living: list[weakref.ref[Tensor]] = []
    most_alive, most_rows = 0, 0

    def watched(hidden_CH: Tensor) -> Tensor:
        nonlocal most_alive, most_rows
        logits = head(hidden_CH)
        living.append(weakref.ref(logits))
        most_alive = max(most_alive, sum(reference() is not None for reference in living))
        most_rows = max(most_rows, len(hidden_CH))
        return logits

    scores = token_logprobs(hidden, watched, torch.zeros(40, dtype=torch.long), chunk_size=8)
    exact = full_divergence(hidden, watched, torch.randn(40, 30), identity, "jsd", chunk_size=8)
    assert all(reference() is None for reference in living)  # nothing waits for the backward pass
    (scores.logprobs_N.sum() + exact.loss_N.sum()).backward()
    assert len(living) == 18  # 2 x 5 chunks, all but the last once more in the backward pass
    assert most_rows == 8
    assert most_alive <= 2  # the chunk itself, and the one before it until its name is bound anew


@pytest.mark.parametrize("grad", [True, False])
def test_works_with_no_positions_at_all(grad):
    hidden, head = model(torch.float32, 0, 9)
    with torch.set_grad_enabled(grad):
        scores = token_logprobs(hidden, head, torch.zeros(0, dtype=torch.long))
        exact = full_divergence(hidden, head, torch.zeros(0, 9), identity)
    assert scores.logprobs_N.shape == exact.loss_N.shape == (0,)
    if grad:
        (scores.logprobs_N.sum() + exact.loss_N.sum()).backward()
        assert bool((head.weight.grad == 0).all())


def test_bfloat16_logits_are_normalised_in_float32():
    hidden, head = model(torch.bfloat16, 6, 40)
    ids = torch.randint(0, 40, (6,))
    scores = token_logprobs(hidden, head, ids)
    naive = torch.log_softmax(head(hidden).float(), 1).gather(1, ids[:, None])[:, 0]
    assert scores.logprobs_N.dtype == torch.float32
    assert scores.logprobs_N.equal(naive)
    (gradient,) = torch.autograd.grad(scores.logprobs_N.sum(), hidden)
    assert gradient.dtype == torch.bfloat16


def test_a_bfloat16_teacher_serves_a_float32_student():
    hidden, head = model(torch.float32, 6, 40)
    teacher_hidden, teacher_head = model(torch.bfloat16, 6, 40, seed=2)
    scores = full_divergence(hidden, head, teacher_hidden, teacher_head, "jsd")
    assert scores.loss_N.dtype == torch.float32
    scores.loss_N.sum().backward()
    assert teacher_hidden.grad is None
    assert teacher_head.weight.grad is None


@pytest.mark.parametrize(
    "name", ["reverse_kl", "forward_kl", "jsd", "hellinger", "total_variation", "jeffreys", "alpha"]
)
def test_a_student_that_excludes_what_the_teacher_likes_still_gets_the_exact_gradient(name):
    student = torch.tensor([[0.0, 1.0, -120.0, -300.0]])
    teacher = torch.tensor([[0.0, -2.0, 3.0, 2.0]])
    got = student.clone().requires_grad_()
    full_divergence(got, identity, teacher, identity, name).loss_N.sum().backward()
    exact = student.double().requires_grad_()  # float64 holds exp(300)
    full_divergence(exact, identity, teacher.double(), identity, name).loss_N.sum().backward()
    torch.testing.assert_close(got.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    if name == "forward_kl":
        torch.testing.assert_close(exact.grad, exact.detach().softmax(1) - teacher.double().softmax(1))


def test_a_teacher_that_forbids_a_token_is_infinitely_far_only_for_divergences_that_say_so():
    student = torch.zeros(2, 4, requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0, 0.0, -math.inf], [0.0, 1.0, 2.0, 0.0]])
    for name in ("forward_kl", "jsd", "hellinger", "pearson_chi2", "total_variation"):
        mean_loss(full_divergence(student, identity, teacher, identity, name).loss_N, 2).backward()
        assert bool(student.grad.isfinite().all())
    for name in ("reverse_kl", "neyman_chi2", "jeffreys"):
        with pytest.raises(ValueError, match=r"not finite at sampled token 0 of 2 .* set clip_log_ratio"):
            mean_loss(full_divergence(student, identity, teacher, identity, name).loss_N, 2)
        bounded = full_divergence(student, identity, teacher, identity, name, clip_log_ratio=10.0)
        student.grad = None
        mean_loss(bounded.loss_N, 2).backward()
        assert bool(student.grad.isfinite().all())
        assert float(student.grad[0, 3]) > 0  # descending lowers the forbidden token


def test_tokens_that_both_forbid_count_for_nothing():
    student = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, -math.inf]])
    scores = full_divergence(student, identity, teacher, identity, "reverse_kl")
    without = full_divergence(student[:, :2], identity, teacher[:, :2], identity, "reverse_kl")
    torch.testing.assert_close(scores.loss_N, without.loss_N)
    torch.testing.assert_close(scores.entropy_N, without.entropy_N)
    scores.loss_N.sum().backward()
    assert bool(student.grad.isfinite().all())


def test_a_suggested_chunk_holds_sixteen_million_logits():
    assert positions_per_chunk(49152) == 341
    assert positions_per_chunk(2**30) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"vocab_size": 10}, "vocab_size=10, but the model has only 9 logits"),
        ({"vocab_size": 5}, "token 7 is outside the vocabulary of 5"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    hidden, head = model(torch.float32, 3, 9)
    ids = torch.tensor([1, 7, 2])
    with pytest.raises(ValueError, match=message):
        token_logprobs(hidden, head, ids, **options)
    with pytest.raises(ValueError, match=message):
        full_divergence(hidden, head, hidden.detach(), head, token_ids_N=ids, **options)


def test_unequal_lengths_and_vocabularies_are_refused():
    hidden, head = model(torch.float32, 3, 9)
    with pytest.raises(ValueError, match="hidden_NH 3, token_ids_N 2"):
        token_logprobs(hidden, head, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="student_hidden_NH 3, teacher_hidden_NH 2"):
        full_divergence(hidden, head, hidden[:2], head)
    with pytest.raises(ValueError, match=r"student has 9 logits, the teacher 7; .* set vocab_size"):
        full_divergence(hidden, head, torch.zeros(3, 7), identity)
