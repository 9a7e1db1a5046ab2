"""A teacher whose scores do not belong to the student's tokens is refused before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_env.engines.models import LoadedModel
from opd_env.episode.trajectory import Trajectory
from opd_env.trainer.run.loop import OPDTrainer
from opd_env.trainer.teachers.base import LocalTeacher
from opd_env.trainer.teachers.fits import require_aligned
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.toy import loaded, made_trajectory, toy_config

VOCABULARY = len(tiny_tokenizer())
STUDENT = loaded(5, spread=0.5)


def sampled_by(model: LoadedModel, count: int = 12) -> list[Trajectory]:
    """Episodes with the log-probs that the model gives their tokens."""
    teacher = LocalTeacher(model, vocab_size=VOCABULARY)
    episodes = [made_trajectory(seed, prompt=9, turns=(8, 11)) for seed in range(count)]
    for index, scores in enumerate(torch.split(teacher.score(episodes), [one.num_sampled for one in episodes])):
        logprobs = np.zeros_like(episodes[index].logprobs)
        logprobs[episodes[index].sampled] = scores.numpy()
        episodes[index] = replace(episodes[index], logprobs=logprobs)
    return episodes


EPISODES = sampled_by(STUDENT)


def shifted(scores_N: torch.Tensor, by: int) -> torch.Tensor:
    """Scores of the neighbouring token, as an engine that is off by one would give them."""
    return torch.cat([torch.roll(part, by) for part in torch.split(scores_N, [one.num_sampled for one in EPISODES])])


def test_the_same_model_has_no_divergence_from_itself() -> None:
    scores = LocalTeacher(STUDENT, vocab_size=VOCABULARY).score(EPISODES)
    ours = torch.cat([torch.from_numpy(one.logprobs[one.sampled]) for one in EPISODES])
    torch.testing.assert_close(scores, ours)
    require_aligned("student", EPISODES, scores, same_model=True)


def test_padding_of_the_head_keeps_the_same_model_the_same() -> None:
    """A checkpoint of 151,936 rows and one of 152,064 are one model if the tokens of the tokenizer are."""
    padded = tiny_llama(VOCABULARY + 40, seed=5, initializer_range=0.5)
    state = STUDENT.model.state_dict()
    for name, tensor in padded.state_dict().items():
        rows = state[name].shape[0]
        tensor[:rows].copy_(state[name])
    teacher = LocalTeacher(LoadedModel(padded, tiny_tokenizer(), "padded"), vocab_size=VOCABULARY)
    require_aligned("padded", EPISODES, teacher.score(EPISODES), same_model=True)


def test_another_model_in_place_of_the_same_is_refused() -> None:
    scores = LocalTeacher(loaded(6, spread=0.5), vocab_size=VOCABULARY).score(EPISODES)
    require_aligned("other", EPISODES, scores)
    with pytest.raises(ValueError, match=r"the teacher other is the student itself, but scores its tokens .* nats off"):
        require_aligned("other", EPISODES, scores, same_model=True)


@pytest.mark.parametrize(("by", "direction"), [(1, "later"), (-1, "earlier")])
def test_scores_shifted_by_one_token_are_refused(by: int, direction: str) -> None:
    scores = LocalTeacher(STUDENT, vocab_size=VOCABULARY).score(EPISODES)
    noise = torch.randn(len(scores), generator=torch.Generator().manual_seed(0)) * 0.5
    require_aligned("teacher", EPISODES, scores + noise)
    with pytest.raises(ValueError, match=rf"are shifted by one token: .* when read one token {direction}"):
        require_aligned("teacher", EPISODES, shifted(scores + noise, by))


@given(seed=st.integers(0, 10_000))
def test_a_teacher_that_knows_nothing_of_the_student_is_no_shift(seed: int) -> None:
    scores = -torch.rand(sum(one.num_sampled for one in EPISODES), generator=torch.Generator().manual_seed(seed)) * 5
    require_aligned("teacher", EPISODES, scores)


class Shifted(LocalTeacher):
    """Off by one."""

    def score(self, trajectories: Sequence[Trajectory]) -> torch.Tensor:
        return torch.roll(super().score(trajectories), 1)


def test_a_run_stops_before_its_first_step(tmp_path: Path) -> None:
    config = toy_config(tmp_path, episodes_per_step=16, steps=1)
    trainer = OPDTrainer(config, student=loaded(5, "student", spread=0.5), teacher=loaded(5, "teacher", spread=0.5))
    teacher = Shifted(trainer.parts.teachers.named.loaded, vocab_size=VOCABULARY)
    trainer.parts = replace(trainer.parts, teachers=replace(trainer.parts.teachers, scorer=teacher))
    with pytest.raises(ValueError, match="are shifted by one token"):
        trainer.train()
    assert not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text()


def test_nothing_is_told_from_certain_or_forbidden_tokens_or_none() -> None:
    certain = [replace(one, logprobs=np.zeros_like(one.logprobs)) for one in EPISODES]
    scores = LocalTeacher(STUDENT, vocab_size=VOCABULARY).score(EPISODES)
    require_aligned("teacher", certain, scores)
    require_aligned("teacher", EPISODES, torch.full_like(scores, -torch.inf))
    require_aligned("teacher", [], torch.empty(0))


def test_few_surprises_after_slips_are_no_shift() -> None:
    """After a token that the student hardly meant, the teacher is surprised at the next one: rare, but large."""
    scores = LocalTeacher(STUDENT, vocab_size=VOCABULARY).score(EPISODES)
    noise = torch.randn(len(scores), generator=torch.Generator().manual_seed(0)) * 0.5
    slipped, surprised = [], (scores + noise).tolist()
    start = 0
    for index, one in enumerate(EPISODES):
        logprobs = one.logprobs.copy()
        if index % 4 == 0:
            logprobs[np.flatnonzero(one.sampled)[2]] = -60.0
            surprised[start + 3] = -60.0
        slipped.append(replace(one, logprobs=logprobs))
        start += one.num_sampled
    values = np.concatenate([one.logprobs[one.sampled] for one in slipped])
    assert np.corrcoef(values[:-1], surprised[1:])[0, 1] > 0.9  # by its values it would be a shift
    require_aligned("teacher", slipped, torch.tensor(surprised))


def test_few_tokens_prove_nothing() -> None:
    scores = shifted(LocalTeacher(STUDENT, vocab_size=VOCABULARY).score(EPISODES), 1)
    require_aligned("teacher", EPISODES[:4], scores[: sum(one.num_sampled for one in EPISODES[:4])])
