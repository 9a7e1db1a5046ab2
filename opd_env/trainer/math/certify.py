"""Does the expected update equal the gradient of the divergence? Counted out, for every divergence there is.

For each divergence, mode, estimator and baseline the expected update is summed over every token that could have been
sampled, through the same ``advantage``, ``policy_loss``, ``full_divergence`` and ``topk_divergence`` that training
uses, and compared with autograd's gradient of ``D_f``. Users' own divergences are certified like the built-in ones,
and the estimates that other frameworks ship stand beside them by name. A ``World`` is small enough to count out: two
distributions, and what an update does there in expectation.

Worked example::

    register_divergence("mine", lambda u: (u - 1) ** 2 / (u + 1))
    certification = run_certification(["mine", "jsd"])
    print_certification(Console(), certification)
    certification.ok                                   # False when any row is not what it must be

Test it alone: ``pytest tests/trainer/math/test_certify.py``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from opd_env.trainer.math.advantages import advantage
from opd_env.trainer.math.divergences import Divergence, get_divergence, list_divergences
from opd_env.trainer.math.logprobs import DivergenceScores, full_divergence, topk_divergence
from opd_env.trainer.math.loss import policy_loss
from opd_env.trainer.math.modes import Mode

LOGIT_SCALE = 0.65
"""Standard deviation of the random logits: student and teacher are then about 0.4 nats apart."""


class Verdict(StrEnum):
    """How an expected update relates to the exact gradient."""

    EXACT = "exact"
    """Cosine above 0.999999 and relative error below 1e-6, for every pair of distributions."""
    BIASED = "biased"
    """Another direction or size."""
    ZERO = "zero"
    """No expected update at all: only noise."""


@dataclass(frozen=True)
class World:
    """A student and a teacher over V tokens, in float64."""

    student_V: Tensor
    """Logits, a leaf that requires a gradient."""
    teacher_V: Tensor
    """Logits."""

    @classmethod
    def random(cls, vocab: int, seed: int) -> World:
        """Independent normal logits for both."""
        generator = torch.Generator().manual_seed(seed)
        student_V, teacher_V = LOGIT_SCALE * torch.randn(2, vocab, generator=generator, dtype=torch.float64)
        return cls(student_V.requires_grad_(), teacher_V)

    @property
    def logprobs_V(self) -> Tensor:
        """The student's, with gradient."""
        return self.student_V.log_softmax(0)

    @property
    def log_ratio_V(self) -> Tensor:
        """log u of every token, detached."""
        return self.teacher_V.log_softmax(0) - self.logprobs_V.detach()

    def backward(self, loss: Tensor) -> Tensor:
        """The gradient of a loss with respect to the student's logits, ``[V]``."""
        return torch.autograd.grad(loss, self.student_V)[0]

    def gradient(self, divergence: Divergence, coarsen: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
        """Autograd's gradient of ``D_f(q || p) = Σ p f(q / p)``: the definition, in u."""
        p, q = coarsen(self.student_V.softmax(0)), coarsen(self.teacher_V.softmax(0))
        return self.backward((p * divergence.f(q / p)).sum())

    def updates(self, advantages_V: Tensor) -> Tensor:
        """The gradient of the training loss on each possible sample: ``[V, V]``, one row per token."""

        def loss_of(logprobs_V: Tensor) -> Tensor:
            everywhere = torch.ones_like(logprobs_V, dtype=torch.bool)
            return policy_loss(logprobs_V, logprobs_V.detach(), advantages_V, everywhere, num_tokens=1)

        return self.updates_of(loss_of)

    def updates_of(self, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        """The same for any loss of the log-probs that adds up over tokens: ``(∂loss / ∂logprob_v) ∇logprob_v``."""
        leaf_V = self.logprobs_V.detach().requires_grad_()
        (slope_V,) = torch.autograd.grad(loss_of(leaf_V), leaf_V)
        jacobian_VV = torch.eye(len(leaf_V), dtype=leaf_V.dtype) - leaf_V.detach().exp()  # of log softmax: e_v - p
        return slope_V[:, None] * jacobian_VV


@dataclass(frozen=True)
class Measurement:
    """An expected update beside the exact gradient."""

    cosine: float
    """Mean over worlds; 0 for an update that is 0."""
    relative_error: float
    """``|update - exact| / |exact|``, the largest over worlds."""
    variance: float
    """Of one sample's update, summed over coordinates; mean over worlds. 0 where nothing is sampled."""
    verdict: Verdict


def measure(
    worlds: Sequence[World], exact: Callable[[World], Tensor], update: Callable[[World], Tensor]
) -> Measurement:
    """Compares over all worlds.

    Args:
        worlds: at least one.
        exact: the gradient that is wanted, ``[V]``.
        update: ``[V, V]``, the update of each possible sample, or ``[V]`` where nothing is sampled.
    """
    cosines, errors, variances, sizes = [], [], [], []
    for world in worlds:
        exact_V, given = exact(world), update(world)
        p_V = world.logprobs_V.detach().exp()
        mean_V = given if given.dim() == 1 else p_V @ given
        variances.append(0.0 if given.dim() == 1 else float(p_V @ (given - mean_V).square().sum(1)))
        sizes.append(float(mean_V.norm() / exact_V.norm()))
        cosines.append(float(torch.cosine_similarity(mean_V, exact_V, dim=0)) if sizes[-1] > 1e-9 else 0.0)
        errors.append(float((mean_V - exact_V).norm() / exact_V.norm()))
    if max(sizes) <= 1e-9:
        verdict = Verdict.ZERO
    elif min(cosines) > 0.999999 and max(errors) < 1e-6:
        verdict = Verdict.EXACT
    else:
        verdict = Verdict.BIASED
    return Measurement(sum(cosines) / len(worlds), max(errors), sum(variances) / len(worlds), verdict)


WORLDS = 8
"""Pairs of distributions behind every row."""
TOP_K = 8
"""The k of the ``topk`` rows and of the top-k scalar."""
POWER = 0.5
"""The α of the PowerOPD rows."""

Update = Callable[[World], Tensor]


@dataclass(frozen=True)
class Row:
    """One way to estimate one gradient."""

    target: str
    """The divergence whose gradient is wanted."""
    update: str
    """The advantage's mode, or the name of another framework's estimate."""
    estimator: str
    """``sampled``, ``full`` or ``topk`` (whose target is the divergence over top-k and tail)."""
    baseline: str
    """``none``, or ``value`` for ``E_p[w_f(u)]``: over the vocabulary, or over top k and tail (``top-k value``)."""
    measured: Measurement
    expected: Verdict
    """What theory says."""

    @property
    def ok(self) -> bool:
        """Whether theory and measurement agree."""
        return self.measured.verdict is self.expected


@dataclass(frozen=True)
class Certification:
    """All rows of one run."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether every row is as theory says."""
        return all(row.ok for row in self.rows)


def run_certification(
    divergences: Sequence[str | Divergence] | None = None, vocab: int = 50, seed: int = 0
) -> Certification:
    """Certifies the given divergences, and measures other frameworks' estimates beside them.

    Args:
        divergences: names or records; None takes every registered one.
        vocab: tokens of the enumerated softmax, more than 8.
        seed: of the pairs of distributions, 0 or more.

    Raises:
        ValueError: a name is unknown, or the vocabulary is too small.
    """
    if vocab <= TOP_K:
        raise ValueError(f"vocab={vocab} must be above {TOP_K}, the k of the topk estimator")
    worlds = [World.random(vocab, seed * WORLDS + number) for number in range(WORLDS)]
    chosen = _every_divergence() if divergences is None else divergences
    rows: list[Row] = []
    for divergence in chosen:
        rows += _rows_of(get_divergence(divergence) if isinstance(divergence, str) else divergence, worlds)
    return Certification((*rows, *_rows_of_others(worlds)))


def print_certification(console: Console, certification: Certification) -> None:
    """Prints the table, a section for each divergence, and one closing line. It fits into 80 columns."""
    console.print("Expected update against the exact gradient, counted out in float64")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column in ("update", "estimator", "baseline"):
        table.add_column(column, no_wrap=True)
    for column in ("cosine", "error", "variance"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict")
    colours = {Verdict.EXACT: "green", Verdict.BIASED: "yellow", Verdict.ZERO: "yellow"}
    previous = ""
    for row in certification.rows:
        if row.target != previous:
            table.add_section()
            table.add_row(Text(row.target, style="bold"))
        previous, measured = row.target, row.measured
        verdict = f"[{colours[measured.verdict]}]{measured.verdict}[/]"
        table.add_row(
            row.update,
            row.estimator,
            row.baseline,
            f"{measured.cosine:.4f}",
            f"{measured.relative_error:.1e}",
            f"{measured.variance:.3g}",
            verdict if row.ok else f"[red]{measured.verdict}, must be {row.expected}[/]",
        )
    console.print(table)
    total, wrong = len(certification.rows), sum(not row.ok for row in certification.rows)
    if certification.ok:
        console.print(f"[green]All {total} rows are as theory says.[/]")
    else:
        console.print(f"[red]{wrong} of {total} rows are not as theory says.[/]")


def _every_divergence() -> list[Divergence]:
    """Every registered one; the two families at parameters that no other name covers."""
    parameters = {"alpha": {"alpha": 0.3}, "skew_jsd": {"beta": 0.1}}
    return [get_divergence(name, **parameters.get(name, {})) for name in list_divergences()]


def _rows_of(divergence: Divergence, worlds: list[World]) -> Iterator[Row]:
    def exact(world: World) -> Tensor:
        return world.gradient(divergence)

    def exact_topk(world: World) -> Tensor:
        top_K = world.teacher_V.topk(TOP_K).indices
        return world.gradient(divergence, lambda p_V: torch.cat([p_V[top_K], 1 - p_V[top_K].sum(0, keepdim=True)]))

    def sampled(world: World, mode: Mode) -> Tensor:
        return world.updates(advantage(world.log_ratio_V, divergence, mode))

    def sampled_value(world: World, mode: Mode) -> Tensor:
        return with_baseline(world, mode, _full(world, divergence, mode))

    def sampled_topk_value(world: World, mode: Mode) -> Tensor:
        return with_baseline(world, mode, _topk(world, divergence, mode))

    def with_baseline(world: World, mode: Mode, scores: DivergenceScores) -> Tensor:
        value_V = scores.baseline_N.expand_as(world.teacher_V)
        return world.updates(advantage(world.log_ratio_V, divergence, mode, baseline=value_V))

    def full(world: World, mode: Mode) -> Tensor:
        return world.backward(_full(world, divergence, mode).loss_N.sum())

    def topk(world: World, mode: Mode) -> Tensor:
        return world.backward(_topk(world, divergence, mode).loss_N.sum())

    for mode in Mode:
        for estimator, baseline, target, update in (
            ("sampled", "none", exact, sampled),
            ("sampled", "value", exact, sampled_value),
            ("sampled", "top-k value", exact, sampled_topk_value),
            ("full", "none", exact, full),
            ("topk", "none", exact_topk, topk),
        ):
            if baseline != "none" and mode is Mode.OPD:
                continue  # the mean of the OPD+ weight has no meaning there, and is refused
            measured = measure(worlds, target, partial(update, mode=mode))
            yield Row(divergence.name, mode, estimator, baseline, measured, _theory(divergence, mode))


def _full(world: World, divergence: Divergence, mode: Mode) -> DivergenceScores:
    return full_divergence(world.student_V[None], _identity, world.teacher_V[None], _identity, divergence, mode)


def _topk(world: World, divergence: Divergence, mode: Mode) -> DivergenceScores:
    top = world.teacher_V.log_softmax(0)[None].topk(TOP_K)
    return topk_divergence(world.student_V[None], _identity, top.indices, top.values, divergence, mode)


def _identity(logits_NV: Tensor) -> Tensor:
    return logits_NV


def _theory(divergence: Divergence, mode: Mode) -> Verdict:
    """OPD+ is exact. The stop-gradient leaves out ``E_p[u f'(u) ∇log p]``, which is 0 for every p and q only where
    ``u f'(u)`` is constant: for f = -c ln u."""
    if mode is not Mode.OPD:
        return Verdict.EXACT
    log_u = torch.linspace(-3, 3, 61, dtype=torch.float64)
    left_out = divergence.weight(log_u) - divergence.minus_f(log_u)
    constant = float(left_out.max() - left_out.min()) <= 1e-7 * float(left_out.abs().max())
    return Verdict.EXACT if constant else Verdict.BIASED


def _rows_of_others(worlds: list[World]) -> Iterator[Row]:
    """Estimates that other frameworks offer under the name of a divergence, each from a single sampled token."""

    def k1(log_u: Tensor) -> Tensor:
        return -log_u

    def k2(log_u: Tensor) -> Tensor:
        return log_u**2 / 2

    def k3(log_u: Tensor) -> Tensor:
        return log_u.expm1() - log_u

    def as_reward(estimate: Callable[[Tensor], Tensor]) -> Update:
        return lambda world: world.updates(-estimate(world.log_ratio_V))

    def as_loss(estimate: Callable[[Tensor], Tensor]) -> Update:
        """Autograd through the estimate itself."""
        return lambda world: world.updates_of(
            lambda logprobs_V: estimate(world.teacher_V.log_softmax(0) - logprobs_V).sum()
        )

    def topk_scalar(world: World) -> Tensor:
        top_K = world.teacher_V.topk(TOP_K).indices
        kl = (world.logprobs_V.detach().exp() * -world.log_ratio_V)[top_K].sum()
        return world.updates(-kl.expand_as(world.teacher_V))

    def power_reward(world: World) -> Tensor:
        p_V, q_V = world.student_V.detach().softmax(0), world.teacher_V.softmax(0)
        return world.updates((q_V**POWER - p_V**POWER) / POWER)

    def density_power(world: World) -> Tensor:
        """Basu's density power divergence, without the term that does not depend on the student."""
        p_V, q_V = world.student_V.softmax(0), world.teacher_V.softmax(0)
        return world.backward((p_V ** (1 + POWER) / (1 + POWER) - p_V * q_V**POWER).sum() / POWER)

    def reverse(world: World) -> Tensor:
        return world.gradient(get_divergence("reverse_kl"))

    def forward(world: World) -> Tensor:
        return world.gradient(get_divergence("forward_kl"))

    power, density = f"PowerOPD({POWER:g})", f"density power({POWER:g})"
    for name, target, estimate, update, expected in (
        ("reverse_kl", reverse, "k1 as reward", as_reward(k1), Verdict.EXACT),
        ("reverse_kl", reverse, "k2 as reward", as_reward(k2), Verdict.BIASED),
        ("reverse_kl", reverse, "k3 as reward", as_reward(k3), Verdict.BIASED),
        ("reverse_kl", reverse, "k1 as loss", as_loss(k1), Verdict.ZERO),
        ("reverse_kl", reverse, "k2 as loss", as_loss(k2), Verdict.EXACT),
        ("reverse_kl", reverse, "k3 as loss", as_loss(k3), Verdict.BIASED),
        ("reverse_kl", reverse, "top-k KL as reward", topk_scalar, Verdict.ZERO),
        ("reverse_kl", reverse, power, power_reward, Verdict.BIASED),
        ("forward_kl", forward, "k3 as loss", as_loss(k3), Verdict.EXACT),
        (density, density_power, power, power_reward, Verdict.EXACT),
    ):
        yield Row(name, estimate, "sampled", "none", measure(worlds, target, update), expected)
