"""Top-k with a tail bucket: a divergence, exact for what it is, and a lower bound of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd_env.trainer.math.divergences import get_divergence, list_divergences
from opd_env.trainer.math.logprobs import full_divergence, topk_divergence

VOCABULARY = 30


def identity(logits_NV: Tensor) -> Tensor:
    return logits_NV


def world(dtype: torch.dtype = torch.float64, k: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    student = (1.5 * torch.randn(6, VOCABULARY, dtype=dtype)).requires_grad_()
    teacher = 1.5 * torch.randn(6, VOCABULARY, dtype=dtype)
    top = teacher.log_softmax(1).topk(k, dim=1)
    return student, teacher, top.indices, top.values


def coarse(probabilities: Tensor, ids: Tensor) -> Tensor:
    chosen = probabilities.gather(1, ids)
    return torch.cat([chosen, 1 - chosen.sum(1, keepdim=True)], dim=1)


@pytest.mark.parametrize("name", list_divergences())
@pytest.mark.parametrize("mode", ["opd_plus", "opd_plus_centred"])
def test_value_and_gradient_are_those_of_the_coarse_divergence(name, mode):
    student, teacher, ids, logprobs = world()
    upstream = torch.randn(6, dtype=torch.float64)
    scores = topk_divergence(student, identity, ids, logprobs, name, mode, chunk_size=4)
    p, q = coarse(student.softmax(1), ids), coarse(teacher.softmax(1), ids)
    exact_N = (p * get_divergence(name).f(q / p)).sum(1)
    torch.testing.assert_close(scores.loss_N, exact_N, rtol=1e-10, atol=1e-12)
    (got,) = torch.autograd.grad((scores.loss_N * upstream).sum(), student)
    (exact,) = torch.autograd.grad((exact_N * upstream).sum(), student)
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", list_divergences())
def test_it_is_never_negative_and_never_above_the_whole_divergence(name):
    student, teacher, ids, logprobs = world()
    part = topk_divergence(student, identity, ids, logprobs, name).divergence_N
    whole = full_divergence(student, identity, teacher, identity, name).divergence_N
    assert bool((part >= 0).all())
    assert bool((part <= whole + 1e-12).all())


def test_with_every_token_listed_it_is_the_whole_divergence():
    student, teacher, ids, logprobs = world(k=VOCABULARY)
    part = topk_divergence(student, identity, ids, logprobs, "jsd")
    whole = full_divergence(student, identity, teacher, identity, "jsd")
    torch.testing.assert_close(part.loss_N, whole.loss_N, rtol=1e-6, atol=1e-6)
    (got,) = torch.autograd.grad(part.loss_N.sum(), student)
    (exact,) = torch.autograd.grad(whole.loss_N.sum(), student)
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)


def test_a_teacher_so_sure_that_its_tail_is_lost_in_rounding_gives_finite_gradients():
    student = torch.zeros(1, VOCABULARY, requires_grad=True)
    scores = topk_divergence(student, identity, torch.tensor([[3, 4]]), torch.tensor([[0.0, -30.0]]), "reverse_kl")
    scores.loss_N.sum().backward()
    assert bool(scores.loss_N.isfinite().all())
    assert bool(student.grad.isfinite().all())
    assert float(student.grad[0, 3]) < 0  # descending raises what the teacher wants


def test_entropy_is_over_the_whole_vocabulary():
    student, teacher, ids, logprobs = world()
    expected = full_divergence(student, identity, teacher, identity).entropy_N
    torch.testing.assert_close(topk_divergence(student, identity, ids, logprobs).entropy_N, expected)


def test_what_is_no_top_k_is_refused():
    student, _, ids, logprobs = world()
    with pytest.raises(ValueError, match=r"must have one shape \[N, K\]"):
        topk_divergence(student, identity, ids[:, :3], logprobs)
    with pytest.raises(ValueError, match="student_hidden_NH 2, topk_ids_NK 6"):
        topk_divergence(student[:2], identity, ids, logprobs)
    with pytest.raises(ValueError, match=r"add up to more than 1: .* row 0"):
        topk_divergence(student, identity, ids, logprobs.exp())
    doubled = ids.clone()
    doubled[4, 1] = doubled[4, 0]
    with pytest.raises(ValueError, match=r"a token is repeated .* row 4"):
        topk_divergence(student, identity, doubled, logprobs)
