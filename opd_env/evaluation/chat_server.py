"""A model behind an OpenAI-compatible chat API: vLLM, llama.cpp, Ollama, or a frontier model as a baseline.

Worked example::

    server = ChatServer("http://127.0.0.1:8000/v1")
    reply = server.complete([user("What is 6 * 7?")], [calculator.schema], SamplingParams(temperature=0, max_tokens=64))
    reply.text, reply.calls, reply.truncated

A server tells neither tokens nor log-probs that could be trusted, so what it answers can be graded, never trained on.
Faults that pass (429, 5xx, a lost or slow connection, an answer that is no chat completion) are tried again with
growing pauses; what will not pass (a wrong key, an unknown model) ends the evaluation at once.

Test it alone: ``pytest tests/evaluation/test_chat_server.py``
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from opd_env.engines.base import SamplingParams
from opd_env.engines.servers.transport import Fault, Refusal, Transport, checked_url, pause_before
from opd_env.errors import UserError

LONGEST_ANSWER = 8_000_000
"""Bytes; a longer answer is a fault."""


class ServerRefused(UserError):
    """The server will not answer however often it is asked; the message says why."""


class ServerFault(Exception):
    """A fault that may pass; raised when the tries are used up."""


class ContextFull(Exception):
    """The conversation is longer than the model's context."""


class NativeCall(NamedTuple):
    """A tool call as the server read it from the model's tokens; nothing in it has been checked."""

    id: str
    name: str
    arguments: str
    """Meant to be a JSON object."""


class Reply(NamedTuple):
    """One assistant turn."""

    text: str
    calls: tuple[NativeCall, ...]
    truncated: bool
    """The turn reached its limit of tokens; its calls must not be run."""
    total_tokens: int
    """Prompt and answer as the server counts them; 0 when it does not say."""
    seconds: float = 0.0
    """Time of the try that succeeded, without the pauses before it."""


@dataclass
class ChatServer:
    """A client of ``/chat/completions``. Threads may share it.

    Raises:
        ServerRefused: (when no model is named) the server cannot be reached, or serves not exactly one model.
    """

    url: str
    """Up to and with ``/v1``."""
    model: str = ""
    """By default the only one that the server offers."""
    api_key: str | None = field(default=None, repr=False)
    """By default ``$OPENAI_API_KEY``, if it is set."""
    concurrency: int = 16
    """Episodes that are played side by side."""
    timeout_s: float = 300.0
    """For one answer as a whole."""
    tries: int = 6
    pause_s: float = 1.0
    """Before the second try; doubles from try to try."""

    def __post_init__(self) -> None:
        try:
            self.url = checked_url(self.url)
        except ValueError as error:
            raise ServerRefused(f"{error}, with the path of the API, such as /v1, at its end") from error
        self._limit_name = "max_completion_tokens"
        if self.api_key is None:
            self.api_key = os.environ.get("OPENAI_API_KEY")
        self._transport = Transport(self.api_key, LONGEST_ANSWER)
        if not self.model:
            self.model = self._only_model()

    def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        params: SamplingParams,
        seed: int | None = None,
    ) -> Reply:
        """Asks for one assistant turn.

        Args:
            messages: the conversation so far, in the API's own shape.
            tools: schemas of the tools on offer.
            params: temperature and the turn's limit of tokens.
            seed: passed on; servers promise no more than to try.

        Raises:
            ServerFault: every try failed.
            ServerRefused: it will not answer.
            ContextFull: the conversation has become too long.
        """
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), "temperature": params.temperature}
        if tools:
            body["tools"] = list(tools)
        if seed is not None:
            body["seed"] = seed
        tried = 0
        while True:
            tried, started = tried + 1, time.perf_counter()
            try:
                reply = _read_reply(self._ask("/chat/completions", {**body, self._limit_name: params.max_tokens}))
                return reply._replace(seconds=time.perf_counter() - started)
            except Fault as fault:
                if tried >= self.tries or self._transport.closed:
                    raise ServerFault(f"{self.url} failed {tried} times; the last: {fault}") from fault
                self._transport.pause(pause_before(tried, self.pause_s, fault.pause_s))

    def close(self) -> None:
        """Ends everything under way, and lets nothing begin."""
        self._transport.close()

    def _only_model(self) -> str:
        try:
            listed = [str(entry["id"]) for entry in self._ask("/models")["data"]]
        except (Fault, LookupError, TypeError) as error:
            raise ServerRefused(
                f"cannot ask {self.url}/models which model it serves ({error}); start it, or name the model"
            ) from error
        if len(listed) != 1:
            raise ServerRefused(f"{self.url} serves {len(listed)} models; name one of {', '.join(listed[:20])}")
        return listed[0]

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that the server answers."""
        try:
            return self._transport.ask(self.url + path, body, timeout_s=self.timeout_s)
        except Refusal as refusal:
            self._refuse(refusal)

    def _refuse(self, refusal: Refusal) -> NoReturn:
        """Raises what an error status means in this API."""
        said, wrong = str(refusal), refusal.status == 400
        if wrong and ("context_length" in said or "context length" in said):
            raise ContextFull(said) from refusal
        if wrong and "max_completion_tokens" in said and self._limit_name != "max_tokens":
            self._limit_name = "max_tokens"  # the name in older servers
            raise Fault(said, pause_s=1e-3) from refusal
        hint = "; set OPENAI_API_KEY" if refusal.status in (401, 403) else ""
        raise ServerRefused(f"{self.url} refuses model {self.model!r} with {said}{hint}") from refusal


def _read_reply(answer: Any) -> Reply:
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        content = message.get("content")
        if isinstance(content, list):  # parts, as some servers write it
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        calls = tuple(_read_call(call, number) for number, call in enumerate(message.get("tool_calls") or ()))
        usage = answer.get("usage") or {}
        total = usage.get("total_tokens")
        if not isinstance(content, str | None):
            raise TypeError(f"content is a {type(content).__name__}")
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise Fault(f"the answer is no chat completion ({type(error).__name__}: {error})") from error
    truncated = choice.get("finish_reason") == "length"
    return Reply(content or "", calls, truncated, total if type(total) is int else 0)


def _read_call(call: Mapping[str, Any], number: int) -> NativeCall:
    function = call["function"]
    arguments = function.get("arguments")
    if not isinstance(arguments, str):  # an object, as some servers write it; none at all for a tool without arguments
        arguments = json.dumps({} if arguments is None else arguments)
    if not isinstance(function["name"], str):
        raise TypeError(f"a call's name is a {type(function['name']).__name__}")
    return NativeCall(str(call.get("id") or f"call_{number}"), function["name"], arguments or "{}")
