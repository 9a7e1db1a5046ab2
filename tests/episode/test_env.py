"""The environment as gymnasium sees it, and played by hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

from opd_env import RolloutLimits, StopReason, Task, ToolEnv, ToolError, ToolErrorKind, load_task, tool
from opd_env.messages import Message
from opd_env.tasks import Example, Grade

TASK = load_task("arithmetic")
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call>'


def make(**options: Any) -> gymnasium.Env[str, str]:
    return gymnasium.make("opd_env/ToolUse-v0", task=TASK, **options)


@pytest.mark.filterwarnings("ignore")
def test_it_passes_gymnasiums_checker() -> None:
    check_env(make(render_mode="ansi").unwrapped)
    check_env(ToolEnv(TASK, []))


def test_a_seed_draws_the_example_and_an_index_chooses_it() -> None:
    env = make(tools=["calculator"])
    first, info = env.reset(seed=3)
    again, _ = env.reset(seed=3)
    other, _ = env.reset()
    assert first == again != other
    assert info["tools"][0]["function"]["name"] == "calculator"
    _, chosen = env.reset(options={"index": 5})
    assert chosen["example"] == env.unwrapped.task[5]  # type: ignore[attr-defined]


def test_a_right_answer_is_rewarded_and_ends_the_episode() -> None:
    env = make(render_mode="ansi")
    env.reset(options={"index": 0})
    observation, reward, terminated, truncated, info = env.step(CALL)
    assert (observation, reward, terminated, truncated) == ("42", 0.0, False, False)
    assert info["calls"][0].result.ok
    answer = env.unwrapped.task[0].answer  # type: ignore[attr-defined]
    _, reward, terminated, truncated, info = env.step(f"The answer is {answer}.")
    assert (reward, terminated, truncated, info["stop_reason"]) == (1.0, True, False, StopReason.ANSWER)
    assert "[tool] 42" in str(env.render())
    with pytest.raises(RuntimeError, match=r"reset\(\)"):
        env.unwrapped.step("again")


def test_tool_output_is_never_graded() -> None:
    seen: list[Sequence[Message]] = []

    class Spy(Task):
        version = "1"
        tools = ("calculator",)

        def __len__(self) -> int:
            return 1

        def example(self, index: int) -> Example:
            return Example("0", ({"role": "user", "content": "?"},), "42")

        def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
            seen.append(turns)
            return Grade(answer == "42")

    env = ToolEnv(Spy())
    env.reset(seed=0)
    env.step(CALL)
    env.step("I do not know.")
    assert [message["role"] for message in seen[0]] == ["assistant", "assistant"]


def test_vector_environments_step_together_and_restart() -> None:
    envs = gymnasium.make_vec("opd_env/ToolUse-v0", num_envs=3, task="arithmetic")
    observations, _ = envs.reset(seed=1)
    assert len(set(observations)) == 3
    _, rewards, terminated, _, _ = envs.step(("no idea", CALL, "<tool_call>"))
    assert rewards.tolist() == [0, 0, 0]
    assert terminated.tolist() == [True, False, False]
    observations, *_ = envs.step(("x", CALL, CALL))
    assert observations[1] == "42"
    envs.close()


@given(st.lists(st.text() | st.just(CALL) | st.sampled_from(["<tool_call>", '<tool_call>{"name": "x"}</tool_call>'])))
def test_reset_and_step_never_raise_for_what_a_student_writes(turns: list[str]) -> None:
    env = ToolEnv(TASK, limits=RolloutLimits(max_turns=5, max_tool_calls=3, max_errors=2))
    env.reset(seed=0)
    for text in turns:
        observation, reward, terminated, truncated, info = env.step(text)
        assert observation in env.observation_space
        assert reward in (0.0, 1.0)
        assert not (terminated and truncated)
        if terminated or truncated:
            assert info["stop_reason"].terminated == terminated
            break


def test_unknown_tools_are_answered_with_a_typed_error() -> None:
    env = ToolEnv(TASK)
    env.reset(seed=0)
    observation, *_, info = env.step('<tool_call>{"name": "calculater", "arguments": {}}</tool_call>')
    assert info["calls"][0].result.error is ToolErrorKind.UNKNOWN_TOOL
    assert "calculator" in observation


def test_a_failing_sandbox_does_not_count_as_an_error_of_the_student() -> None:
    @tool
    def run(ill: bool) -> str:
        """Runs.

        Args:
            ill: whether the sandbox fails.
        """
        raise ToolError(ToolErrorKind.SANDBOX if ill else ToolErrorKind.EXCEPTION, "failed")

    env = ToolEnv(TASK, [run], limits=RolloutLimits(max_errors=2, max_turns=10))
    env.reset(seed=0)
    for ill, over in (("true", False), ("false", False), ("true", False), ("false", True)):
        *_, truncated, info = env.step(f'<tool_call>{{"name": "run", "arguments": {{"ill": {ill}}}}}</tool_call>')
        assert truncated == over
    assert info["stop_reason"] is StopReason.MAX_ERRORS


def test_time_ends_an_episode_before_its_calls_run() -> None:
    env = ToolEnv(TASK, limits=RolloutLimits(max_seconds=1e-9))
    env.reset(seed=0)
    *_, truncated, info = env.step(CALL)
    assert truncated
    assert (info["stop_reason"], info["calls"]) == (StopReason.TIME, [])


@pytest.mark.parametrize(
    ("imports", "name"),
    [
        ("import gymnasium, opd_env", "opd_env/ToolUse-v0"),
        ("import gymnasium; from opd_env import ToolEnv", "opd_env/ToolUse-v0"),
        ("from opd_env import ToolEnv; import gymnasium", "opd_env/ToolUse-v0"),
        ("import opd_env, gymnasium", "opd_env.episode.env:opd_env/ToolUse-v0"),
        ("import gymnasium, opd_env", "opd_env.episode.env:opd_env/ToolUse-v0"),
        ("import gymnasium", "opd_env.episode.env:opd_env/ToolUse-v0"),
    ],
)
def test_gymnasium_knows_the_environment(imports: str, name: str) -> None:
    code = f"{imports}\nprint(gymnasium.make({name!r}, task='arithmetic').reset(seed=0)[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_missing_task_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"needs a task, such as task='arithmetic'.*known: .*gsm8k"):
        gymnasium.make("opd_env/ToolUse-v0")


@pytest.mark.parametrize("limits", [{"max_turns": 0}, {"max_seconds": -1}, {"max_turn_tokens": 9, "max_tokens": 8}])
def test_impossible_limits_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="max_"):
        RolloutLimits(**limits)


def test_an_example_may_bring_its_own_tools() -> None:
    class PerExample(Task):
        version = "1"

        def __len__(self) -> int:
            return 2

        def example(self, index: int) -> Example:
            return Example(str(index), ({"role": "user", "content": "?"},), "42")

        def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
            return Grade(True)

        def tools_of(self, example: Example) -> Sequence[str]:
            return ["calculator"] if example.id == "1" else []

    env = ToolEnv(PerExample())
    for index, names in ((0, []), (1, ["calculator"]), (0, [])):
        _, info = env.reset(options={"index": index})
        assert [schema["function"]["name"] for schema in info["tools"]] == names
    _, info = ToolEnv(PerExample(), ["python"]).reset(options={"index": 0})
    assert info["tools"][0]["function"]["name"] == "python"
