"""Plays episodes through a chat server: the same environments and graders, without tokens.

Worked example::

    result = evaluate(load_task("gsm8k", "test"), ChatServer("https://api.openai.com/v1", "gpt-5"), limit=100)

``ToolEnv`` takes text. A turn that the server has split into text and calls is put together again, its calls as the
blocks that ``parse_hermes`` reads, so that validation, tools, limits and grades are exactly those of every other model.
The trajectories have turns, calls and grades, and empty token arrays: nothing in them is invented.

Test it alone: ``pytest tests/evaluation/test_chat_player.py``
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from opd_env.engines.base import SamplingParams
from opd_env.episode.env import PlayedCall, ToolEnv
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.play import episode_seed
from opd_env.episode.rollouts import EpisodeError
from opd_env.episode.trajectory import CallRecord, StopReason, Trajectory, TurnRecord
from opd_env.evaluation.chat_server import ChatServer, ContextFull, NativeCall, Reply, ServerFault, ServerRefused
from opd_env.tasks import Task
from opd_env.tools import Tool, ToolErrorKind

_NOT_IN_A_NAME = re.compile(r"[^a-zA-Z0-9_-]")
_LONGEST_NAME = 64
_MOST_FAULTS = 5
"""Episodes in a row (or as many as are played side by side) whose failure means that the server is down."""
_TAG = re.compile(r"<(?=/?(?:tool_call|think))")


def play_by_chat(
    task: Task,
    *,
    server: ChatServer,
    episodes: Iterable[tuple[int, int]],
    tools: Sequence[str | Tool] | None,
    limits: RolloutLimits,
    sampling: SamplingParams,
    seed: int,
    on_finished: Callable[[Trajectory], None],
) -> list[EpisodeError]:
    """Plays episodes side by side; as ``rollout``, but of a server.

    ``limits.max_tokens`` is held by the server's own count of tokens, where it tells one; ``limits.max_seconds`` counts
    the answers and the tools, not the pauses between tries.

    Returns:
        Episodes that the server, or the kit, failed to finish. They enter no rate; another run plays them again.

    Raises:
        ServerRefused: the server will not answer, or has failed too many episodes in a row.
    """
    server = replace(server)  # one of our own: closing it ends no other evaluation
    player = _Player(task, server, tools, limits, replace(sampling, max_tokens=limits.max_turn_tokens), seed)
    waiting = list(episodes)[::-1]
    errors: list[EpisodeError] = []
    in_a_row, most = 0, max(_MOST_FAULTS, server.concurrency)
    pool = ThreadPoolExecutor(server.concurrency, thread_name_prefix="opd-env-chat")
    playing: dict[Future[Trajectory], tuple[int, int]] = {}
    try:
        while waiting or playing:
            while waiting and len(playing) < server.concurrency:
                job = waiting.pop()
                playing[pool.submit(player.play, *job)] = job
            done = wait(playing, return_when=FIRST_COMPLETED).done
            # What has finished is handed over before a failure can end the evaluation.
            for future in sorted(done, key=lambda one: one.exception() is not None):
                index, sample = playing.pop(future)
                error = future.exception()
                if error is None:
                    in_a_row = 0
                    on_finished(future.result())
                    continue
                if isinstance(error, ServerRefused) or not isinstance(error, Exception):
                    raise error
                if "PYTEST_CURRENT_TEST" in os.environ and not isinstance(error, ServerFault):
                    raise error  # a failure of the kit
                message = str(error) if isinstance(error, ServerFault) else f"{type(error).__name__}: {error}"
                errors.append(EpisodeError(task[index].id, sample, message))
                in_a_row += 1
                if in_a_row >= most:
                    raise ServerRefused(
                        f"{in_a_row} episodes in a row failed; {message}. What had finished is stored; the same "
                        "command continues"
                    ) from error
    finally:
        player.stop()
        server.close()  # when stopped by Ctrl-C, nobody waits for the answers
        pool.shutdown(wait=False, cancel_futures=True)
    return errors


class _Player:
    """Plays one episode at a time per thread."""

    def __init__(
        self,
        task: Task,
        server: ChatServer,
        tools: Sequence[str | Tool] | None,
        limits: RolloutLimits,
        params: SamplingParams,
        seed: int,
    ) -> None:
        self._task, self._server, self._tools = task, server, tools
        self._limits, self._params, self._seed = limits, params, seed
        self._idle: SimpleQueue[ToolEnv] = SimpleQueue()
        self._stopped = False

    def play(self, index: int, sample: int) -> Trajectory:
        # The environment's clock would count the pauses for a busy server as the model's time.
        patient = replace(self._limits, max_seconds=float("inf"))
        try:
            env = self._idle.get_nowait()
        except Empty:
            env = ToolEnv(self._task, self._tools, limits=patient)
        try:
            return self._play(env, index, sample)
        finally:
            self._idle.put(env)
            if self._stopped:
                self.stop()

    def stop(self) -> None:
        """Ends the tools; an episode that is under way ends before its next turn."""
        self._stopped = True
        with suppress(Empty):
            while True:
                self._idle.get_nowait().close()

    def _play(self, env: ToolEnv, index: int, sample: int) -> Trajectory:
        _, info = env.reset(options={"index": index})
        example, names = info["example"], _safe_names(info["tools"])
        offered = [_renamed(schema, names) for schema in info["tools"]]
        real_name = {safe: name for name, safe in names.items()}
        seed = episode_seed(self._seed, example.id, sample)
        messages: list[Any] = list(info["messages"])
        turns: list[TurnRecord] = []
        spent, started = 0.0, time.perf_counter()
        while True:
            if self._stopped:
                raise ServerFault("stopped before the episode was over")
            turn_seed = (seed + len(turns)) % 2**31 if self._params.temperature else None
            try:
                reply = self._server.complete(messages, offered, self._params, turn_seed)
            except ContextFull:
                info = _cut(env, StopReason.EPISODE_LENGTH)
                break
            action = _action(reply, real_name)
            turns.append(TurnRecord(0, 0, action, truncated=reply.truncated, generate_seconds=reply.seconds))
            spent += reply.seconds
            if reply.truncated:
                info = _cut(env, StopReason.TURN_LENGTH)
                break
            if reply.calls and spent > self._limits.max_seconds:
                info = _cut(env, StopReason.TIME)
                break
            before = time.perf_counter()
            _, _, terminated, truncated, info = env.step(action)
            tool_seconds = time.perf_counter() - before
            broken = [call.result for call in info["calls"] if call.result.error is ToolErrorKind.SANDBOX]
            if broken:
                raise RuntimeError(f"tool {broken[0].name!r} failed by no fault of the student: {broken[0].content}")
            spent += tool_seconds
            records = tuple(_record(call) for call in info["calls"])
            turns[-1] = replace(turns[-1], calls=records, tool_seconds=tool_seconds)
            if terminated or truncated:
                break
            messages += _history(reply, info["messages"])
            if reply.total_tokens >= self._limits.max_tokens:
                info = _cut(env, StopReason.EPISODE_LENGTH)
                break
        grade = info["grade"]
        return Trajectory(
            task=self._task.name,
            example_id=example.id,
            sample=sample,
            token_ids=np.zeros(0, np.int32),
            sampled=np.zeros(0, np.bool_),
            kind=np.zeros(0, np.uint8),
            turn=np.zeros(0, np.int16),
            logprobs=np.zeros(0, np.float32),
            turns=tuple(turns),
            stop_reason=info["stop_reason"],
            answer=info["answer"],
            correct=grade.correct,
            difficulty=example.difficulty,
            category=str(example.metadata.get("category", "")),
            seed=self._seed,
            extracted=grade.extracted,
            grade_reason=grade.reason,
            scores=dict(grade.scores),
            question=example.messages[-1]["content"],
            seconds=time.perf_counter() - started,
        )


def _cut(env: ToolEnv, reason: StopReason) -> dict[str, Any]:
    return {"stop_reason": reason, "answer": None, "grade": env.truncate(reason)}


def _action(reply: Reply, real_name: Mapping[str, str]) -> str:
    """The turn as text. The server's calls stand in blocks that nothing inside them can end."""
    if not reply.calls:
        return reply.text
    blocks = [f"<tool_call>\n{_as_json(call, real_name)}\n</tool_call>" for call in reply.calls]
    # Words about a call are not a further call, when the server has told which calls there are.
    text = _TAG.sub("< ", reply.text)
    return "\n".join([text, *blocks] if text else blocks)


def _as_json(call: NativeCall, real_name: Mapping[str, str]) -> str:
    """The call as one JSON object; with arguments that are no JSON, as something that is none either."""
    name = json.dumps(real_name.get(call.name, call.name))
    try:
        json.loads(call.arguments)
        text = f'{{"name": {name}, "arguments": {call.arguments}}}'
    except (ValueError, RecursionError):
        text = f"{name}: {call.arguments}"
    return text.replace("<", "\\u003c")  # the same value: brackets occur only inside strings


def _record(played: PlayedCall) -> CallRecord:
    call = played.parsed
    arguments = call.raw if call.arguments is None else json.dumps(call.arguments, ensure_ascii=False)
    result = played.result
    return CallRecord(call.name, arguments, 0, 0, result.content, result.error, result.seconds, retries=result.retries)


def _history(reply: Reply, replies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The turn and its answers as the API wants them back."""
    if not reply.calls:  # calls that the server left in the text: it knows of none that a tool message could answer
        answers = "\n".join(f"<tool_response>\n{one['content']}\n</tool_response>" for one in replies)
        return [{"role": "assistant", "content": reply.text}, {"role": "user", "content": answers}]
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _readable(call.arguments)}}
        for call in reply.calls
    ]
    answered = [
        {"role": "tool", "tool_call_id": call.id, "content": one["content"]}
        for call, one in zip(reply.calls, replies, strict=True)
    ]
    return [{"role": "assistant", "content": reply.text, "tool_calls": calls}, *answered]


def _readable(arguments: str) -> str:
    """Arguments that are no JSON object come back empty: many servers fail on them; the tool's answer tells of it."""
    try:
        return arguments if isinstance(json.loads(arguments), dict) else "{}"
    except (ValueError, RecursionError):
        return "{}"


def _safe_names(schemas: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Names that the API accepts (letters, digits, ``_`` and ``-``), all different, by the tools' own."""
    names: dict[str, str] = {}
    for schema in schemas:
        name = schema["function"]["name"]
        safe, number = _NOT_IN_A_NAME.sub("_", name)[:_LONGEST_NAME], 2
        while safe in names.values():
            safe, number = f"{safe[: _LONGEST_NAME - 4]}_{number}", number + 1
        names[name] = safe
    return names


def _renamed(schema: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    function = schema["function"]
    return {**schema, "function": {**function, "name": names[function["name"]]}}
