"""Plays episodes through a chat server: the rollouts, environments and graders of every other model, without tokens.

Worked example::

    result = evaluate(load_task("gsm8k", "test"), ChatServer("https://api.openai.com/v1", "gpt-5"), limit=100)

``ToolEnv`` takes text. A turn that the server has split into text and calls is put together again, its calls as the
blocks that ``parse_hermes`` reads, so that validation, tools, limits and grades are exactly those of every other model.
The trajectories have turns, calls and grades, and empty token arrays: nothing in them is invented.

Test it alone: ``pytest tests/evaluation/test_chat_player.py``
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opd_env.engines.base import AskingEngine, Completion, Request, SamplingParams
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.record import Recorder
from opd_env.episode.rollouts import EpisodeError, rollout
from opd_env.episode.trajectory import Trajectory, TurnRecord
from opd_env.evaluation.chat_server import ChatServer, ContextFull, NativeCall, Reply, ServerFault, ServerRefused
from opd_env.formats import ParsedTurn, parse_hermes
from opd_env.formats.parse import Span
from opd_env.messages import Message
from opd_env.tasks import Task
from opd_env.tools import Tool

_NOT_IN_A_NAME = re.compile(r"[^a-zA-Z0-9_-]")
_LONGEST_NAME = 64
_MOST_FAULTS = 5
"""Episodes in a row (or as many as are played side by side) whose failure means that the server is down."""
_FULL = 1 << 60
"""Tokens of a conversation that the model's context does not hold: more than any limit."""
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
    engine = _ChatEngine(server)
    try:
        return rollout(
            task, engine, None, episodes=episodes, tools=tools, limits=limits, sampling=sampling, seed=seed,
            on_finished=on_finished, recorder=_ChatRecorder,
        ).errors  # fmt: skip
    finally:
        engine.close()  # when stopped by Ctrl-C, nobody waits for the answers


@dataclass(frozen=True)
class _ChatRequest(Request):
    messages: Sequence[Any] = ()
    tools: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class _ChatCompletion(Completion):
    reply: Reply | None = None
    """None when the conversation does not fit the model's context."""


class _ChatEngine(AskingEngine):
    """Asks for the turns of many episodes side by side, each in a thread that holds no exit."""

    def __init__(self, server: ChatServer) -> None:
        super().__init__()
        self._server = replace(server)  # closing it ends no other evaluation
        self.capacity = server.concurrency
        self._most_faults = max(_MOST_FAULTS, server.concurrency)
        self._faults = 0
        self._lock = threading.Lock()

    def submit(self, request: Request) -> None:
        """Takes requests of ``_ChatRecorder`` only."""
        if not isinstance(request, _ChatRequest):
            raise TypeError("a chat server takes messages, not tokens; play it with recorder=_ChatRecorder")
        self._begin(
            request.episode,
            lambda: self._complete(request),
            lambda run: threading.Thread(target=run, daemon=True, name="opd-env-chat").start(),
        )

    def close(self) -> None:
        self._server.close()

    def _complete(self, request: _ChatRequest) -> Completion:
        seed = request.seed % 2**31 if request.params.temperature else None
        reply: Reply | None
        try:
            reply = self._server.complete(request.messages, request.tools, request.params, seed)
        except ContextFull:
            reply = None
        except ServerFault as fault:
            with self._lock:
                self._faults += 1
                in_a_row = self._faults
            if in_a_row >= self._most_faults:
                raise ServerRefused(
                    f"{in_a_row} episodes in a row failed; {fault}. What had finished is stored; the same command "
                    "continues"
                ) from fault
            return Completion(request.episode, [], [], truncated=True, error=str(fault))
        with self._lock:
            self._faults = 0
        truncated, seconds = reply is None or reply.truncated, 0.0 if reply is None else reply.seconds
        return _ChatCompletion(request.episode, [], [], truncated, seconds=seconds, reply=reply)


class _ChatRecorder(Recorder):
    """The conversation as the API wants it, and the turns as text."""

    def __init__(self, chat: None, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        names = _safe_names(tools)
        self._messages: list[Any] = list(messages)
        self._tools = [_renamed(schema, names) for schema in tools]
        self._real_name = {safe: name for name, safe in names.items()}
        self._reply = Reply("", (), False, 0)

    @property
    def context_length(self) -> int:
        """By the server's own count."""
        return self._reply.total_tokens

    def request(self, key: int, params: SamplingParams, seed: int) -> Request:
        """The conversation so far."""
        return _ChatRequest(key, (), params, seed, list(self._messages), self._tools)

    def sampled(self, completion: Completion, seconds: float) -> ParsedTurn:
        """Adds a turn, if the server's context had room for one."""
        if not isinstance(completion, _ChatCompletion) or completion.reply is None:
            self._reply = Reply("", (), True, _FULL)
            return ParsedTurn("", "")
        self._reply = completion.reply
        turn = parse_hermes(_action(self._reply, self._real_name))
        self.turns.append(TurnRecord(0, 0, turn.text, truncated=completion.truncated, generate_seconds=seconds))
        return replace(turn, calls=tuple(replace(call, span=Span(0, 0)) for call in turn.calls))

    def answered(self, replies: Sequence[Message], max_tokens: int) -> bool:
        """Adds the turn and what answers it; how many tokens these are, the server tells with its next reply."""
        calls, assistant = self._reply.calls, {"role": "assistant", "content": self._reply.text}
        if replies[0]["role"] == "user":
            self.turns[-1] = replace(self.turns[-1], user=replies[0]["content"])
            self._messages += [assistant, *replies]
        elif not calls:  # the server left them in the text: it knows of none that a tool message could answer
            answers = "\n".join(f"<tool_response>\n{one['content']}\n</tool_response>" for one in replies)
            self._messages += [assistant, {"role": "user", "content": answers}]
        else:
            asked, answered = [], []
            for call, one in zip(calls, replies, strict=True):
                function = {"name": call.name, "arguments": _readable(call.arguments)}
                asked.append({"id": call.id, "type": "function", "function": function})
                answered.append({"role": "tool", "tool_call_id": call.id, "content": one["content"]})
            self._messages += [{**assistant, "tool_calls": asked}, *answered]
        return True

    def tokens(self) -> dict[str, Any]:
        """None are known."""
        types = {"token_ids": np.int32, "sampled": np.bool_, "kind": np.uint8, "turn": np.int16, "logprobs": np.float32}
        return {name: np.zeros(0, dtype) for name, dtype in types.items()}


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
