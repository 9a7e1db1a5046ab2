"""Model families: appended tokens are the template's, turns read back, no text of a tool becomes markup."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from opd_env.engines.base import Request, ScriptedEngine
from opd_env.episode.rollouts import rollout
from opd_env.episode.store import load_trajectories, save_trajectories
from opd_env.episode.trajectory import StopReason, Trajectory
from opd_env.evaluation.counts import summarise
from opd_env.formats import TemplateFormat, get_format
from opd_env.formats.base import TokenKind
from opd_env.messages import Message, ToolCall, assistant, calls_of, system, tool_message, user
from opd_env.tasks import Example, Grade, Task, grade_number
from opd_env.tools import Toolbox
from tests.formats.families import FAMILIES, described, family_tokenizer

FORMATS: dict[str, TemplateFormat] = {name: get_format(family_tokenizer(name)) for name in FAMILIES}  # type: ignore[misc]
every_family = pytest.mark.parametrize("name", FAMILIES)
SCHEMA = {
    "type": "function",
    "function": {"name": "calculator", "description": "C.", "parameters": {"type": "object", "properties": {}}},
}
MARKUP = sorted({text for family in FAMILIES.values() for text in (*family.specials, *family.tags)})
words = st.text(max_size=12) | st.sampled_from([*MARKUP, "\n", " 4\n\n", "  ", '"', "\\", "'''", "```"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
names = st.sampled_from(["calculator", "search_2", "é"])
calls = st.builds(ToolCall, names, st.dictionaries(st.sampled_from(["x", "query", "ö"]), values, max_size=2))
THOUGHT = "<think>\nSix times seven.\n</think>\n\n"


class Doubles(Task):
    """Double a number with the calculator."""

    name = "doubles_of_families"
    version = "1"
    tools = ("calculator",)

    def __len__(self) -> int:
        return 40

    def example(self, index: int) -> Example:
        return Example(str(index), (user(f"Double {index}?"),), str(2 * index), difficulty=1)

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        return grade_number(answer, example.answer)


def survives(name: str, text: str) -> bool:
    """SentencePiece has one mark for a space and for itself, which DeepSeek's special tokens hold."""
    return FAMILIES[name].kind == "byte-level" or "\u2581" not in text


def play(chat: TemplateFormat, turns: Sequence[Message]) -> Trajectory:
    def respond(request: Request, turn: int) -> list[int]:
        return chat.render_assistant(turns[turn])

    return rollout(Doubles(), ScriptedEngine(respond, chat.stop_token_ids), chat, indices=[3]).trajectories[0]


@every_family
def test_the_format_is_found_from_the_template(name: str) -> None:
    assert FORMATS[name].name == FAMILIES[name].format
    assert FORMATS[name].stop_token_ids[0] == family_tokenizer(name).convert_tokens_to_ids(FAMILIES[name].end)


@every_family
def test_special_tokens_in_the_schema_of_a_tool_are_text(name: str) -> None:
    chat, ask = FORMATS[name], [user("What?")]

    def special(text: str) -> tuple[int, str]:
        parameters = {"type": "object", "properties": {f"x{text}": {"type": "string", "enum": [f"y{text}"]}}}
        function = {"name": "calculator", "description": f"C.{text}", "parameters": parameters}
        ids = chat.render_prompt(ask, [{"type": "function", "function": function}])
        return sum(index in chat.markup.values() for index in ids), chat.decode(ids)

    plain, _ = special("")
    for markup in chat.markup:
        found, shown = special(markup)
        assert found == plain
        assert shown == special("@@")[1].replace("@@", markup), "it is shown all the same"


def test_what_a_template_rewrites_is_named() -> None:
    found = {name: [note.split(":")[0] for note in chat.not_append_only] for name, chat in FORMATS.items()}
    assert {name: notes for name, notes in found.items() if notes} == {
        "Qwen 3": ["a further question after thinking"],
        "DeepSeek R1": ["tool results after thinking", "a further question after thinking"],
        "Qwen 3, not thinking": ["tool results", "a further question"],
        "Qwen 3 Thinking": ["tool results", "a further question", "a further question after thinking"],
        **{name: ["a further question"] for name in ("Mistral 0.3", "Mistral Nemo", "Mistral 2025")},
    }


@every_family
@given(said=words)
def test_the_user_may_speak_again(name: str, said: str) -> None:
    """The appended tokens are the template's, and nothing that the user says is markup."""
    chat, tokenizer = FORMATS[name], family_tokenizer(name)
    opening, answer = user("Well?"), assistant("Yes.")
    appended = chat.user_message(user(said))
    assert set(appended.kinds) == {TokenKind.SCAFFOLD}
    markup = tokenizer.convert_tokens_to_ids([*FAMILIES[name].specials, *FAMILIES[name].tags])
    markup = [index for index in markup if chat.decode([index]).strip()]
    harmless = chat.user_message(user("a")).ids
    assert [index for index in appended.ids if index in markup] == [index for index in harmless if index in markup]
    if not chat._text.holds_special(said) and not name.startswith("Qwen 3"):
        whole = tokenizer.apply_chat_template(
            [opening, answer, user(said)], add_generation_prompt=True, return_dict=False, add_special_tokens=False
        )
        assert [*chat.render_prompt([opening]), *chat.render_assistant(answer), *appended.ids] == whole


@every_family
def test_an_episode_is_what_the_template_writes(name: str) -> None:
    chat, tokenizer = FORMATS[name], family_tokenizer(name)
    thought = THOUGHT if name in ("Qwen 3", "Qwen 3 Thinking") else ""
    call = ToolCall("calculator", {"expression": "2*3"})
    turns = [assistant(thought, [call]), assistant(f"{thought}The answer is 6.")]
    trajectory = play(chat, turns)
    rewritten = 4 if name == "Qwen 3, not thinking" else 0  # the empty thinking block of the first turn
    assert (trajectory.correct, trajectory.stop_reason, trajectory.drift) == (True, StopReason.ANSWER, rewritten)
    output = trajectory.token_ids[trajectory.kind == TokenKind.TOOL_OUTPUT].tolist()
    assert chat.decode(output).removeprefix("calculator").strip().strip('"') == "6"  # Kimi's results are headed so
    if FAMILIES[name].format in ("tool_code", "pythonic"):
        return  # Gemma's template knows no tools, Python text has several spellings
    conversation = [user("Double 3?"), turns[0], tool_message("calculator", "6"), turns[1]]
    with Toolbox(["calculator"]) as toolbox:
        text = chat._template.render(*described(chat, conversation, toolbox.schemas), prompt=False)
    whole = tokenizer.encode(text, add_special_tokens=False)
    last = trajectory.token_ids[trajectory.rows[-1]].tolist()
    assert last == whole[: len(last)]
    assert not tokenizer.decode(whole[len(last) :]).strip()


@every_family
@given(written=st.lists(calls, min_size=1, max_size=3), text=words)
def test_calls_read_back_with_exact_spans(name: str, written: list[ToolCall], text: str) -> None:
    chat = FORMATS[name]
    text = "".join(char for char in text if char not in "<[{`").strip()
    assume(survives(name, repr(written) + text))
    if name == "Llama 2 tokenizer":  # it puts a space after every special token
        assume(not any(mark in repr(written) + text for mark in FAMILIES[name].specials))
    ids = chat.render_assistant(assistant(text, written))
    turn = chat.parse(ids)
    assert [(call.name, call.arguments, call.repairs) for call in turn.calls] == [
        (call.name, call.arguments, ()) for call in written
    ]
    assert turn.content == (text if chat.text_beside_calls else "")
    assert all(a.span.stop <= b.span.start for a, b in pairwise(turn.calls))
    # The tokens of the spans, and nothing else, are the calls: read alone they give the same calls.
    block = chat.decode([index for call in turn.calls for index in ids[call.span.start : call.span.stop]])
    assert [(call.name, call.arguments) for call in type(chat).parser(block, False, False).calls] == [
        (call.name, call.arguments) for call in written
    ]
    kinds = chat.kinds(ids, turn)
    assert kinds[-1] == TokenKind.TEXT
    assert (kinds == TokenKind.TOOL_CALL).sum() == sum(call.span.stop - call.span.start for call in turn.calls)


@every_family
@given(text=words)
def test_answers_read_back(name: str, text: str) -> None:
    text = "".join(char for char in text if char not in "<[{`").strip()
    assume(survives(name, text))
    turn = FORMATS[name].parse(FORMATS[name].render_assistant(assistant(text)))
    assert (turn.content, turn.calls) == (text, ())


@every_family
@given(contents=st.lists(words, min_size=1, max_size=3))
def test_nothing_that_a_tool_says_is_markup(name: str, contents: list[str]) -> None:
    assume(all(survives(name, content) for content in contents))
    chat = FORMATS[name]
    results = [tool_message(content, content) for content in contents]
    harmless = [tool_message("f", "") for _ in contents]
    markup = family_tokenizer(name).convert_tokens_to_ids([*FAMILIES[name].specials, *FAMILIES[name].tags])
    markup = [index for index in markup if chat.decode([index]).strip()]

    def marks(messages: list[Message]) -> list[int]:
        return [index for index in chat.render_tool_results(messages) if index in markup]

    assert marks(results) == marks(harmless)
    rendered = chat.tool_results(results)
    output = chat.decode([i for i, kind in zip(*rendered, strict=True) if kind is TokenKind.TOOL_OUTPUT])
    assert all(chat._scaffold.quote(content).strip() in output for content in contents)


def spaceless(text: str) -> str:
    """SentencePiece adds spaces and has one mark for a space and for itself."""
    return text.replace(" ", "").replace("\u2581", "")


@every_family
@given(question=words, instruction=words)
def test_nothing_in_a_prompt_is_markup(name: str, question: str, instruction: str) -> None:
    chat, tokenizer = FORMATS[name], family_tokenizer(name)
    messages = [system(instruction), user(question)]
    ids = chat.render_prompt(messages, [SCHEMA])
    given, tools = described(chat, messages, [SCHEMA])
    text = tokenizer.apply_chat_template(given, tools=tools or None, tokenize=False, add_generation_prompt=True)
    if FAMILIES[name].format != "tool_code":
        assert spaceless(chat.decode(ids)) == spaceless(text)
    harmless = chat.render_prompt([system("a"), user("b")], [SCHEMA])
    stops = chat.stop_token_ids
    assert [index for index in ids if index in stops] == [index for index in harmless if index in stops]


@every_family
@given(ids=st.lists(st.integers(-5, 400), max_size=50))
def test_any_tokens_give_a_turn_with_spans_inside(name: str, ids: list[int]) -> None:
    chat = FORMATS[name]
    turn = chat.parse(ids)
    for span in [*(call.span for call in turn.calls), *turn.thinking]:
        assert 0 <= span.start < span.stop <= len(ids)
    assert chat.parse_text(turn.text).content == turn.content
    assert chat.kinds(ids, turn).shape == (len(ids),)


def test_a_turn_that_begins_inside_thinking_is_read_so() -> None:
    chat = FORMATS["Qwen 3 Thinking"]
    call = ToolCall("calculator", {"expression": "1"})
    ids = chat.render_assistant(assistant(THOUGHT, [call]))
    assert chat.decode(ids).startswith("Six times seven.\n</think>\n\n<tool_call>")
    turn = chat.parse(ids)
    assert chat.decode(ids[slice(*turn.thinking[0])]) == "Six times seven.\n</think>"
    assert [call.name for call in turn.calls] == ["calculator"]
    cut = chat.parse(ids[:10])
    assert (cut.calls, cut.content, cut.thinking) == ((), "", ((0, 10),))


def test_repairs_are_made_only_when_asked_for() -> None:
    ids = FORMATS["Qwen 2.5"].render_assistant(assistant("<tool_call>{'name': 'f', 'arguments': {}}</tool_call>"))
    assert FORMATS["Qwen 2.5"].parse(ids).calls[0].error is not None
    (call,) = get_format(family_tokenizer("Qwen 2.5"), repair=True).parse(ids).calls
    assert (call.name, call.arguments, call.repairs) == ("f", {}, ("single quotes",))


def test_a_repaired_call_is_executed_and_counted_through_the_files(tmp_path: Path) -> None:
    turns = [
        assistant("<tool_call>{'name': 'calculator', 'arguments': {'expression': '2*3'},}</tool_call>"),
        assistant("The answer is 6."),
    ]
    played = {repair: play(get_format(family_tokenizer("Qwen 2.5"), repair=repair), turns) for repair in (False, True)}
    save_trajectories([played[True]], tmp_path / "repaired.parquet")
    (stored,) = load_trajectories(tmp_path / "repaired.parquet")
    assert stored.calls[0].repairs == ("single quotes", "trailing comma")
    assert summarise([stored]).repairs == {"single quotes": 1, "trailing comma": 1}
    assert (stored.calls[0].error, stored.calls[0].output) == (None, "6")
    assert summarise([played[False]]).repairs == {}
    assert played[False].calls[0].error is not None


def test_llama_writes_one_call_and_no_text_beside_it() -> None:
    chat = FORMATS["Llama 3"]
    message = assistant("I compute.", [ToolCall("calculator", {})])
    assert chat.decode(chat.render_assistant(message)) == '{"name": "calculator", "parameters": {}}<|eot_id|>'
    assert calls_of(message)
