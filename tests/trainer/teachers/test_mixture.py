"""A mixture of teachers is one teacher whose distribution is the weighted mean, with every estimator."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from opd_env.cli.tables import before_after_table
from opd_env.errors import TrainingError
from opd_env.settings.fields import ConfigError
from opd_env.trainer.math.divergences import get_divergence
from opd_env.trainer.run.loop import OPDTrainer
from opd_env.trainer.teachers.base import LocalTeacher
from opd_env.trainer.teachers.many import LocalMixture, TeacherMixture
from tests.engines.fake_vllm import FakeVLLM
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.counted import VOCABULARY, World, transformer
from tests.trainer.learn.test_objective_enumeration import (
    assert_equal_updates,
    decoder_gradient,
    expected_update,
    objective_of,
    teacher_of,
)
from tests.trainer.toy import loaded, made_trajectory, naive_logprobs, rows_of, targets_of, toy_config

TOKENS = len(tiny_tokenizer())
EPISODES = [made_trajectory(seed, prompt=3 + seed, turns=(1 + seed, 2)) for seed in range(4)]
WEIGHTS = (0.7, 0.1, 0.2)


def members(temperature: float = 1.0) -> list[LocalTeacher]:
    """Three models of different widths."""
    return [
        LocalTeacher(
            loaded(seed, f"t{seed}", spread=0.5, hidden=hidden), vocab_size=TOKENS, temperature=temperature,
            tokens_per_microbatch=30,
        )
        for seed, hidden in ((5, 16), (6, 32), (7, 16))
    ]  # fmt: skip


def local(*ones: LocalTeacher, weights: Any = WEIGHTS, vocabulary: int = TOKENS, **options: Any) -> LocalMixture:
    return LocalMixture(ones, weights, device=torch.device("cpu"), vocab_size=vocabulary, **options)


def naive(ones: list[LocalTeacher], temperature: float = 1.0) -> Tensor:
    """``[N, V]``: probabilities, weighted and added up."""
    with torch.no_grad():
        parts = [naive_logprobs(one.loaded.model.double(), rows_of(EPISODES), temperature).exp() for one in ones]
    for one in ones:
        one.loaded.model.float()
    return sum(weight * part for weight, part in zip(WEIGHTS, parts, strict=True)).log()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_top_k_are_those_of_the_weighted_mean(temperature: float) -> None:
    ones = members(temperature)
    q_NV = naive(ones, temperature)
    right_N = q_NV.gather(1, targets_of(EPISODES)[:, None])[:, 0].float()
    whole = local(*ones, temperature=temperature)
    for teacher in (TeacherMixture(ones, WEIGHTS), whole):
        assert teacher.name == "0.7 × t5 + 0.1 × t6 + 0.2 × t7"
        torch.testing.assert_close(teacher.score(EPISODES), right_N, rtol=1e-4, atol=1e-5)
        assert teacher.score([]).shape == (0,)
    top, expected = whole.score_topk(EPISODES, 5), q_NV.topk(5, dim=1)
    assert torch.equal(top.topk_ids_NK, expected.indices)
    torch.testing.assert_close(top.topk_logprobs_NK, expected.values.float(), rtol=1e-4, atol=1e-5)
    assert whole.score_topk([], 5).topk_ids_NK.shape == (0, 5)


def test_a_teacher_mixed_with_itself_or_with_almost_nothing_is_that_teacher() -> None:
    one, other, _ = members()
    alone_N = one.score(EPISODES)
    for weights, ones in (((0.3, 0.7), (one, one)), ((1.0,), (one,)), ((1 - 1e-9, 1e-9), (one, other))):
        for teacher in (TeacherMixture(ones, weights), local(*ones, weights=weights)):
            torch.testing.assert_close(teacher.score(EPISODES), alone_N, rtol=0, atol=2e-6)


def test_a_token_that_one_member_forbids_has_the_share_of_the_others() -> None:
    class Certain:
        name = "certain"

        def __init__(self, logprob: float) -> None:
            self.logprob = logprob

        def score(self, trajectories: Any) -> Tensor:
            return torch.full((sum(one.num_sampled for one in trajectories),), self.logprob)

    found_N = TeacherMixture([Certain(-math.inf), Certain(-1.0)], (0.75, 0.25)).score(EPISODES)
    torch.testing.assert_close(found_N, torch.full_like(found_N, math.log(0.25) - 1.0))
    assert TeacherMixture([Certain(-math.inf)] * 2, (0.5, 0.5)).score(EPISODES).max() == -math.inf


def test_a_member_that_loses_a_token_is_named() -> None:
    class Short:
        name = "short"

        def score(self, trajectories: Any) -> Tensor:
            return torch.zeros(3)

    with pytest.raises(TrainingError, match="the teacher short gave 3 log-probs"):
        TeacherMixture([members()[0], Short()], (0.5, 0.5)).score(EPISODES)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.5, 0.6), (1.5, -0.5), (math.nan, 1.0), ()])
def test_weights_that_make_no_distribution_are_refused(weights: Any) -> None:
    ones = members()[: len(weights)]
    for make in (lambda: TeacherMixture(ones, weights), lambda: local(*ones, weights=weights)):
        with pytest.raises(ValueError, match="must be positive and add up to 1"):
            make()


class MixedTransformer:
    """Two transformers whose probabilities are added up, in the shape in which ``World`` asks one."""

    def __init__(self, ones: list[Any], weights: tuple[float, ...]) -> None:
        self.ones, self.weights = ones, weights

    def model(self, **inputs: Any) -> Any:
        states = [one.model(**inputs).last_hidden_state for one in self.ones]
        return SimpleNamespace(last_hidden_state=torch.cat(states, -1))

    def lm_head(self, hidden: Tensor) -> Tensor:
        parts = zip(self.ones, hidden.chunk(len(self.ones), -1), self.weights, strict=True)
        return sum(weight * one.lm_head(part).softmax(-1) for one, part, weight in parts).log()


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize(
    ("estimator", "baseline", "gamma", "topk"),
    [
        ("sampled", "none", 0, 3),
        ("sampled", "none", 1, 3),
        ("sampled", "value", 0, 3),
        ("full", "none", 0, 3),
        ("topk", "none", 0, 1),
        ("topk", "none", 0, 2),
    ],
)
def test_the_expected_update_is_the_gradient_of_the_divergence_from_the_mixture(
    name: str, estimator: str, baseline: str, gamma: int, topk: int
) -> None:
    weights = (0.4, 0.6)
    world = World.make()
    ones = [transformer(seed).requires_grad_(False) for seed in (1, 2)]
    singles = [teacher_of(World(world.student, one, world.episodes)) for one in ones]
    world.teacher = MixedTransformer(ones, weights)  # type: ignore[assignment]
    settings = {"divergence": name, "estimator": estimator, "baseline": baseline, "topk_tokens": topk}
    exact = decoder_gradient(world, world.objective(get_divergence(name), gamma, topk=topk))
    teachers: list[Any] = [local(*singles, weights=weights, vocabulary=VOCABULARY)]
    if estimator == "sampled" and baseline == "none":
        teachers.append(TeacherMixture(singles, weights))
    for teacher in teachers:
        objective = objective_of(world, teacher, gamma=float(gamma), **settings)
        assert_equal_updates(expected_update(world, objective), exact)
    alone = objective_of(world, singles[0], gamma=float(gamma), **settings)
    assert float((expected_update(world, alone) - exact).norm() / exact.norm()) > 0.05  # one member alone is not it


# In a run.


def saved(folder: Path, seed: int) -> str:
    other = loaded(seed, "other", spread=0.3)
    other.model.save_pretrained(folder)
    other.tokenizer.save_pretrained(folder)
    return str(folder)


def trainer(folder: Path, **changes: Any) -> OPDTrainer:
    teacher = loaded(2, "teacher", spread=0.3)
    config = toy_config(folder, **{"steps": 1, **changes})
    return OPDTrainer(config, student=loaded(1, "student"), teacher=teacher, console=Console(file=StringIO()))


def student_of(run: OPDTrainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.updater.parameters.values()])


@pytest.mark.parametrize("settings", [{}, {"estimator": "sampled"}, {"estimator": "topk", "topk_tokens": 8}])
def test_a_run_learns_from_the_mixture_and_evaluates_each_member(tmp_path: Path, settings: dict[str, Any]) -> None:
    other = saved(tmp_path / "other", 7)
    run = trainer(tmp_path / "mixed", teacher_mixture={other: 0.5, "teacher": 0.5}, **settings)
    results = run.train()
    assert list(results["teachers"]) == ["teacher", other]
    assert results["teachers"]["teacher"] == results["teacher"]
    for name in ("teacher", "teacher_2"):
        stored = json.loads((tmp_path / "mixed" / "evaluations" / name / "results.json").read_text())
        assert stored["evaluation"]["n"] == 2
    console = Console(file=StringIO(), width=400)
    console.print(before_after_table(results))
    page = (tmp_path / "mixed" / "report.html").read_text()
    for shown, words in ((console.file.getvalue(), "teacher {}"), (page, "Teacher {}")):
        assert all(word in shown for word in (f" 0.5 × teacher + 0.5 × {other}, wh", words.format(1), words.format(2)))
    found = [student_of(run)]
    for name, mixture in (("one", {}), ("twice", {"teacher": 1.0})):
        again = trainer(tmp_path / name, teacher_mixture=mixture, **settings)
        again.train()
        found.append(student_of(again))
    torch.testing.assert_close(found[2], found[1], rtol=0, atol=2e-3)  # Adam's first step: a sign may turn at 0
    assert (found[2] - found[1]).abs().mean() < 1e-5 < (found[0] - found[1]).abs().mean()


def test_members_are_remembered_by_themselves_so_that_weights_can_change(tmp_path: Path) -> None:
    other = saved(tmp_path / "other", 7)
    settings = {"estimator": "sampled", "teacher_cache": str(tmp_path / "cache")}
    runs = [
        trainer(tmp_path / str(weight), teacher_mixture={"teacher": weight, other: 1 - weight}, **settings)
        for weight in (0.5, 0.25)
    ]
    for run in runs:
        run.parts.teachers.scorer.score(EPISODES)
    for cached in runs[1].parts.teachers.scorer._members:  # type: ignore[attr-defined]
        assert (cached.hits, cached.misses) == (len(EPISODES), 0)
    topk = {"estimator": "topk", "topk_tokens": 5, "teacher_cache": str(tmp_path / "cache")}
    scores = []
    for weight in (0.5, 0.25, 0.5):
        run = trainer(tmp_path / "run", teacher_mixture={"teacher": weight, other: 1 - weight}, resume="never", **topk)
        scores.append(run.parts.teachers.scorer.score_topk(EPISODES, 5))  # type: ignore[attr-defined]
    assert not torch.equal(scores[0].topk_logprobs_NK, scores[1].topk_logprobs_NK)
    assert torch.equal(scores[0].topk_logprobs_NK, scores[2].topk_logprobs_NK)


def test_a_route_beside_a_mixture_stays_one_model_and_each_model_is_loaded_once(tmp_path: Path) -> None:
    other = saved(tmp_path / "other", 7)
    run = trainer(
        tmp_path / "run", estimator="sampled", teacher_mixture={"teacher": 0.5, other: 0.5},
        teacher_routes={"toy_sums": other},
    )  # fmt: skip
    teachers = run.parts.teachers
    assert teachers.scorer._others["toy_sums"] is teachers.members[other]  # type: ignore[attr-defined]
    assert teachers.scorer._general.name == f"0.5 × teacher + 0.5 × {other}"  # type: ignore[attr-defined]


def test_servers_and_models_mix(tmp_path: Path) -> None:
    with FakeVLLM(lambda: tiny_llama(seed=7, initializer_range=0.3)) as server:
        mixture = {"teacher": 0.5, server.url: 0.5}
        run = trainer(tmp_path / "served", estimator="sampled", teacher_mixture=mixture)
        served_N = run.parts.teachers.scorer.score(EPISODES)
        results = run.train()
        assert set(results["teachers"]) == set(mixture)
    other = saved(tmp_path / "other", 7)
    run = trainer(tmp_path / "local", estimator="sampled", teacher_mixture={"teacher": 0.5, other: 0.5})
    torch.testing.assert_close(served_N, run.parts.teachers.scorer.score(EPISODES), rtol=1e-4, atol=1e-4)


def test_every_member_is_checked_against_the_student(tmp_path: Path) -> None:
    run = trainer(
        tmp_path / "run", estimator="sampled", teacher_mixture={"teacher": 0.9, saved(tmp_path / "o", 7): 0.1}
    )
    checked = []
    for name, member in run.parts.teachers.members.items():
        member.score = lambda episodes, name=name, ask=member.score: checked.append(name) or ask(episodes)  # type: ignore
    run.train()
    assert set(checked[:2]) == set(run.parts.teachers.members)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_mixture": {"a": 0.5, "b": 0.5}}, "names a, b but not teacher.model=teacher"),
        ({"teacher_mixture": {"teacher": 0.5, "b": 0.4}}, "above 0 and add up to 1"),
        ({"teacher_mixture": {"teacher": 1.0, "b": 0.0}}, "above 0 and add up to 1"),
        ({"teacher_mixture": {"teacher": 1.5, "b": -0.5}}, "above 0 and add up to 1"),
        ({"teacher_mixture": {"teacher": "1", "b": 0.5}}, "teacher.mixture.teacher is '1'; expected a number"),
        (
            {"teacher_mixture": {"teacher": 0.5, "http://b:1": 0.5}, "estimator": "topk"},
            "estimator=topk needs the whole distribution of the teacher.mixture",
        ),
        (
            {"teacher_mixture": {"teacher": 0.5, "http://b:1": 0.5}, "estimator": "sampled", "baseline": "value",
             "mode": "opd_plus"},
            "baseline=value needs the whole distribution",
        ),
        (
            {"teacher_mixture": {"teacher": 0.5, "b": 0.5}, "cross_tokenizer": True, "estimator": "sampled"},
            "teacher.mixture=.* does not work with teacher.cross_tokenizer",
        ),
    ],
)  # fmt: skip
def test_a_mixture_that_cannot_be_right_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy_config(tmp_path, **changes)
