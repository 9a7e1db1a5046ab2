"""What a vLLM server is asked, and its answers: the model that it serves, sampled turns, scores of given tokens.

Worked example::

    model = served_model(client)        # ServedModel(name="Qwen/Qwen3-0.6B", max_context=40960)
    body = sampling_body(request, model.name, chat.stop_token_ids)              # for /v1/completions
    completion = read_completion(answer, request, chat.stop_token_ids, chat.vocab_size)
    scores = score_tokens(client, model, ids, positions=[7, 8])     # of ids[7] given ids[:7], and of ids[8]
    scores.logprobs_N, scores.topk_ids_NK

Everything that a server could decide by itself is told to it: its default sampling parameters
(``generation_config.json``) are overridden, and only the format's stop tokens end a turn.

Log-probs are those of vLLM's default ``--logprobs-mode raw_logprobs``: at temperature 1, whatever the temperature. So
temperature 1 and greedy turns are sampled here, and other temperatures refused.

Scores (``prompt_logprobs``) are always computed anew: such a request does not read the prefix cache, and a finished
episode is scored by one request, so no prefix is read twice. It must sample at least one token, which is thrown away:
a row can have one token less than the server's context.

Test it alone: ``pytest tests/engines/servers/test_engine.py tests/engines/servers/test_hostile_answers.py``
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_env.engines.base import Completion, Request
from opd_env.engines.servers.client import HttpClient, RequestFailed, RequestRefused
from opd_env.errors import UserError

FORBIDDEN = -9999.0
"""What vLLM writes for a log-prob of −inf."""
_LOWEST = -3.5e38
"""No float32 lies below."""
_MOST_PROBABLE = 1.01
"""Of all tokens at one position together; what lies above 1 is rounding."""


@dataclass(frozen=True)
class ServedModel:
    """What all servers of a pool serve."""

    name: str
    max_context: int
    """Tokens, the sampled ones included."""


def served_model(client: HttpClient) -> ServedModel:
    """What the servers serve.

    Raises:
        UserError: one cannot be reached, is no vLLM server, or serves something else than the others.
    """
    found: dict[str, ServedModel] = {}
    for url in client.urls:
        try:
            listed = client.ask(url, "/v1/models", timeout_s=30)["data"]
            models = [_read_model(one) for one in listed if not one.get("parent")]
        except (RequestFailed, RequestRefused) as error:
            raise UserError(
                f"no vLLM server answers at {url} ({error}); start one with `vllm serve MODEL`, and wait until "
                f"{url}/health answers"
            ) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{url} does not list its model and its context as a vLLM server does ({error})") from error
        if len(models) != 1:
            raise UserError(f"{url} serves {len(models)} models; give each model its own server")
        found[url] = models[0]
    first = next(iter(found.values()))
    if any(model != first for model in found.values()):
        shown = "; ".join(f"{url}: {model.name}, {model.max_context} tokens" for url, model in found.items())
        raise UserError(f"the servers of one pool must serve the same model with the same context, but {shown}")
    return first


def _read_model(listed: Any) -> ServedModel:
    name, context = listed["id"], listed["max_model_len"]
    if not isinstance(name, str) or type(context) is not int or context < 2:
        raise ValueError(f"a model {reprlib.repr(name)} with a context of {reprlib.repr(context)}")
    return ServedModel(name, context)


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


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of N tokens of a row."""

    logprobs_N: NDArray[np.float32]
    """Natural log-probs at temperature 1; −inf where the token is forbidden."""
    topk_ids_NK: NDArray[np.int64]
    topk_logprobs_NK: NDArray[np.float32]


def score_tokens(
    client: HttpClient, model: ServedModel, token_ids: Sequence[int], positions: Sequence[int], k: int = 0
) -> TokenScores:
    """Log-probs of the tokens at some positions of a row, and of the k most likely tokens there.

    Args:
        client: the servers.
        model: what they serve.
        token_ids: the row, at least one token less than the context.
        positions: rising, each at least 1.
        k: 0 to the server's ``--max-logprobs``, by default 20.

    Raises:
        UserError: the row is too long, or no server answers.
        RequestFailed: this row cannot be scored.
    """
    if not positions:
        return no_scores(k)
    ids = [int(token) for token in token_ids[: positions[-1] + 1]]
    if len(ids) + 1 > model.max_context:
        raise UserError(
            f"an episode has {len(ids)} tokens, but the server of {model.name} scores {model.max_context - 1} at most; "
            "lower limits.max_tokens, or raise the server's --max-model-len"
        )
    body = scoring_body(model, ids, k)
    return client.post("/v1/completions", body, lambda answer: read_scores(answer, ids, positions, k))


def scoring_body(model: ServedModel, token_ids: Sequence[int], k: int) -> dict[str, Any]:
    """The JSON that asks for the scores of a row."""
    return {
        "model": model.name,
        "prompt": list(token_ids),
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": k,
        "return_token_ids": True,
    }


def no_scores(k: int) -> TokenScores:
    """Of no token."""
    return TokenScores(np.zeros(0, np.float32), np.zeros((0, k), np.int64), np.zeros((0, k), np.float32))


def read_scores(answer: Any, token_ids: Sequence[int], positions: Sequence[int], k: int) -> TokenScores:
    """Checks and takes over what a server answered.

    Raises:
        ValueError, KeyError, TypeError, IndexError: it is not the answer to this request.
    """
    (choice,) = answer["choices"]
    entries = choice["prompt_logprobs"]
    if len(entries) != len(token_ids) or choice["prompt_token_ids"] != list(token_ids):
        raise ValueError(f"scores of {len(entries)} tokens for a row of {len(token_ids)}")
    logprobs, topk_ids, topk_logprobs = [], [], []
    for position in positions:
        found = {_token(name): require_logprob(entry["logprob"]) for name, entry in entries[position].items()}
        token = token_ids[position]
        logprobs.append(found[token])
        if len(found) not in (max(k, 1), k + 1):
            raise ValueError(f"{len(found)} log-probs at position {position}, asked for {k} and the token's own")
        if sum(map(math.exp, found.values())) > _MOST_PROBABLE:
            raise ValueError(f"the tokens at position {position} are likelier than 1 together")
        ranked = sorted(found.items(), key=lambda item: -item[1])
        if k and len(found) == k + 1:  # the token is not among the k most likely
            if found[token] > ranked[-1][1]:
                raise ValueError(f"token {token} at position {position} is likely, and yet beyond the {k} most likely")
            ranked.remove((token, found[token]))
        ranked = ranked[:k]
        topk_ids.append([index for index, _ in ranked])
        topk_logprobs.append([logprob for _, logprob in ranked])
    shape = (len(positions), k)
    return TokenScores(
        _with_infinities(logprobs, (len(positions),)),
        np.asarray(topk_ids, dtype=np.int64).reshape(shape),
        _with_infinities(topk_logprobs, shape),
    )


def _token(name: Any) -> int:
    token = int(name)
    if not 0 <= token < 1 << 31 or str(token) != str(name):
        raise ValueError(f"{reprlib.repr(name)} is no token")
    return token


def _with_infinities(values: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    array = np.asarray(values, dtype=np.float32).reshape(shape)
    return np.where(array <= FORBIDDEN, -np.inf, np.minimum(array, 0.0)).astype(np.float32)
