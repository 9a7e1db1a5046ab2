"""Episodes of several rows are learnt from as one episode, each token in the context that it was sampled in."""

import copy
import math
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from opd_env.engines.base import ScriptedEngine
from opd_env.engines.local import LocalEngine
from opd_env.engines.models import LoadedModel
from opd_env.engines.servers.client import HttpClient
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.rollouts import rollout
from opd_env.episode.trajectory import Trajectory
from opd_env.evaluation.read_run import read_metrics
from opd_env.formats import get_format
from opd_env.formats.base import TokenKind
from opd_env.messages import user
from opd_env.tasks import Example, register_task
from opd_env.trainer import OPDTrainer
from opd_env.trainer.batch import PolicyModule, pack, rows_of
from opd_env.trainer.learn.update import Updater
from opd_env.trainer.math.divergences import get_divergence
from opd_env.trainer.run.sft import sft, supervised_objective
from opd_env.trainer.teachers.base import LocalTeacher
from opd_env.trainer.teachers.cache import CachedTeacher
from opd_env.trainer.teachers.cross_tokenizer import CrossTokenizerTeacher
from opd_env.trainer.teachers.prompts import DemonstrationFormat, ExampleFinder, TaskPrompts, with_answer
from opd_env.trainer.teachers.served import ServerTeacher
from tests.engines.fake_vllm import FakeVLLM
from tests.episode.test_user_turns import Talk
from tests.formats.families import family_tokenizer
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.learn.test_objective import assert_gradients_equal, gradient_of, student, teacher
from tests.trainer.settings import objective_for
from tests.trainer.toy import made_trajectory, naive_logprobs, targets_of, toy_config

VOCABULARY = len(tiny_tokenizer())


def several(seed: int, turns: tuple[int, ...], *begin: int) -> Trajectory:
    """Random tokens, with a new row after each of the turns ``begin``."""
    one = made_trajectory(seed, prompt=3 + seed, turns=turns, tool=3)
    ends = [one.turns[number - 1].stop for number in begin]
    for end in ends:
        one.kind[end : end + 3] = TokenKind.HISTORY
    return replace(one, row_starts=(0, *ends))


TRAJECTORIES = [several(0, (3, 2, 4), 1, 2), several(1, (2, 1)), several(2, (1, 5, 2), 2), several(3, (4, 1), 1)]
N = sum(one.num_sampled for one in TRAJECTORIES)
NAIVE = [
    (one.token_ids[row].tolist(), one.sampled[row].tolist()) for one in TRAJECTORIES for row in one.rows
]  # what a model reads, written out
budgets = pytest.mark.parametrize("budget", [1, 30, 10_000])


@budgets
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_the_full_gradient_is_that_of_every_row_alone(tmp_path, budget, divergence):
    model = student()
    found, objective, update = gradient_of(toy_config(tmp_path, divergence=divergence), model, TRAJECTORIES, budget)
    reference = copy.deepcopy(model)
    p_NV = naive_logprobs(reference, NAIVE)
    with torch.no_grad():
        q_NV = naive_logprobs(teacher().loaded.model, NAIVE)
    loss = (p_NV.exp() * get_divergence(divergence).f((q_NV - p_NV).exp())).sum() / N
    assert update.loss == pytest.approx(loss.item(), rel=1e-5)
    kl_N = (p_NV.exp() * (p_NV - q_NV)).sum(1).detach().float()
    torch.testing.assert_close(objective.tokens.kl_N, kl_N, rtol=1e-4, atol=1e-5)
    assert_gradients_equal(found, loss, reference)


def written_out_weights(scheme: str, log_u: list[float], turn: list[int], share: float) -> list[float]:
    """The weights of one episode's tokens, by loops over the formulas of ``opd_env.trainer.learn.token_weights``."""
    turns = sorted(set(turn))
    if scheme == "turn_opd":
        return [(1 - share) + share * len(turn) / (len(turns) * turn.count(one)) for one in turn]
    if scheme == "sod":
        gaps = {k: [abs(u) for u, t in zip(log_u, turn, strict=True) if t == k] for k in turns}
        mean = {k: 1e-6 + sum(gaps[k]) / len(gaps[k]) for k in turns}
        return [min(mean[turns[0]] / mean[one], 1.5) for one in turn]
    if scheme == "iw_opd":
        return [1 + 0.5 * (1 - sum(map(abs, log_u[:n])) / sum(map(abs, log_u))) for n in range(len(log_u))]
    return [1.0] * len(log_u)


@budgets
@pytest.mark.parametrize(
    ("scheme", "gamma"),
    [("none", 0.0), ("none", 0.5), ("turn_opd", 0.0), ("turn_opd", 0.7), ("sod", 0.5), ("iw_opd", 0)],
)
def test_the_sampled_gradient_knows_the_whole_episode(tmp_path, budget, scheme, gamma):
    """Returns, turns and drift run through all rows of an episode and no further: against loops over its tokens."""
    model = student()
    config = toy_config(
        tmp_path, estimator="sampled", gamma=gamma, weight_scheme=scheme, reward_coefficient=0.5, samples_per_problem=4
    )
    group = [replace(one, example_id="one", sample=n, correct=n == 2) for n, one in enumerate(TRAJECTORIES)]
    found, objective, _ = gradient_of(config, model, group, budget)
    reference = copy.deepcopy(model)
    logprobs_N = naive_logprobs(reference, NAIVE).gather(1, targets_of(TRAJECTORIES)[:, None])[:, 0]
    with torch.no_grad():
        teacher_N = naive_logprobs(teacher().loaded.model, NAIVE).gather(1, targets_of(TRAJECTORIES)[:, None])[:, 0]
    behaviour_N = torch.cat([torch.from_numpy(one.logprobs[one.sampled]) for one in TRAJECTORIES])
    log_u_N = teacher_N - behaviour_N
    advantages, at = [], 0
    for number, one in enumerate(TRAJECTORIES):
        log_u = log_u_N[at : at + one.num_sampled].tolist()
        at += one.num_sampled
        weights = written_out_weights(scheme, log_u, one.turn[one.sampled].tolist(), share=1.0)
        worth = [weight * u for weight, u in zip(weights, log_u, strict=True)]  # reverse KL: A = log u = -f(u)
        reward = 0.5 * (1.0 if number == 2 else -1 / 3)
        advantages += [
            math.fsum(gamma ** (n - k) * worth[n] for n in range(k, len(worth) if gamma else k + 1)) + reward
            for k in range(len(worth))
        ]
    advantages_N = torch.tensor(advantages, dtype=torch.float64)
    torch.testing.assert_close(objective.tokens.advantages_N.double(), advantages_N, rtol=1e-4, atol=1e-4)
    loss = -((logprobs_N - behaviour_N).exp() * advantages_N).sum() / N
    assert_gradients_equal(found, loss, reference)


def test_rows_that_need_each_other_stay_in_one_micro_batch():
    rows = [row for number, one in enumerate(TRAJECTORIES) for row in rows_of(one, episode=number)]
    owners = [number for number, one in enumerate(TRAJECTORIES) for _ in one.rows]
    for budget in (1, 30, 60, 10_000):
        batches = pack(rows, budget)
        assert sorted(member for batch in batches for member in batch.rows) == list(range(len(rows)))
        for batch in batches:
            mine = [owners[member] for member in batch.rows]
            assert all(mine.count(one) == owners.count(one) for one in mine)
            values_ES, mask_ES = batch.by_episode(batch.index_N.double())
            assert torch.equal(values_ES[mask_ES].long(), batch.index_N)
            assert mask_ES.sum(1).tolist() == [TRAJECTORIES[one].num_sampled for one in dict.fromkeys(mine)]
    alone = pack([row for one in TRAJECTORIES for row in rows_of(one)], 1)
    assert len(alone) == len(rows)


def test_every_teacher_scores_every_row(tmp_path):
    local = teacher()
    expected_N = naive_logprobs(local.loaded.model, NAIVE).gather(1, targets_of(TRAJECTORIES)[:, None])[:, 0].float()
    torch.testing.assert_close(local.score(TRAJECTORIES), expected_N, rtol=1e-4, atol=1e-5)
    cache = CachedTeacher(local, tmp_path, "one", local.rows)
    for hits in (0, 4):
        torch.testing.assert_close(cache.score(TRAJECTORIES), expected_N, rtol=1e-4, atol=1e-5)
        assert (cache.hits, cache.misses) == (hits, 4)
    cache.score([replace(TRAJECTORIES[1]), several(0, (3, 2, 4), 1)])  # the same tokens in fewer rows are others
    assert (cache.hits, cache.misses) == (5, 5)
    with FakeVLLM(lambda: tiny_llama(seed=8, initializer_range=0.3)) as server:
        served = ServerTeacher(HttpClient([server.url]), vocab_size=VOCABULARY)
        torch.testing.assert_close(served.score(TRAJECTORIES), expected_N, rtol=1e-3, atol=1e-3)


def test_the_warm_start_takes_all_rows_of_an_episode():
    def trained(steps):
        model = tiny_llama(seed=1)
        steps(Updater(PolicyModule(model, VOCABULARY), Accelerator(), max_grad_norm=1e9))
        return model.lm_head.weight.detach()

    several_rows = TRAJECTORIES[:1]
    by_sft = trained(lambda one: list(sft(one, several_rows, steps=1, episodes_per_step=1, learning_rate=1e-2)))
    by_hand = trained(lambda one: one.update(rows_of(TRAJECTORIES[0]), supervised_objective, 1e-2))
    assert torch.equal(by_sft, by_hand)


@register_task("toy_talk")
class ToyTalk(Talk):
    """Someone who asks twice."""

    name = "toy_talk"
    splits = ("train", "test")
    sayings = ("And now?", "And then?")

    def example(self, index):
        return Example(f"{self.split}-0", (user(f"Well, {self.split}?"),), "yes")


QWEN = get_format(family_tokenizer("Qwen 3"))
THOUGHTS = [f"<think>\n{text}\n</think>\n\n" for text in ("First.", "Second.", "Third.")]


def talk(chat=QWEN, turns=("no", "no", "yes")) -> Trajectory:
    texts = [thought + turn for thought, turn in zip(THOUGHTS, turns, strict=True)]
    engine = ScriptedEngine(lambda request, turn: chat.render_turn(texts[turn]), chat.stop_token_ids)
    limits = RolloutLimits(max_tokens=4096)
    (trajectory,) = rollout(ToyTalk(), engine, chat, limits=limits, tool_workers=0).trajectories
    assert len(trajectory.rows) == 3
    return trajectory


def test_a_teacher_that_sees_the_answer_sees_it_in_every_row():
    trajectory = talk()
    prompts = TaskPrompts(ExampleFinder([ToyTalk()]), QWEN, answer=True)
    rows = rows_of(trajectory, prompts(trajectory))
    told = with_answer(ToyTalk(), ToyTalk()[0])[0]["content"]
    for number, (row, own) in enumerate(zip(rows, rows_of(trajectory), strict=True)):
        text, plain = (QWEN.decode(one.token_ids_T.tolist()) for one in (row, own))
        assert text == plain.replace("Well, train?", told)
        assert [thought.strip() in text for thought in THOUGHTS] == [n == number for n in range(3)]
        assert np.array_equal(row.token_ids_T[row.sampled_T], own.token_ids_T[own.sampled_T])


def test_demonstrations_stand_before_every_row():
    played = [(user(f"Shown {n}?"), talk()) for n in range(2)]
    chat = DemonstrationFormat(QWEN, played)
    trajectory = talk()
    rows = rows_of(trajectory, TaskPrompts(ExampleFinder([ToyTalk()]), chat)(trajectory))
    for number, row in enumerate(rows):
        text = QWEN.decode(row.token_ids_T.tolist())
        before, question, after = text.partition("Well, train?")
        assert question
        assert before.count("Shown 0?") == 1
        assert "Shown 1?" not in before
        assert "<think>" not in before
        assert after.count("<think>") == 1
        assert THOUGHTS[number].strip() in after
    assert chat.not_append_only == QWEN.not_append_only


def test_a_teacher_of_the_same_family_reads_as_one_of_another_family_would():
    """With one tokenizer and template the spans of text are the tokens, in every row."""
    trajectory = talk()
    model = LoadedModel(tiny_llama(len(family_tokenizer("Qwen 3")), seed=5), family_tokenizer("Qwen 3"), "tiny")
    scores = CrossTokenizerTeacher(model, QWEN, ExampleFinder([ToyTalk()])).score_spans([trajectory])
    assert scores.span_N.tolist() == list(range(trajectory.num_sampled))
    straight = LocalTeacher(model, vocab_size=QWEN.vocab_size).score([trajectory])
    torch.testing.assert_close(scores.logprobs_N, straight, rtol=1e-4, atol=1e-5)


def test_a_teacher_of_another_family_reads_only_the_thoughts_that_a_row_holds():
    trajectory = talk()
    tokenizer = family_tokenizer("Gemma 3")
    model = LoadedModel(tiny_llama(len(tokenizer), seed=5), tokenizer, "gemma")
    other = CrossTokenizerTeacher(model, QWEN, ExampleFinder([ToyTalk()]))
    reading = other._read(trajectory)
    assert len(reading.rows) == 3
    for number, row in enumerate(reading.rows):
        text = other.chat.decode(row.token_ids_T.tolist())
        assert [thought.strip() in text for thought in THOUGHTS] == [n == number for n in range(3)]
        assert text.count("no<end_of_turn>") == min(number + 1, 2)
        written = other.chat.decode(row.token_ids_T[row.sampled_T].tolist())
        assert written == f"{THOUGHTS[number]}{'yes' if number == 2 else 'no'}<end_of_turn>"
    assert len(other.score([trajectory])) == trajectory.num_sampled


def test_the_trainer_gives_the_sampler_s_log_probs_in_every_row(tmp_path):
    name = "Qwen 3, not thinking"
    chat = get_format(family_tokenizer(name))
    model = tiny_llama(len(family_tokenizer(name)), initializer_range=0.1)
    engine = LocalEngine(model, range(30), chat.vocab_size, 3)  # any of 30 tokens ends a turn
    limits = RolloutLimits(max_turn_tokens=40, max_tokens=900)
    found = rollout(ToyTalk(), engine, chat, samples=6, limits=limits, seed=3).trajectories
    assert sum(len(one.rows) > 2 for one in found) > 1
    scorer = LocalTeacher(LoadedModel(copy.deepcopy(model), family_tokenizer(name), "same"), vocab_size=chat.vocab_size)
    sampled_N = torch.cat([torch.from_numpy(one.logprobs[one.sampled]) for one in found])
    torch.testing.assert_close(scorer.score(found), sampled_N, rtol=0, atol=1e-5)
    for estimator in ("full", "sampled"):
        config = toy_config(tmp_path, estimator=estimator, weight_scheme="turn_opd")
        objective = objective_for(config, scorer, chat.vocab_size)
        objective.begin(found)
        Updater(PolicyModule(model, chat.vocab_size), Accelerator(), tokens_per_microbatch=500).update(
            objective.rows, objective, 0.0
        )
        torch.testing.assert_close(objective.tokens.logprobs_N, sampled_N, rtol=0, atol=1e-5)
        torch.testing.assert_close(objective.tokens.log_ratio_N, torch.zeros_like(sampled_N), rtol=0, atol=2e-5)


@pytest.mark.parametrize("settings", [{"teacher_sees_answer": True}, {"estimator": "sampled", "gamma": 0.5}])
def test_a_whole_run_counts_rows_and_keeps_sampler_and_trainer_together(tmp_path, settings):
    name = "Qwen 3, not thinking"
    models = [
        LoadedModel(tiny_llama(len(family_tokenizer(name)), seed=seed), family_tokenizer(name), f"tiny {seed}")
        for seed in (1, 2)
    ]
    config = toy_config(
        tmp_path / "run", task="toy_talk", steps=2, episodes_per_step=24, samples_per_problem=24, evaluation_problems=1,
        limits=RolloutLimits(max_turn_tokens=100, max_tokens=900), learning_rate=1e-2, **settings,
    )  # fmt: skip
    OPDTrainer(config, student=models[0], teacher=models[1], console=Console(file=StringIO())).train()
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(line["rollout/rows_per_trajectory"] > 1 for line in metrics)
    assert all(line["rollout/drift"] > 0 for line in metrics)
    assert all(line["train/logprob_gap_max"] < 1e-4 for line in metrics)
