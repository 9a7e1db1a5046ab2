"""The packaged tokenizer, teacher and student: what is shipped is small, loads, and does what its record says."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from opd_env.engines.local import LocalEngine
from opd_env.engines.models import PACKAGED, load_model
from opd_env.episode.expert import play_expert
from opd_env.evaluation.run import evaluate
from opd_env.formats import get_format
from opd_env.formats.base import TokenKind
from opd_env.messages import ToolCall, assistant, system, tool_message, user
from opd_env.tasks import load_task
from opd_env.tools import Toolbox

NAMES = ("teacher", "student")
LEVELS = (1, 2, 3)
RESULTS = json.loads((PACKAGED / "results.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("packaged:student").tokenizer


@pytest.fixture(scope="module")
def schemas():
    with Toolbox(["calculator"]) as toolbox:
        return toolbox.schemas


@pytest.fixture(scope="module")
def pretrain():
    path = Path(__file__).parents[1] / "scripts" / "pretrain.py"
    spec = importlib.util.spec_from_file_location("pretrain", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretrain"] = module
    spec.loader.exec_module(module)
    return module


# The tokenizer


@given(st.text())
@settings(deadline=None)
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_markup_is_one_token_each_and_a_turn_ends_with_the_end_of_text_id(tokenizer):
    markup = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tags = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    for token in markup + tags:
        assert len(tokenizer.encode(token)) == 1, token
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert get_format(tokenizer).stop_token_ids[0] == tokenizer.eos_token_id


def test_every_digit_is_a_token_of_its_own(tokenizer):
    pieces = [tokenizer.decode([index]) for index in tokenizer.encode("120 apples at 7.25, i.e. 12*34-5/67")]
    assert [piece for piece in pieces if re.search(r"\d", piece)] == list("1207251234567")


def test_teacher_and_student_share_one_tokenizer():
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (PACKAGED / "teacher" / file).read_bytes() == (PACKAGED / "student" / file).read_bytes()


# The chat template


def test_the_template_lists_tools_by_name_and_argument_names(tokenizer, schemas):
    conversation = [
        user("What is 6 * 7?"),
        assistant("", [ToolCall("calculator", {"expression": "6*7"}), ToolCall("calculator", {"expression": "1+1"})]),
        tool_message("calculator", "42"),
        tool_message("calculator", "2"),
        assistant("The answer is 42."),
    ]
    assert tokenizer.apply_chat_template(conversation, tools=schemas, tokenize=False) == (
        "<|im_start|>system\nTools: calculator(expression)<|im_end|>\n"
        "<|im_start|>user\nWhat is 6 * 7?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1+1"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n42\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nThe answer is 42.<|im_end|>\n"
    )


def test_a_system_message_stands_before_the_tools_and_without_either_there_is_none(tokenizer, schemas):
    def render(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    assert render([system("Be brief."), user("Hi")], tools=schemas).startswith(
        "<|im_start|>system\nBe brief.\n\nTools: calculator(expression)<|im_end|>\n<|im_start|>user\nHi"
    )
    assert render([user("Hi")], add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


words = st.text(max_size=12)
turns = st.lists(
    st.tuples(
        words,
        st.lists(st.builds(ToolCall, words, st.dictionaries(words, words | st.integers(), max_size=2)), max_size=2),
        st.lists(words, max_size=2),
    ),
    max_size=4,
)


@given(st.booleans(), words, words, turns)
@settings(deadline=None)
def test_a_longer_conversation_continues_the_rendering_of_a_shorter_one(
    tokenizer, schemas, with_system, opening, question, rest
):
    conversation = [*([system(opening)] if with_system else []), user(question)]
    for content, calls, outputs in rest:
        before = tokenizer.apply_chat_template(conversation, tools=schemas, tokenize=False, add_generation_prompt=True)
        conversation.append(assistant(content, calls))
        after = tokenizer.apply_chat_template(conversation, tools=schemas, tokenize=False)
        assert after.startswith(before)
        conversation += [tool_message("calculator", output) for output in outputs] or [user(question)]


def test_what_the_models_were_trained_on_is_the_template_of_the_whole_conversation(tokenizer, schemas):
    task = load_task("arithmetic", levels=LEVELS)
    chat = get_format(tokenizer)
    for index in range(20):
        example = task[index]
        played = play_expert(task, index, chat)
        whole = tokenizer.apply_chat_template([*example.messages, *task.expert(example)], tools=schemas, tokenize=False)
        assert played.token_ids.tolist() == tokenizer.encode(whole.removesuffix("\n"))
        assert played.drift == 0
        written = [chat.decode(played.token_ids[turn.start : turn.stop].tolist()) for turn in played.turns]
        assert written == re.findall(r"assistant\n(.*?<\|im_end\|>)", whole, flags=re.DOTALL)
        assert (played.kind[played.sampled] != TokenKind.PROMPT).all()


# The models


def test_both_models_together_are_under_five_megabytes():
    assert sum(file.stat().st_size for file in PACKAGED.rglob("*") if file.is_file()) < 5_000_000


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_stored_in_half_precision_and_loads_in_single(name, tokenizer):
    with safe_open(PACKAGED / name / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.float16}  # noqa: SIM118
    model = load_model(f"packaged:{name}").model
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer)
    assert RESULTS[name]["parameters"] == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_recorded_accuracy_is_met_again(name):
    loaded = load_model(f"packaged:{name}")
    chat = get_format(loaded.tokenizer)
    engine = LocalEngine(loaded.model, chat.stop_token_ids, chat.vocab_size)
    task = load_task("arithmetic", split="test", levels=LEVELS)
    summary = evaluate(task, engine, chat, limit=60).summary
    recorded = RESULTS[name]["test"]
    assert summary.accuracy.low <= recorded["accuracy"] <= summary.accuracy.high
    assert summary.drift == 0


def test_the_record_shows_a_teacher_that_knows_and_a_student_with_room_to_learn():
    teacher, student = (RESULTS[name]["test"] for name in NAMES)
    assert teacher["accuracy_ci"][0] > 0.9
    assert 0.15 < student["accuracy_ci"][0] < student["accuracy_ci"][1] < 0.45
    assert teacher["tool_call_validity"] > 0.98
    assert student["parse_rate"] > 0.9


# The script that makes them


def test_training_learns_and_stops_when_the_validation_episodes_are_right_enough(pretrain, tokenizer):
    task = load_task("arithmetic", levels=[1])
    chat = get_format(tokenizer)
    rows = pretrain.expert_rows(task, 16, chat, lambda: None)
    recipe = pretrain.Recipe(
        hidden=32, layers=1, heads=2, intermediate=32, steps=30, learning_rate=1e-2, stop_at=0.0, check_every=20,
        batch=16, warmup=1,
    )  # fmt: skip
    losses = []
    model = pretrain.build_model(recipe, tokenizer)
    steps = pretrain.train(model, recipe, rows, rows[:4], len(tokenizer), lambda step, loss, right: losses.append(loss))
    assert steps == len(losses) == 20
    assert losses[-1] < losses[0] / 2


def test_the_same_texts_give_the_packaged_tokenizer(pretrain, tokenizer):
    task = load_task("arithmetic", levels=pretrain.LEVELS)
    rebuilt = pretrain.build_tokenizer(pretrain.conversations(task, 3000, pretrain.build_tokenizer([])))
    assert rebuilt.get_vocab() == tokenizer.get_vocab()
