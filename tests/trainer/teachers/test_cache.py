"""Teacher log-probs on disk: asked once, found by content, and never someone else's."""

import pytest
import torch

from opd_env.errors import TrainingError
from opd_env.trainer.teachers.base import LocalTeacher
from opd_env.trainer.teachers.cache import FILE, CachedTeacher
from tests.tiny import tiny_tokenizer
from tests.trainer.toy import loaded, made_trajectory

TRAJECTORIES = [made_trajectory(seed, turns=(1 + seed % 3, 2)) for seed in range(5)]
LOCAL = LocalTeacher(loaded(5, spread=0.5), vocab_size=len(tiny_tokenizer()))


class Counting:
    """The local teacher, and what it was asked."""

    name = "counting"

    def __init__(self, lost=0):
        self.asked, self.lost = [], lost

    def score(self, trajectories):
        self.asked += trajectories
        return LOCAL.score(trajectories)[self.lost :]

    def score_topk(self, trajectories, k):
        self.asked += trajectories
        return LOCAL.score_topk(trajectories, k)


def cached(folder, teacher, identity="one", rows=LOCAL.rows):
    return CachedTeacher(teacher, folder, identity, rows)


def test_what_was_scored_once_is_read_back_to_the_bit_also_by_another_run(tmp_path):
    teacher = Counting()
    first = cached(tmp_path, teacher).score(TRAJECTORIES)
    assert torch.equal(first, LOCAL.score(TRAJECTORIES))
    again = cached(tmp_path, teacher)
    assert torch.equal(again.score(TRAJECTORIES), first)
    assert (len(teacher.asked), again.hits, again.misses) == (5, 5, 0)


def test_only_new_episodes_are_asked_for_and_stand_in_their_place(tmp_path):
    teacher = Counting()
    cached(tmp_path, teacher).score(TRAJECTORIES[1::2])
    found = cached(tmp_path, teacher).score(TRAJECTORIES)
    torch.testing.assert_close(found, LOCAL.score(TRAJECTORIES), rtol=1e-4, atol=1e-5)
    assert teacher.asked == [TRAJECTORIES[1], TRAJECTORIES[3], TRAJECTORIES[0], TRAJECTORIES[2], TRAJECTORIES[4]]


def test_the_same_episode_twice_is_asked_for_once(tmp_path):
    teacher = Counting()
    found = cached(tmp_path, teacher).score([TRAJECTORIES[0], TRAJECTORIES[0]])
    assert len(teacher.asked) == 1
    assert torch.equal(*found.chunk(2))


def test_another_teacher_another_prompt_and_another_k_are_other_entries(tmp_path):
    teacher = Counting()
    other_prompt = LocalTeacher(LOCAL.loaded, vocab_size=len(tiny_tokenizer()), prompt=lambda one: [[7, 8, 9]]).rows
    cached(tmp_path, teacher).score(TRAJECTORIES)
    cached(tmp_path, teacher, identity="two").score(TRAJECTORIES)
    cached(tmp_path, teacher, rows=other_prompt).score(TRAJECTORIES)
    top = cached(tmp_path, teacher).score_topk(TRAJECTORIES, 3)
    cached(tmp_path, teacher).score_topk(TRAJECTORIES, 4)
    assert len(teacher.asked) == 25
    again = cached(tmp_path, teacher).score_topk(TRAJECTORIES, 3)
    assert len(teacher.asked) == 25
    for name in vars(top):
        assert torch.equal(getattr(again, name), getattr(top, name))


def test_a_damaged_file_and_a_lost_token_are_one_sentence(tmp_path):
    with pytest.raises(TrainingError, match="counting gave"):
        cached(tmp_path / "lost", Counting(lost=1)).score(TRAJECTORIES)
    (tmp_path / FILE).write_bytes(b"not a database at all, but long enough to look like one" * 50)
    with pytest.raises(TrainingError, match="remove the file if it is damaged"):
        cached(tmp_path, Counting()).score(TRAJECTORIES)


def test_no_episode_gives_no_score(tmp_path):
    assert cached(tmp_path, Counting()).score([]).shape == (0,)
