"""One turn as a vLLM server is asked for it, token ids in and out, and its answer.

Worked example::

    body = sampling_body(request, "Qwen/Qwen3-0.6B", chat.stop_token_ids)       # for /v1/completions
    completion = read_completion(answer, request, chat.stop_token_ids, chat.vocab_size)

Everything that a server could decide by itself is told to it: its default sampling parameters
(``generation_config.json``) are overridden, and only the format's stop tokens end a turn.

Log-probs are those of vLLM's default ``--logprobs-mode raw_logprobs``: at temperature 1, whatever the temperature. So
temperature 1 and greedy turns are sampled here, and other temperatures refused.

Test it alone: ``pytest tests/engines/servers/test_engine.py``
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

from opd_env.engines.base import Completion, Request
from opd_env.errors import UserError

FORBIDDEN = -9999.0
"""What vLLM writes for a log-prob of −inf."""
_LOWEST = -3.5e38
"""No float32 lies below."""


def require_samplable(request: Request, max_context: int) -> None:
    """Refuses what vLLM cannot sample, or not with the log-probs of what was sampled.

    Raises:
        UserError: the temperature. ValueError: the length.
    """
    params, length = request.params, len(request.token_ids)
    if params.temperature not in (0.0, 1.0):
        raise UserError(
            f"temperature={params.temperature}: vLLM reports log-probs at temperature 1, which would then not be "
            "those of the sampled policy; use temperature 1 or 0, or engine=local"
        )
    if not length or length + params.max_tokens > max_context:
        raise ValueError(
            f"episode {request.episode}: {length} tokens and max_tokens={params.max_tokens} do not fit vLLM's context "
            f"of {max_context}; lower max_turn_tokens, or raise --max-model-len"
        )


def sampling_body(request: Request, model: str, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """The JSON that asks for a turn; nothing is left to a server's defaults."""
    params = request.params
    return {
        "model": model,
        "prompt": list(request.token_ids),
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": request.seed % (1 << 63),
        "stop_token_ids": list(stop_token_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
    }


def read_completion(answer: Any, request: Request, stop_token_ids: Sequence[int], vocab_size: int) -> Completion:
    """Checks and takes over what a server answered.

    Raises:
        ValueError, KeyError, TypeError, IndexError: it is not the answer to this request.
    """
    (choice,) = answer["choices"]
    ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    if choice["prompt_token_ids"] != list(request.token_ids):
        raise ValueError("the server read another prompt than it was given")
    if not 1 <= len(ids) <= request.params.max_tokens or len(ids) != len(logprobs):
        raise ValueError(f"{len(ids)} tokens with {len(logprobs)} log-probs, max_tokens={request.params.max_tokens}")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f"token {reprlib.repr(token)} is not one of the tokenizer's {vocab_size}")
    for logprob in logprobs:
        if require_logprob(logprob) <= FORBIDDEN:
            raise ValueError("a sampled token has probability 0")
    reason, stopped = choice["finish_reason"], ids[-1] in stop_token_ids
    if reason not in ("stop", "length") or stopped != (reason == "stop"):
        raise ValueError(
            f"the turn ended with {reprlib.repr(reason)} at token {ids[-1]}; turns end at {list(stop_token_ids)}"
        )
    if not stopped and len(ids) < request.params.max_tokens:
        raise ValueError(f"the turn broke off after {len(ids)} tokens of {request.params.max_tokens}")
    return Completion(request.episode, ids, [min(0.0, float(one)) for one in logprobs], truncated=not stopped)


def require_logprob(value: Any) -> float:
    """A log-prob as it stands in JSON.

    Raises:
        ValueError: not a number, or above 0 by more than rounding.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not _LOWEST <= value <= 1e-3:
        raise ValueError(f"{reprlib.repr(value)} is not a log-prob")
    return float(value)
