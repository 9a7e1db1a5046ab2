"""Tasks as verl's agent loops: played by verl's own workers, on a CPU, with servers that are not there."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("verl", reason="needs verl: make test-verl")

from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.trainer.distillation.losses import get_distillation_loss_fn
from verl.trainer.ppo.core_algos import get_kl_controller
from verl.trainer.ppo.metric_utils import process_validation_metrics
from verl.trainer.ppo.ray_trainer import apply_kl_penalty, compute_advantage
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.padding import left_right_2_no_padding

from opd_env.engine import GREEDY, Completion
from opd_env.env import ToolEnv
from opd_env.errors import UserError
from opd_env.formats import get_format
from opd_env.limits import RolloutLimits
from opd_env.local_engine import LocalEngine
from opd_env.messages import assistant
from opd_env.models import load_model
from opd_env.plugins.verl.examples import example_rows
from opd_env.rollouts import rollout
from opd_env.tasks import load_task
from opd_env.trainer.advantages import advantage
from opd_env.trajectory import StopReason, Trajectory
from tests.core.families import family_tokenizer
from tests.plugins.verl_worker import CHAT, TASK, PolicyEngine, Server, batch_of, call, play, verl_config

ROWS = example_rows(TASK)
PROMPT, RESPONSE = 200, 1500


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return verl_config(tmp_path_factory.mktemp("model"))


def expected(index: int, response: int = RESPONSE, task: str = TASK, **limits: int) -> Trajectory:
    """The kit's own rollout of an example, with the limits that verl's configuration means for it."""
    prompt = rollout(load_task(task), PolicyEngine(), CHAT, indices=[index]).trajectories[0].turns[0].start
    budget = RolloutLimits(**{"max_tokens": prompt + response, "max_turn_tokens": response} | limits)
    return rollout(load_task(task), PolicyEngine(), CHAT, indices=[index], limits=budget).trajectories[0]


def response_of(batch: Any, row: int) -> slice:
    return slice(0, int(batch.batch["attention_mask"][row, batch.batch["prompts"].shape[1] :].sum()))


def assert_same(batch: Any, row: int, trajectory: Trajectory) -> None:
    """A row of verl's batch is the trajectory: tokens, mask, log-probs, score; and padding is nowhere marked."""
    start, part = trajectory.turns[0].start, response_of(batch, row)
    prompt = batch.batch["prompts"][row]
    assert prompt[len(prompt) - start :].tolist() == trajectory.token_ids[:start].tolist()
    assert batch.batch["attention_mask"][row, : len(prompt)].sum() == start
    assert batch.batch["responses"][row, part].tolist() == trajectory.token_ids[start:].tolist()
    mask = batch.batch["response_mask"][row]
    assert mask[part].tolist() == trajectory.sampled[start:].tolist()
    assert mask[part.stop :].sum() == 0
    logprobs = batch.batch["rollout_log_probs"][row]
    assert logprobs[part].tolist() == trajectory.logprobs[start:].tolist()
    assert ((logprobs != 0) == mask.bool()).all(), "the policy's log-probs are never 0"
    scores = batch.batch["rm_scores"][row]
    assert scores[part.stop - 1] == scores.sum() == trajectory.correct
    assert batch.non_tensor_batch["stop_reason"][row] == trajectory.stop_reason


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


def test_limits_of_the_agent_loop_file_hold(config: Any, tmp_path: Path) -> None:
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


@pytest.fixture(autouse=True)
def builtin_loop() -> Iterator[None]:
    """verl's registry as the plug-in left it: a worker that reads a file of agent loops changes it for good."""
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry

    before = dict(_agent_loop_registry)
    yield
    _agent_loop_registry.clear()
    _agent_loop_registry.update(before)


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


def distilling(config: Any, loss_mode: str) -> Any:
    config = config.copy()
    config.distillation.enabled = True
    config.distillation.distillation_loss.update({"loss_mode": loss_mode, "use_policy_gradient": True})
    config.distillation.teacher_models.teacher_model.update({"key": "default", "model_path": "teacher"})
    return config


def test_the_advantages_of_verls_batch_are_those_of_the_kits_trajectories(config: Any) -> None:
    """verl's worker asks its teacher, verl pads, packs and shifts; the loss must meet the same tokens again."""
    config = distilling(config, "opd_plus_centred_jsd")

    def teacher_logprobs(ids: list[int]) -> list[float]:
        return [-((7 * position + token) % 11) / 4 for position, token in enumerate(ids)]

    def score(ids: list[int], _: Any) -> dict[str, Any]:  # as verl's servers answer: the first token has none
        scores = [[value] for value in [*teacher_logprobs(ids)[1:], 0.0]]
        told = {"prompt_ids": [[token] for token in [*ids[1:], 0]], "prompt_logprobs": scores}
        return {"token_ids": [0], "extra_fields": told}

    batch = play(config, Server(), ROWS[:8], teacher=Server(score))
    data = left_right_2_no_padding(batch.batch)
    data["old_log_probs"] = data["rollout_log_probs"]
    settings = omega_conf_to_dataclass(config.distillation)
    losses, _ = get_distillation_loss_fn("opd_plus_centred_jsd")(None, settings, {}, data)
    trajectories = [expected(index) for index in range(8)]
    sampled = [one.sampled for one in trajectories]
    teacher = [np.asarray(teacher_logprobs(one.token_ids.tolist()), dtype=np.float32) for one in trajectories]
    log_ratio = [(t - one.logprobs)[mask] for t, one, mask in zip(teacher, trajectories, sampled, strict=True)]
    wanted = advantage(torch.from_numpy(np.concatenate(log_ratio)), "jsd", "opd_plus_centred")
    found = -losses[data["response_mask"].bool()]
    torch.testing.assert_close(found, wanted)


def test_an_estimators_rewards_are_log_u_without_the_grade(config: Any) -> None:
    """verl adds log-ratios to the score before our estimator reads them: the grade must not stand among them."""
    config = config.copy()
    config.algorithm.adv_estimator = "opd_plus_jsd"
    config.algorithm.update({"use_kl_in_reward": True, "kl_ctrl": {"type": "fixed", "kl_coef": 1.0}})
    batch = play(config, Server(), ROWS)
    assert batch.non_tensor_batch["acc"].sum() > 0
    data = batch.batch
    data["token_level_scores"], data["old_log_probs"] = data["rm_scores"], data["rollout_log_probs"]
    data["ref_log_prob"] = -data["responses"] / 100
    batch, _ = apply_kl_penalty(batch, get_kl_controller(config.algorithm.kl_ctrl), config.algorithm.kl_penalty)
    mask = data["response_mask"].bool()
    found = compute_advantage(batch, config.algorithm.adv_estimator, config=config.algorithm).batch["advantages"]
    wanted = advantage(data["ref_log_prob"] - data["old_log_probs"], "jsd", "opd_plus", mask=mask)
    torch.testing.assert_close(found, wanted)
    config.algorithm.kl_ctrl.kl_coef = 0.001
    with pytest.raises(UserError, match=r"set algorithm.kl_ctrl.kl_coef=1 \(got 0.001\)"):
        compute_advantage(batch, config.algorithm.adv_estimator, config=config.algorithm)


@pytest.mark.parametrize("changes", [{"top_p": 0.9}, {"top_k": 50}, {"temperature": 0.7}])
def test_distilling_from_a_truncated_distribution_is_refused(config: Any, changes: dict[str, float]) -> None:
    play(config, Server(), ROWS[:1])
    config = distilling(config, "opd_plus_jsd")
    config.actor_rollout_ref.rollout.update(changes)
    error = failing(config, teacher=Server())
    assert isinstance(error, UserError)
    assert "whole distribution" in str(error)


def failing(config: Any, row: dict[str, Any] = ROWS[0], server: Server | None = None, **options: Any) -> BaseException:
    """What verl's worker raises; its trainer logs it and leaves the prompt out."""
    with pytest.raises(Exception) as caught:
        play(config, server or Server(), [row], **options)
    cause = caught.value
    while cause.__cause__ is not None:  # hydra wraps what an agent loop's constructor raises
        cause = cause.__cause__
    return cause


def test_a_prompt_that_is_too_long_is_an_error_and_never_cut(config: Any) -> None:
    config = config.copy()
    config.actor_rollout_ref.rollout.prompt_length = expected(0).turns[0].start - 1
    server = Server()
    error = failing(config, server=server)
    assert isinstance(error, UserError)
    assert f"has {expected(0).turns[0].start} tokens" in str(error)
    assert "data.max_prompt_length" in str(error)
    assert not server.requests


@pytest.mark.parametrize("changes", [{"id": "double-9"}, {"version": "0"}])
def test_a_data_file_of_another_version_of_the_task_is_refused(config: Any, changes: dict[str, str]) -> None:
    row = {**ROWS[3], "extra_info": {**ROWS[3]["extra_info"], **changes}}
    error = failing(config, row)
    assert isinstance(error, UserError)
    assert "write the data file again" in str(error)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"token_ids": [], "stop_reason": "aborted"}, "gave a turn up"),
        ({"token_ids": [65, 66], "log_probs": [-1.0, -1.0]}, "ended a turn after 2 of"),
        ({"token_ids": [65] * 1501, "log_probs": [-1.0] * 1501}, "ended a turn after 1501 of"),
        ({"token_ids": [65] * 1500, "log_probs": [-1.0]}, "1500 tokens .* 1 log-probs"),
        ({"token_ids": [65] * 1500, "log_probs": [float("nan")] * 1500}, "log-prob is finite"),
    ],
)
def test_what_a_server_must_not_answer_fails_the_episode(config: Any, answer: dict[str, Any], message: str) -> None:
    error = failing(config, server=Server(lambda ids, params: answer))
    assert re.search(message, str(error))


def test_a_tool_that_fails_by_itself_fails_the_episode_and_nothing_is_learnt(config: Any) -> None:
    turn = CHAT.render_assistant(assistant(call("broken", "{}")))
    server = Server(lambda ids, params: {"token_ids": turn, "log_probs": [-1.0] * len(turn)})
    error = failing(config, server=server)
    assert "'broken' failed by no fault of the student" in str(error)
    assert len(server.requests) == 1


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


@pytest.mark.parametrize("family", ["Qwen 3", "Qwen 3, not thinking"])
def test_a_template_that_rewrites_what_was_sampled_is_refused(family: str, tmp_path: Path) -> None:
    """Qwen 3 rewrites only where the user speaks again after thinking, which in ``arithmetic`` nobody does."""
    tokenizer = family_tokenizer(family)
    tokenizer.pad_token = "<|endoftext|>"
    config = verl_config(tmp_path, "data.max_prompt_length=2000", tokenizer=tokenizer)
    chat = get_format(tokenizer)
    turn = chat.render_assistant(assistant("The answer is 6."))
    server = Server(lambda ids, params: {"token_ids": turn, "log_probs": [-1.0] * len(turn)})
    error = failing(config, ROWS[1], server)
    assert isinstance(error, UserError)
    assert "rewrites the conversation" in str(error)
    arithmetic = example_rows("arithmetic")[0]
    if family == "Qwen 3":
        assert play(config, server, [arithmetic]).non_tensor_batch["stop_reason"] == ["answer"]
    else:
        assert "rewrites the conversation: tool results" in str(failing(config, arithmetic, server))


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


def test_arguments_of_the_chat_template_are_refused(config: Any) -> None:
    config = config.copy()
    config.data.apply_chat_template_kwargs = {"enable_thinking": False}
    assert "enable_thinking" in str(failing(config))
