"""BFCL's multi-turn problems: gold passes, changed gold is judged as the official checker does, and no text is code."""

from __future__ import annotations

import json
import random

import pytest

from opd_env.episode.env import ToolEnv
from opd_env.episode.expert import play_expert
from opd_env.formats import get_format
from opd_env.messages import ToolCall, assistant, user
from opd_env.tasks import load_task, require_trainable
from opd_env.tasks.function_calls.bfcl_backends import MODULES, Backends, functions_of
from opd_env.tasks.function_calls.bfcl_multi_turn import ADDED, CATEGORIES, BFCLMultiTurn, judge, read_call
from opd_env.tools import ToolErrorKind
from tests.tasks.bfcl_changes import changed, gold_calls, official_verdict
from tests.tiny import tiny_tokenizer

official = pytest.importorskip(
    "bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker",
    reason="needs the back ends of bfcl-eval: pip install --no-deps bfcl-eval mpmath",
)
CHAT = get_format(tiny_tokenizer())
FILES = {"GorillaFileSystem": {"root": {"home": {"type": "directory", "contents": {}}}}}


@pytest.fixture(scope="module", params=CATEGORIES)
def task(request):
    return BFCLMultiTurn(category=request.param)


def verdict(example, done):
    return judge(example.metadata["classes"], example.metadata["config"], done, example.metadata["gold"])


def test_all_gold_answers_pass_and_none_passes_without_its_calls(task):
    assert len(task) == len({example.id for example in task}) == 200
    for example in task:
        done = gold_calls(example)
        assert verdict(example, done) == (len(done), ""), example.id
        asking = [number for number, calls in enumerate(done) if calls]
        assert verdict(example, [[] if n == asking[-1] else c for n, c in enumerate(done)])[0] == asking[-1]
        assert verdict(example, done[:-1])[1].startswith("the episode ended before")


def test_changed_gold_is_judged_as_by_the_official_checker(task):
    rng = random.Random(0)
    verdicts = []
    for number, example in enumerate(task[::4]):
        done = changed(gold_calls(example), example, rng)
        passed, reason = verdict(example, done)
        assert (not reason) == official_verdict(official.multi_turn_checker, example, done, f"m{number}"), (
            example.id,
            reason,
            done,
        )
        assert (passed == len(done)) == (not reason)
        verdicts.append(not reason)
    assert 0 < sum(verdicts) < len(verdicts) / 2


def test_the_expert_plays_through_the_environment_with_exact_masks(task):
    for index in (0, 57, 199):
        trajectory = play_expert(task, index, CHAT)
        assert trajectory is not None
        assert trajectory.correct
        assert trajectory.drift == 0
        spoken = [turn.user for turn in trajectory.turns if turn.user is not None]
        assert spoken == task[index].metadata["later"]


def call_text(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_a_withheld_function_is_not_listed_until_the_user_adds_it():
    task = load_task("bfcl_multi_turn", "test", category="miss_func")
    env = ToolEnv(task)
    _, info = env.reset(options={"index": 0})
    names = [schema["function"]["name"] for schema in info["tools"]]
    assert "sort" not in names
    assert "grep" in names
    observation = ""
    for _ in range(3):
        observation, *_ = env.step("I can't.")
    assert observation.endswith(ADDED)
    assert '"name": "sort"' in observation
    *_, info = env.step(call_text("sort", file_name="x"))
    assert info["calls"][0].result.ok


def test_functions_of_an_episode_share_its_state_and_the_next_episode_begins_anew():
    task = BFCLMultiTurn()
    env = ToolEnv(task)
    for _ in range(2):
        env.reset(options={"index": 0})
        assert env.step(call_text("mkdir", dir_name="new"))[4]["calls"][0].result.ok
        assert '"new"' in env.step(call_text("ls"))[0]
        assert env.step(call_text("mkdir", dir_name="new"))[4]["calls"][0].result.content.startswith('{"error"')


def test_a_broken_call_is_an_error_that_the_student_reads_and_the_episode_goes_on():
    env = ToolEnv(BFCLMultiTurn())
    env.reset(options={"index": 0})
    _, _, terminated, truncated, info = env.step(call_text("cd", fodler="x"))
    assert not terminated
    assert not truncated
    assert info["calls"][0].result.error is ToolErrorKind.EXCEPTION
    assert "Error during execution" in info["calls"][0].result.content
    assert env.step(call_text("rm_rf"))[4]["calls"][0].result.error is ToolErrorKind.UNKNOWN_TOOL
    assert env.step("<tool_call>{")[4]["calls"][0].result.error is ToolErrorKind.UNTERMINATED


def test_what_the_grader_reads_are_the_calls_between_the_users_messages():
    task = BFCLMultiTurn()
    example = task[0]
    turns = []
    for calls in gold_calls(example):
        turns += [*(assistant("", [one]) for one in calls), assistant("Done."), user("And?")]
    assert task.grade(example, "Done.", turns[:-1]).correct
    early = task.grade(example, "Done.", turns[:3])
    assert not early.correct
    assert early.reason.startswith("the episode ended before")
    assert task.grade(example, None, ()).scores == {"turns_passed": 0.0}


@pytest.mark.parametrize(
    "name", ["__init__", "_load_scenario", "__class__", "eval", "exit", "ls; rm", "root", "_current_dir", ""]
)
def test_only_documented_functions_can_be_called(name):
    backends = Backends(["GorillaFileSystem"], FILES)
    before = backends.states()
    assert backends.execute(name) == f"Error during execution: name {name!r} is not defined"
    assert backends.states() == before


def test_arguments_are_values_never_code():
    backends = Backends(["GorillaFileSystem"], FILES)
    text = "__import__('os').system('echo')"
    assert backends.execute("echo", content=text) == json.dumps({"terminal_output": text})
    for gold in ("cd(folder=__import__('os'))", "a.b()", "cd(", "1", "cd(folder=f())"):
        with pytest.raises(ValueError, match="not a call with literal arguments"):
            read_call(gold)


def test_calls_that_would_hold_the_process_are_refused():
    backends = Backends(["MathAPI"], {})
    for name, arguments in (
        ("power", {"base": 9, "exponent": 10**9}),
        ("logarithm", {"value": 3, "base": 2, "precision": 10**9}),
        ("square_root", {"number": 2, "precision": 10**12}),
        ("round_number", {"number": 2, "decimal_places": -(10**12)}),
    ):
        assert backends.execute(name, **arguments).endswith("is more than 1000")
    assert backends.execute("power", base=2, exponent=10) == '{"result": 1024}'


def test_precision_is_put_back():
    import mpmath

    before = mpmath.mp.dps
    Backends(["MathAPI"], {}).execute("logarithm", value=3, base=2, precision=50)
    assert mpmath.mp.dps == before


def test_a_function_that_changes_what_it_was_given_does_not_change_the_record():
    backends = Backends(["TwitterAPI"], {"TwitterAPI": {"username": "a", "password": "b", "authenticated": True}})
    tags = ["#x"]
    backends.execute("post_tweet", content="hi", tags=tags, mentions=[])
    backends.execute("mention", tweet_id=0, mentioned_usernames=["c"])
    backends.states()["TwitterAPI"]["tweets"][0]["tags"].append("#y")
    assert tags == ["#x"]


def test_hostile_arguments_are_answered_and_judged():
    task = BFCLMultiTurn()
    example = task[0]
    nested = []
    for _ in range(500):
        nested = [nested]
    for value in (None, nested, {"a": 1}, "", "..", "/", 10**400, float("inf"), "\ud800"):
        done = [[ToolCall("mv", {"source": "document", "destination": value}), ToolCall("cd", {"folder": value})]]
        assert verdict(example, done)[0] == 0


def test_it_is_for_evaluation_only_and_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="nothing of this task may be trained on"):
        require_trainable(BFCLMultiTurn())
    with pytest.raises(ValueError, match=r"no category is named 'mis_func' \(did you mean 'miss_func'"):
        BFCLMultiTurn(category="mis_func")
    with pytest.raises(ValueError, match=r"no back end is named 'MathApi' \(did you mean 'MathAPI'"):
        Backends(["MathApi"], {})
    with pytest.raises(FileNotFoundError, match=r"no file .*BFCL_v4_multi_turn_base\.json"):
        BFCLMultiTurn(path=tmp_path)
    assert sum(len(functions_of([name])) for name in MODULES) == 128
