"""Asks a vLLM server for the log-probs of given tokens (``prompt_logprobs``).

Worked example::

    scores = score_tokens(client, model, ids, positions=[7, 8])     # of ids[7] given ids[:7], and of ids[8]
    scores.logprobs_N, scores.topk_ids_NK

vLLM always computes these anew: a request for ``prompt_logprobs`` does not read the prefix cache, and a finished
episode is scored by one request, so no prefix is read twice. It must sample at least one token, which is thrown away:
a row can have one token less than the server's context.

Test it alone: ``pytest tests/engines/servers/test_probe.py``
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_env.engines.servers.client import HttpClient
from opd_env.engines.servers.model import ServedModel
from opd_env.engines.servers.turns import FORBIDDEN, require_logprob
from opd_env.errors import UserError

_MOST_PROBABLE = 1.01
"""Of all tokens at one position together; what lies above 1 is rounding."""


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
