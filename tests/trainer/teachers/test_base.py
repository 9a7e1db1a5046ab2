"""Teachers score the very tokens that the student sampled, or refuse before the first step."""

import copy

import pytest
import torch

from opd_env.engines.models import LoadedModel
from opd_env.trainer.teachers.base import LocalTeacher, log_ratios
from opd_env.trainer.teachers.fits import require_compatible
from tests.tiny import TEMPLATE, tiny_llama, tiny_tokenizer
from tests.trainer.toy import loaded, made_trajectory, naive_logprobs, rows_of, targets_of

VOCABULARY = len(tiny_tokenizer())
TRAJECTORIES = [made_trajectory(1), made_trajectory(2, prompt=9, turns=(1, 4, 2)), made_trajectory(3, turns=(6,))]


def picked(logprobs_NV, trajectories=TRAJECTORIES):
    return logprobs_NV.gather(1, targets_of(trajectories)[:, None])[:, 0]


@pytest.mark.parametrize("budget", [1, 40, 10_000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_equal_naive_full_logits_for_any_micro_batch(budget, temperature):
    teacher = LocalTeacher(
        loaded(5, spread=0.5), vocab_size=VOCABULARY, temperature=temperature, tokens_per_microbatch=budget
    )
    with torch.no_grad():
        right = picked(naive_logprobs(teacher.loaded.model, rows_of(TRAJECTORIES), temperature))
    torch.testing.assert_close(teacher.score(TRAJECTORIES), right, rtol=1e-4, atol=1e-5)


def test_padding_of_the_vocabulary_changes_no_score():
    padded = LoadedModel(tiny_llama(VOCABULARY + 40, seed=5, initializer_range=0.5), tiny_tokenizer(), "padded")
    teacher = LocalTeacher(padded, vocab_size=VOCABULARY)
    with torch.no_grad():
        right = picked(naive_logprobs(padded.model, rows_of(TRAJECTORIES)))
    torch.testing.assert_close(teacher.score(TRAJECTORIES), right, rtol=1e-4, atol=1e-5)


def test_another_prompt_scores_each_token_after_that_prompt():
    prompts = {one.example_id: [7, 8, 9, 10 + index, 11] for index, one in enumerate(TRAJECTORIES)}
    model = loaded(5, spread=0.5)
    teacher = LocalTeacher(model, vocab_size=VOCABULARY, prompt=lambda trajectory: [prompts[trajectory.example_id]])
    rows = []
    for one, (ids, sampled) in zip(TRAJECTORIES, rows_of(TRAJECTORIES), strict=True):
        length = sampled.index(True)
        prompt = prompts[one.example_id]
        rows.append((prompt + ids[length:], [False] * len(prompt) + sampled[length:]))
    with torch.no_grad():
        right = picked(naive_logprobs(model.model, rows))
    torch.testing.assert_close(teacher.score(TRAJECTORIES), right, rtol=1e-4, atol=1e-5)
    plain = LocalTeacher(model, vocab_size=VOCABULARY).score(TRAJECTORIES)
    assert (plain - right).abs().max() > 0.01


def test_a_teacher_is_frozen():
    teacher = LocalTeacher(loaded(5), vocab_size=VOCABULARY)
    assert not any(parameter.requires_grad for parameter in teacher.loaded.model.parameters())
    assert not teacher.score(TRAJECTORIES).requires_grad


def test_log_ratios_are_teacher_minus_student_per_episode():
    teacher = LocalTeacher(loaded(5, spread=0.5), vocab_size=VOCABULARY)
    ratios = log_ratios(teacher, TRAJECTORIES)
    assert [len(values) for values in ratios.values()] == [one.num_sampled for one in TRAJECTORIES]
    first = TRAJECTORIES[0]
    expected = teacher.score([first]).numpy() - first.logprobs[first.sampled]
    assert ratios[f"{first.example_id}/0"] == pytest.approx(expected.tolist(), abs=1e-3)


def test_a_row_beyond_the_context_is_refused():
    teacher = LocalTeacher(loaded(5), vocab_size=VOCABULARY, prompt=lambda trajectory: [[1] * 2000])
    with pytest.raises(ValueError, match="reads 1024 tokens at most, but the episode of toy_sums/train-1 has 2007"):
        teacher.score(TRAJECTORIES)


# What does not fit is refused with the first difference.


def with_tokenizer(change):
    other = loaded(2, "teacher")
    tokenizer = copy.deepcopy(other.tokenizer)
    change(tokenizer)
    return LoadedModel(other.model, tokenizer, "teacher")


def refusal(teacher, **keywords):
    with pytest.raises(ValueError) as caught:
        require_compatible(loaded(1, "student"), teacher, **{"max_tokens": 100, **keywords})
    text = str(caught.value)
    assert "the teacher teacher does not fit the student student" in text
    return text


def test_a_model_of_the_same_family_is_accepted():
    require_compatible(loaded(1), loaded(2, hidden=32), max_tokens=1024)


def test_a_teacher_may_know_more_tokens():
    teacher = with_tokenizer(lambda tokenizer: tokenizer.add_tokens(["<new>"]))
    teacher.model.resize_token_embeddings(len(teacher.tokenizer), mean_resizing=False)
    require_compatible(loaded(1), teacher, max_tokens=100)


def test_other_token_ids_are_refused():
    other = loaded(2, "teacher")
    tokenizer = tiny_tokenizer(tags_are_tokens=False)
    text = refusal(LoadedModel(other.model, tokenizer, "teacher"))
    assert "the student's token '<tool_call>' has id" in text
    assert "does not know it" in text


def test_another_end_of_sequence_token_is_refused():
    text = refusal(with_tokenizer(lambda tokenizer: setattr(tokenizer, "eos_token", "<|endoftext|>")))
    assert "eos_token is '<|im_end|>' for the student and '<|endoftext|>' for the teacher" in text


def test_another_chat_template_is_refused_with_the_first_difference():
    changed = TEMPLATE.replace("<|im_start|>assistant\\n' }}{% endif", "<|im_start|>assistant ' }}{% endif")
    assert changed != TEMPLATE
    text = refusal(with_tokenizer(lambda tokenizer: setattr(tokenizer, "chat_template", changed)))
    assert "their chat templates differ" in text
    assert "assistant\\n" in text
    assert "assistant '" in text


@pytest.mark.parametrize(
    ("text", "other"),
    [("'Tools:'", "'Functions:'"), ("'<|im_start|>user' }}{% endif %}", "'<|im_start|>tool' }}{% endif %}")],
)
def test_a_template_that_differs_in_tools_alone_is_refused(text, other):
    changed = TEMPLATE.replace(text, other)
    assert changed != TEMPLATE
    found = refusal(with_tokenizer(lambda tokenizer: setattr(tokenizer, "chat_template", changed)))
    assert "their chat templates differ" in found
    assert other.split("'")[1].split(">")[-1] in found


def test_a_vocabulary_that_is_too_small_is_refused():
    small = LoadedModel(tiny_llama(VOCABULARY - 1), tiny_tokenizer(), "teacher")
    assert f"embedding has {VOCABULARY - 1} rows, fewer than the {VOCABULARY} tokens" in refusal(small)


def test_a_context_that_is_too_short_is_refused():
    assert "the student reads 1024 tokens at most" in refusal(loaded(2, "teacher"), max_tokens=1025)
    text = refusal(loaded(2, "teacher"), max_tokens=1000, teacher_extra_tokens=100)
    assert "the teacher reads 1024 tokens at most, its episodes may have 1100" in text
    assert "teacher.demonstrations" in text
