"""Which source of the signal a run gets, what it asks the teacher for, and which teachers are refused."""

import pytest
import torch

from opd_env.errors import TrainingError
from opd_env.trainer.learn.teacher_signal import FullSource, SampledSource, TopKSource, make_source
from opd_env.trainer.math.divergences import get_divergence
from opd_env.trainer.teachers.base import LocalTeacher
from tests.tiny import tiny_tokenizer
from tests.trainer.toy import loaded, made_trajectory, naive_logprobs, rows_of, targets_of, toy_config

VOCABULARY = len(tiny_tokenizer())
TRAJECTORIES = [made_trajectory(1), made_trajectory(2, prompt=9, turns=(1, 4, 2)), made_trajectory(3, turns=(6,))]
LOCAL = LocalTeacher(loaded(5, spread=0.5), vocab_size=VOCABULARY)


class OneLogprob:
    """What any server gives."""

    name = "plain"

    def score(self, trajectories):
        return LOCAL.score(trajectories)


class MostLikely(OneLogprob):
    """What a server with top-k log-probs gives, perhaps with a token lost."""

    name = "likely"

    def __init__(self, lost=0):
        self.lost = lost

    def score_topk(self, trajectories, k):
        top = LOCAL.score_topk(trajectories, k)
        return type(top)(*(getattr(top, name)[self.lost :] for name in vars(top)))


def source(teacher, **settings):
    return make_source(toy_config("unused", **settings).objective, teacher, get_divergence("jsd"), VOCABULARY, 1.0)


@pytest.mark.parametrize(
    ("teacher", "settings", "kind"),
    [
        (LOCAL, {"estimator": "sampled"}, SampledSource),
        (LOCAL, {"estimator": "sampled", "baseline": "value"}, FullSource),
        (LOCAL, {"estimator": "full"}, FullSource),
        (LOCAL, {"estimator": "topk"}, TopKSource),
        (OneLogprob(), {"estimator": "sampled"}, SampledSource),
        (MostLikely(), {"estimator": "sampled", "baseline": "value"}, TopKSource),
        (MostLikely(), {"estimator": "topk"}, TopKSource),
    ],
)
def test_a_run_gets_the_cheapest_source_that_suffices(teacher, settings, kind):
    assert type(source(teacher, **settings)) is kind


@pytest.mark.parametrize(
    ("teacher", "settings", "reason"),
    [
        (OneLogprob(), {"estimator": "full"}, "estimator=full needs a teacher in this process, plain does not"),
        (MostLikely(), {"estimator": "full"}, "estimator=topk if it gives its most likely tokens"),
        (OneLogprob(), {"estimator": "topk"}, "estimator=topk needs a teacher that gives its most likely tokens"),
        (OneLogprob(), {"estimator": "sampled", "baseline": "value"}, "baseline=value needs a teacher that gives"),
        (LOCAL, {"estimator": "topk", "topk_tokens": 10**6}, f"more than the vocabulary of {VOCABULARY} tokens"),
    ],
)
def test_a_teacher_that_cannot_give_what_is_needed_is_refused(teacher, settings, reason):
    with pytest.raises(ValueError, match=reason):
        source(teacher, **settings)


def test_a_top_k_teacher_that_loses_a_token_stops_the_step():
    with pytest.raises(TrainingError, match=r"likely gave 16 log-probs for 18 sampled tokens"):
        source(MostLikely(lost=2), estimator="topk").begin(TRAJECTORIES)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_top_k_scores_equal_naive_full_logits_for_any_micro_batch(budget):
    teacher = LocalTeacher(loaded(5, spread=0.5), vocab_size=VOCABULARY, temperature=0.7, tokens_per_microbatch=budget)
    with torch.no_grad():
        right_NV = naive_logprobs(teacher.loaded.model, rows_of(TRAJECTORIES), 0.7)
    top = teacher.score_topk(TRAJECTORIES, 4)
    torch.testing.assert_close(top.topk_logprobs_NK, right_NV.topk(4).values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(top.topk_logprobs_NK, right_NV.gather(1, top.topk_ids_NK), rtol=1e-4, atol=1e-5)
    own_N = right_NV.gather(1, targets_of(TRAJECTORIES)[:, None])[:, 0]
    torch.testing.assert_close(top.logprobs_N, own_N, rtol=1e-4, atol=1e-5)
