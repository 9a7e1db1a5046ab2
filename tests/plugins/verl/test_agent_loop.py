"""Tasks as verl's agent loops: played by verl's own workers, on a CPU, with servers that are not there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("verl", reason="needs verl: make test-verl")

from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.trainer.ppo.metric_utils import process_validation_metrics

from opd_env.engines.base import GREEDY, Completion
from opd_env.engines.local import LocalEngine
from opd_env.engines.models import load_model
from opd_env.episode.env import ToolEnv
from opd_env.episode.rollouts import rollout
from opd_env.episode.trajectory import StopReason
from opd_env.formats import get_format
from opd_env.messages import assistant
from opd_env.plugins.verl.examples import example_rows
from opd_env.tasks import load_task
from tests.formats.families import family_tokenizer
from tests.plugins.verl.verl_worker import (
    CHAT,
    PROMPT,
    RESPONSE,
    ROWS,
    TASK,
    PolicyEngine,
    Server,
    assert_same,
    batch_of,
    call,
    expected,
    play,
    response_of,
    verl_config,
)


@pytest.mark.parametrize("response", [RESPONSE, 120])
def test_verls_worker_plays_the_kits_own_episodes(config: Any, response: int) -> None:
    """Tool errors, calls that cannot be read, cut turns, a user who speaks again: all tokens, masks and grades."""
    config = config.copy()
    config.actor_rollout_ref.rollout.response_length = response
    batch = play(config, Server(), ROWS)
    trajectories = [expected(index, response) for index in range(len(ROWS))]
    for row, trajectory in enumerate(trajectories):
        assert_same(batch, row, trajectory)
    ends = {trajectory.stop_reason for trajectory in trajectories}
    assert {StopReason.ANSWER, StopReason.MAX_ERRORS if response == RESPONSE else StopReason.EPISODE_LENGTH} <= ends
    assert {call.error for one in trajectories for call in one.calls} > {None, "invalid_json", "schema", "unknown_tool"}
    assert any(turn.user for one in trajectories for turn in one.turns)


def test_a_model_plays_the_same_episodes(tmp_path: Path) -> None:
    """The packaged student, which calls its calculator, sampled by the kit's engine behind verl's worker."""
    loaded = load_model("packaged:student")
    chat, task = get_format(loaded.tokenizer), load_task("arithmetic")
    engine = LocalEngine(loaded.model, chat.stop_token_ids, chat.vocab_size)

    def respond(ids: list[int], params: dict[str, Any]) -> dict[str, Any]:
        (turn,) = engine.generate([ids], replace(GREEDY, max_tokens=params["max_tokens"]))
        return {"token_ids": turn.token_ids, "log_probs": turn.logprobs}

    config = verl_config(tmp_path, "data.max_response_length=250", tokenizer=loaded.tokenizer)
    batch = play(config, Server(respond), example_rows("arithmetic")[:2], validate=True)
    found = rollout(task, engine, chat, indices=range(2), sampling=GREEDY).trajectories
    assert sum(len(one.calls) for one in found) > 0
    for row, trajectory in enumerate(found):
        start, part = trajectory.turns[0].start, response_of(batch, row)
        assert batch.batch["responses"][row, part].tolist() == trajectory.token_ids[start:].tolist()
        assert batch.batch["response_mask"][row, part].tolist() == trajectory.sampled[start:].tolist()
        logprobs = batch.batch["rollout_log_probs"][row, part]
        torch.testing.assert_close(logprobs, torch.from_numpy(trajectory.logprobs[start:]), atol=1e-4, rtol=0)
        assert batch.batch["rm_scores"][row].sum() == trajectory.correct


def test_limits_of_the_agent_loop_file_hold(config: Any, builtin_loop: None, tmp_path: Path) -> None:
    file = tmp_path / "loops.yaml"
    file.write_text(
        "- {name: opd_env, _target_: opd_env.plugins.verl.EpisodeLoop, limits: {max_turns: 2, max_turn_tokens: 90}}\n"
    )
    config = config.copy()
    config.actor_rollout_ref.rollout.agent.agent_loop_config_path = str(file)
    batch = play(config, Server(), ROWS[:12])
    trajectories = [expected(index, max_turns=2, max_turn_tokens=90) for index in range(12)]
    for row, trajectory in enumerate(trajectories):
        assert_same(batch, row, trajectory)
    assert {StopReason.MAX_TURNS, StopReason.TURN_LENGTH} <= {one.stop_reason for one in trajectories}


def test_a_server_is_asked_for_what_the_format_and_the_limits_say(config: Any) -> None:
    server = Server()
    batch = play(config, server, ROWS[:6], validate=True)
    assert len({request["id"] for request in server.requests}) == 6, "an episode stays on one server"
    for request in server.requests:
        assert tuple(request["stop_token_ids"]) == CHAT.stop_token_ids
        assert request["temperature"] == config.actor_rollout_ref.rollout.val_kwargs.temperature == 0
        assert len(request["prompt_ids"]) + request["max_tokens"] <= PROMPT + RESPONSE
    turns = sum(batch.non_tensor_batch["__num_turns__"]) / 2
    assert turns == len(server.requests)
    assert sum(one["num_preempted"] for one in batch.meta_info["metrics"]) == turns
    assert (batch.non_tensor_batch["min_global_steps"] <= batch.non_tensor_batch["max_global_steps"]).all()
    assert len({*batch.non_tensor_batch["max_global_steps"]}) == 6


def test_verls_validation_averages_what_the_loop_tells(config: Any) -> None:
    batch = play(config, Server(), ROWS, validate=True)
    told = {key: list(batch.non_tensor_batch[key]) for key in batch.meta_info["reward_extra_keys"]}
    found = process_validation_metrics([TASK] * len(ROWS), [str(row) for row in range(len(ROWS))], told)[TASK]
    trajectories = [expected(index) for index in range(len(ROWS))]
    assert found["acc"]["mean@1"] == pytest.approx(np.mean([one.correct for one in trajectories]))
    assert found["calls"]["mean@1"] == pytest.approx(np.mean([len(one.calls) for one in trajectories]))
    assert "stop_reason" not in found


def test_an_episode_without_log_probs_has_none(config: Any) -> None:
    config = config.copy()
    config.actor_rollout_ref.rollout.calculate_log_probs = False
    batch = play(config, Server(), ROWS[:2])
    assert "rollout_log_probs" not in batch.batch
    assert (
        batch.batch["response_mask"][0, response_of(batch, 0)].tolist()
        == expected(0).sampled[expected(0).turns[0].start :].astype(int).tolist()
    )


def test_a_slow_tool_holds_no_other_episode(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four episodes wait for one another in their tools; if one held another, none would ever go on."""
    together, step = threading.Barrier(4), ToolEnv.step
    waited: set[ToolEnv] = set()

    def slow_step(env: ToolEnv, action: str) -> Any:
        if env not in waited:
            waited.add(env)
            together.wait(60)
        return step(env, action)

    monkeypatch.setattr(ToolEnv, "step", slow_step)
    batch = play(config, Server(), ROWS[:4])
    monkeypatch.undo()
    for row in range(4):
        assert_same(batch, row, expected(row))


def test_environments_are_kept_for_the_next_step(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their tools' processes, which take long to start."""
    init = ToolEnv.__init__
    made: list[ToolEnv] = []

    def counted(env: ToolEnv, *arguments: Any, **options: Any) -> None:
        made.append(env)
        init(env, *arguments, **options)

    monkeypatch.setattr(ToolEnv, "__init__", counted)

    async def run() -> None:
        worker = AgentLoopWorker(config, Server())
        for first in (0, 3, 6):
            await worker.generate_sequences(batch_of(ROWS[first : first + 3]))

    asyncio.run(run())
    assert len(made) == 3


@pytest.mark.parametrize("when", ["sampling", "a tool runs"])
def test_a_cancelled_episode_asks_no_more_and_gives_its_tools_back(
    config: Any, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[ToolEnv] = []
    running, go_on = threading.Event(), threading.Event()
    step, close = ToolEnv.step, ToolEnv.close

    def slow_step(env: ToolEnv, action: str) -> Any:
        running.set()
        go_on.wait(20)
        return step(env, action)

    monkeypatch.setattr(ToolEnv, "close", lambda env: (closed.append(env), close(env))[1])
    monkeypatch.setattr(ToolEnv, "step", slow_step)
    turn = CHAT.render_assistant(assistant(call("calculator", '{"expression": "1"}')))
    server = Server(lambda ids, params: {"token_ids": turn, "log_probs": [-1.0] * len(turn)})
    if when == "sampling":
        monkeypatch.setattr(server, "generate", lambda *_, **__: (running.set(), asyncio.sleep(20))[1])

    async def run() -> None:
        worker = AgentLoopWorker(config, server)
        task = asyncio.create_task(worker.generate_sequences(batch_of(ROWS[:1])))
        while not running.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(run())
    assert len(closed) == 1
    assert len(server.requests) == (when != "sampling")


def test_where_a_turns_spelling_is_rewritten_the_first_row_is_learnt_from(tmp_path: Path) -> None:
    tokenizer = family_tokenizer("Qwen 3")
    tokenizer.pad_token = "<|endoftext|>"
    chat = get_format(tokenizer)
    text = "<think>Hm.</think>" + call("calculator", '{"expression": "1"}')  # without the template's line breaks
    odd = [*tokenizer.encode(text, add_special_tokens=False), chat.stop_token_ids[0]]
    answer = chat.render_assistant(assistant("The answer is 427."))

    def sample(ids: Sequence[int]) -> tuple[list[int], list[float]]:
        turn = answer if "<tool_response>" in chat.decode(ids) else odd
        return turn, [-0.5] * len(turn)

    class Two(PolicyEngine):
        def step(self) -> list[Completion]:
            queue, self._queue = self._queue, []
            return [Completion(one.episode, *sample(one.token_ids), truncated=False) for one in queue]

    config = verl_config(tmp_path, "data.max_prompt_length=2000", tokenizer=tokenizer)
    server = Server(lambda ids, params: dict(zip(("token_ids", "log_probs"), sample(ids), strict=True)))
    batch = play(config, server, example_rows("arithmetic")[:1])
    (whole,) = rollout(load_task("arithmetic"), Two(), chat, indices=[0]).trajectories
    first, start = whole.rows[0], whole.turns[0].start
    assert len(whole.rows) == 2
    assert whole.correct
    assert batch.batch["responses"][0, response_of(batch, 0)].tolist() == odd
    assert odd == whole.token_ids[start : first.stop].tolist()
    assert batch.batch["response_mask"].sum() == len(odd)
    assert batch.batch["rm_scores"][0, len(odd) - 1] == 1
    assert batch.non_tensor_batch["left_out_tokens"] == [len(answer)]
