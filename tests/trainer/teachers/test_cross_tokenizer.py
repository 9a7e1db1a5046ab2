"""Teachers with another tokenizer: the same as ever with equal ones, and sums over spans by hand with others."""

import pytest
import torch
from accelerate import Accelerator

from opd_env.engines.base import ScriptedEngine
from opd_env.engines.local import LocalEngine
from opd_env.engines.models import LoadedModel, load_model
from opd_env.episode.rollouts import rollout
from opd_env.formats import get_format
from opd_env.messages import user
from opd_env.settings.fields import ConfigError
from opd_env.tasks import load_task
from opd_env.tools import Toolbox
from opd_env.trainer import OPDTrainer
from opd_env.trainer.batch import PolicyModule
from opd_env.trainer.learn.objective import sums_by_span
from opd_env.trainer.learn.update import Updater
from opd_env.trainer.math.advantages import advantage
from opd_env.trainer.run.setup import make_parts
from opd_env.trainer.teachers.base import LocalTeacher
from opd_env.trainer.teachers.cross_tokenizer import CrossTokenizerTeacher
from opd_env.trainer.teachers.prompts import ExampleFinder
from tests.formats.families import family_tokenizer
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.settings import objective_for
from tests.trainer.toy import loaded, toy_config

CHAT = get_format(tiny_tokenizer())
TURNS = (
    'Let me see.<tool_call>\n{"name": "calculator", "arguments": {"expression": "1 + 1"}}\n</tool_call><|im_end|>',
    "Ünd 2 it is.<|im_end|>",
)
OTHERS = ["Gemma 3", "Llama 3", "Mistral 0.3"]


def played(turns=TURNS, count=2):
    """Scripted episodes whose tokens claim to have been sampled with unequal log-probs."""

    def respond(request, turn):
        return CHAT.render_turn(turns[turn].removesuffix("<|im_end|>"))[: None if "<|im_end|>" in turns[turn] else -1]

    engine = ScriptedEngine(respond, CHAT.stop_token_ids)
    trajectories = rollout(load_task("toy_sums"), engine, CHAT, indices=range(count), tool_workers=0).trajectories
    for one in trajectories:
        one.logprobs[one.sampled] = -torch.rand(one.num_sampled, generator=torch.Generator().manual_seed(1)).numpy()
    return trajectories


def other_teacher(name="Gemma 3", seed=3):
    tokenizer = family_tokenizer(name)
    model = tiny_llama(seed=seed, vocab_size=len(tokenizer), initializer_range=0.3)
    return CrossTokenizerTeacher(LoadedModel(model, tokenizer, name), CHAT, ExampleFinder([load_task("toy_sums")]))


def test_with_the_students_own_tokenizer_every_token_is_a_span_scored_as_ever():
    trajectories = played()
    model = loaded(5, spread=0.5)
    scores = CrossTokenizerTeacher(model, CHAT, ExampleFinder([load_task("toy_sums")])).score_spans(trajectories)
    assert scores.span_N.tolist() == list(range(sum(one.num_sampled for one in trajectories)))
    torch.testing.assert_close(scores.logprobs_N, LocalTeacher(model, vocab_size=CHAT.vocab_size).score(trajectories))


def cut(pieces, values):
    """Sums of values by the place where each piece of a text ends."""
    found, at, total = {}, 0, 0.0
    for piece, value in zip(pieces, values, strict=True):
        at, total = at + len(piece), total + value
        found[at] = total
    return found


@pytest.mark.parametrize("name", OTHERS)
def test_a_spans_log_prob_is_the_sum_over_the_teachers_tokens_of_the_same_text(name):
    """Against one plain forward pass over a row put together here, and sums up to every place that both share."""
    turns = (TURNS[0], "And 2 it is.<|im_end|>")
    (trajectory,) = played(turns, count=1)
    teacher = other_teacher(name)
    scores = teacher.score_spans([trajectory])
    chat = teacher.chat
    with Toolbox(["calculator"]) as toolbox:
        ids = chat.render_prompt(CHAT.describe_tools(load_task("toy_sums")[0].messages, toolbox.schemas))
    rows, starts = [], []
    for number, text in enumerate(turn.removesuffix("<|im_end|>") for turn in turns):
        if number:
            results = f"<tool_response>\n{trajectory.turns[0].calls[0].output}\n</tool_response>"
            ids += chat.user_message(user(results)).ids
        starts.append(len(ids))
        rows.append(chat.render_turn(text))
        ids += rows[-1]
    with torch.no_grad():
        logprobs = teacher.local.loaded.model(torch.tensor([ids])).logits[0, :, : chat.vocab_size].log_softmax(1)
    place = 0
    for record, start, row in zip(trajectory.turns, starts, rows, strict=True):
        own = trajectory.token_ids[record.start : record.stop].tolist()
        mine = slice(place, place + len(own))
        place += len(own)
        shares = cut([CHAT.decode([token]) for token in own[:-1]] + [""], scores.logprobs_N[mine].tolist())
        pieces = [chat.decode([token]) for token in row[:-1]]
        added = len("".join(pieces)) - len(record.text)
        pieces[0] = pieces[0][added:]
        scored = [logprobs[start + n - 1, token].item() for n, token in enumerate(row)]
        theirs = cut([*pieces, ""], scored)
        shared = sorted(set(shares) & set(theirs))
        assert [shares[at] for at in shared] == pytest.approx([theirs[at] for at in shared], rel=1e-4, abs=1e-3)
        assert len(set(scores.span_N[mine].tolist())) == len(shared) + 1  # the end-of-turn tokens, too


def test_shares_differ_from_the_students_log_probs_by_the_same_amount_within_a_span():
    trajectories = played()
    scores = other_teacher().score_spans(trajectories)
    student_N = torch.cat([torch.from_numpy(one.logprobs[one.sampled]) for one in trajectories])
    gaps_N = scores.logprobs_N - student_N
    for span in scores.span_N.unique():
        gap = gaps_N[scores.span_N == span]
        torch.testing.assert_close(gap, gap[:1].expand_as(gap))


def test_no_span_crosses_turns_or_holds_a_token_that_was_not_sampled():
    trajectories = played()
    span_N = other_teacher().score_spans(trajectories).span_N.tolist()
    turns = [(number, turn) for number, one in enumerate(trajectories) for turn in one.turn[one.sampled].tolist()]
    assert len(turns) == len(span_N)
    homes: dict[int, set] = {}
    for span, turn in zip(span_N, turns, strict=True):
        homes.setdefault(span, set()).add(turn)
    assert all(len(home) == 1 for home in homes.values())


def test_a_turn_cut_by_a_limit_has_no_end_to_score():
    (trajectory,) = played(turns=("The answer",), count=1)
    assert trajectory.turns[0].truncated
    scores = other_teacher().score_spans([trajectory])
    assert len(scores.logprobs_N) == trajectory.num_sampled


def test_the_expected_update_is_the_gradient_of_the_divergence_over_spans():
    """All 16 strings of four bits in two spans; the teacher knows each span as one token."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, dtype=torch.float64, generator=generator).requires_grad_()
    teacher = torch.randn(2, 4, dtype=torch.float64, generator=generator).log_softmax(1)  # span, string of it
    student = logits.log_softmax(1)
    spans = torch.tensor([0, 0, 1, 1])
    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        expected = torch.zeros_like(logits)
        for code in range(16):
            bits = torch.tensor([code >> 3 & 1, code >> 2 & 1, code >> 1 & 1, code & 1])
            logprobs = student.gather(1, bits[:, None])[:, 0]
            span_logprobs = teacher[[0, 1], [int(bits[0] * 2 + bits[1]), int(bits[2] * 2 + bits[3])]]
            shares = (
                logprobs.detach()
                + sums_by_span(torch.zeros(4, dtype=torch.float64), spans)
                + ((span_logprobs - torch.stack([logprobs[:2].sum(), logprobs[2:].sum()]).detach()) / 2)[spans]
            )
            advantages = advantage(sums_by_span(shares - logprobs.detach(), spans), divergence)
            loss = -(advantages * logprobs).sum()
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
            expected += logprobs.detach().sum().exp() * gradient
        total = torch.zeros((), dtype=torch.float64)
        for span in range(2):
            pairs = student[2 * span][:, None] + student[2 * span + 1][None, :]
            u = (teacher[span].view(2, 2) - pairs).exp()
            f = {
                "reverse_kl": -u.log(),
                "forward_kl": u * u.log(),
                "jsd": 0.5 * (u * u.log() - (1 + u) * ((1 + u) / 2).log()),
            }[divergence]
            total = total + (pairs.exp() * f).sum()
        (exact,) = torch.autograd.grad(total, logits, retain_graph=True)
        torch.testing.assert_close(expected, exact)


def test_the_objective_gives_every_token_of_a_span_the_advantage_of_the_span(tmp_path):
    trajectories, teacher = played(), other_teacher()
    scores = teacher.score_spans(trajectories)
    student = loaded(7, spread=0.2)
    config = toy_config(tmp_path, estimator="sampled", cross_tokenizer=True, divergence="jsd")
    objective = objective_for(config, teacher, CHAT.vocab_size)
    objective.begin(trajectories)
    Updater(PolicyModule(student.model, CHAT.vocab_size), Accelerator()).update(objective.rows, objective, 1e-3)
    tokens = objective.tokens
    for span in scores.span_N.unique():
        members = scores.span_N == span
        log_ratio = (scores.logprobs_N - tokens.behaviour_logprobs_N)[members].sum()
        torch.testing.assert_close(tokens.log_ratio_N[members], log_ratio.expand(int(members.sum())))
        torch.testing.assert_close(tokens.advantages_N[members], advantage(tokens.log_ratio_N[members], "jsd"))
        torch.testing.assert_close(tokens.kl_N[members].sum(), -log_ratio)


def test_a_run_with_a_teacher_of_another_family_goes_through(tmp_path):
    tokenizer = family_tokenizer("Gemma 3")
    teacher = LoadedModel(tiny_llama(seed=3, vocab_size=len(tokenizer)), tokenizer, "other")
    config = toy_config(tmp_path / "run", estimator="sampled", cross_tokenizer=True, steps=2, learning_rate=1e-2)
    results = OPDTrainer(config, student=loaded(1, spread=0.02), teacher=teacher).train()
    assert results["steps"] == 2
    assert results["teacher"]["n"] == 2


@pytest.mark.parametrize("repair", [False, True])
def test_the_teachers_own_episodes_are_read_with_the_repairs_of_the_run(tmp_path, repair):
    tokenizer = family_tokenizer("Llama 3")
    teacher = LoadedModel(tiny_llama(seed=3, vocab_size=len(tokenizer)), tokenizer, "other")
    config = toy_config(tmp_path, estimator="sampled", cross_tokenizer=True, repair_calls=repair)
    chat = make_parts(config, torch.device("cpu"), student=loaded(1), teacher=teacher).teachers.chat
    (call,) = chat.parse(chat.render_turn("{'name': 'calculator', 'parameters': {}}")).calls or (None,)
    assert (call is not None and call.repairs == ("single quotes",)) == repair


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"estimator": "full"}, "one vocabulary"),
        ({"estimator": "sampled", "gamma": 0.5}, "gamma=0.5 does not work with teacher.cross_tokenizer"),
        ({"estimator": "sampled", "teacher_demonstrations": 2}, "teacher.demonstrations"),
    ],
)
def test_settings_that_need_one_vocabulary_are_refused(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        toy_config(tmp_path, cross_tokenizer=True, **settings)


@pytest.mark.slow
def test_the_packaged_teacher_scores_the_same_through_spans():
    model = load_model("packaged:teacher")
    chat = get_format(model.tokenizer)
    task = load_task("arithmetic")
    engine = LocalEngine(load_model("packaged:student").model, chat.stop_token_ids, chat.vocab_size)
    trajectories = rollout(task, engine, chat, indices=range(8), tool_workers=0).trajectories
    scores = CrossTokenizerTeacher(model, chat, ExampleFinder([task])).score_spans(trajectories)
    ours = LocalTeacher(model, vocab_size=chat.vocab_size).score(trajectories)
    # Where the student cut a text otherwise than the tokenizer would, one span holds several tokens.
    _, span_N = scores.span_N.unique(return_inverse=True)
    same = torch.bincount(span_N)[span_N] == 1
    assert same.float().mean() > 0.9
    torch.testing.assert_close(scores.logprobs_N[same][:20], ours[same][:20], rtol=1e-4, atol=1e-4)
