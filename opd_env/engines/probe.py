"""Refuses a vLLM, behind servers or in this process, that would bias training, before the first step, with the reason.

Worked example::

    probe_servers(client, chat, local=student.model)        # silent, or a UserError
    probe_vllm(engine, chat, local=student.model)           # the same of one in this process
    client.on_return = same_scores(client, chat)            # refuses a server that comes back with other weights

Checked, with a few sequences that share their beginning: token ids come back as they were sent; the same seed samples
the same tokens; scores do not depend on the order of requests or on what the prefix cache holds (vLLM issue 42019:
``prompt_logprobs`` read from a stale buffer); sampled and scored log-probs of a token are the same; and both are what
a local copy of the model computes.

Test it alone: ``pytest tests/engines/test_probe.py``
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_env.engines.base import Completion, Request, SamplingParams
from opd_env.engines.servers.client import HttpClient, RequestFailed, RequestRefused
from opd_env.engines.servers.protocol import (
    ServedModel,
    read_completion,
    read_scores,
    sampling_body,
    score_tokens,
    scoring_body,
    served_model,
)
from opd_env.engines.vllm import VLLMEngine
from opd_env.errors import UserError
from opd_env.formats import ChatFormat
from opd_env.messages import user

MEAN_GAP, MAX_GAP = 0.05, 0.5
"""Nats by which log-probs of a token may differ: rounding of bfloat16 stays below, another model or position not."""
_QUESTION = (
    "A baker sells 12 loaves in the morning and 7 in the afternoon, at 3 dollars each. What does the baker earn?"
)


def probe_servers(client: HttpClient, chat: ChatFormat, local: Any = None) -> None:
    """Checks every server of the pool by itself.

    Args:
        client: the servers.
        chat: the format of the student's tokenizer.
        local: the model that they should serve (a causal language model), or None if there is no copy here.

    Raises:
        UserError: what is wrong with which server, and what to do.
    """
    model = served_model(client)
    for url in client.urls:
        with _alone(client, url, model) as one:
            # Keys and values that the server holds of earlier weights, of another run too, are not to be read.
            salt = secrets.token_hex(8)
            _probe(partial(_sample, one, model, chat, salt), partial(_score, one, model), chat, local)


def same_scores(client: HttpClient, chat: ChatFormat) -> Callable[[str], None]:
    """Remembers how the servers score a prompt, for servers whose weights are never to change.

    Args:
        client: the servers, which have been probed.
        chat: the format of the prompt.

    Returns:
        What raises UserError when the server of a URL scores it otherwise.

    Raises:
        UserError: the servers do not score it alike.
    """
    model, row = served_model(client), list(chat.render_prompt([user(_QUESTION)], []))
    advice = f"serve the same weights of {model.name} as when the run started, at every URL"
    found: dict[str, NDArray[np.float32]] = {}
    for url in client.urls:
        with _alone(client, url, model) as one:
            (found[url],) = _score(one, model, [row])
            _agree(f"its scores and those of {client.urls[0]}", found[url], found[client.urls[0]], advice)

    def look(url: str) -> None:
        answer = client.ask(url, "/v1/completions", scoring_body(model, row, 0))
        scores = read_scores(answer, row, range(1, len(row)), 0).logprobs_N
        try:
            _agree("its scores now and at the start", scores, found[url], advice)
        except _Different as error:
            raise UserError(f"{url} would bias training: {error}") from error

    return look


def probe_vllm(engine: VLLMEngine, chat: ChatFormat, local: Any = None) -> None:
    """Checks vLLM in this process.

    Args:
        engine: idle.
        chat, local: as for ``probe_servers``.

    Raises:
        UserError: what is wrong, and what to do.
    """

    def sample(request: Request) -> Completion:
        engine.submit(request)
        while not (completions := engine.step()):
            continue
        if completions[0].error:
            raise _Different(completions[0].error)
        return completions[0]

    def score(rows: Sequence[list[int]]) -> list[NDArray[np.float32]]:
        return [one.logprobs_N for one in engine.score([(row, range(1, len(row))) for row in rows])]

    try:
        _probe(sample, score, chat, local)
    except _Different as error:
        raise UserError(f"vLLM in this process would bias training: {error}") from error


class _Different(Exception):
    """Numbers that must agree do not."""


@contextmanager
def _alone(client: HttpClient, url: str, model: ServedModel) -> Iterator[HttpClient]:
    """A client of one server of the pool; what fails within is the user's to mend."""
    try:
        yield HttpClient([url], timeout_s=client.timeout_s, tries=2, patience_s=30, api_key=client.api_key)
    except (RequestFailed, RequestRefused) as error:
        raise UserError(
            f"{url} does not return what is needed ({error}); it must be a vLLM server of version 0.11 or later "
            "that takes token ids and gives return_token_ids, logprobs and prompt_logprobs"
        ) from error
    except _Different as error:
        raise UserError(f"{url} ({model.name}) would bias training: {error}") from error


def _probe(
    sample: Callable[[Request], Completion],
    score: Callable[[Sequence[list[int]]], list[NDArray[np.float32]]],
    chat: ChatFormat,
    local: Any,
) -> None:
    """``score`` gives the log-probs of all tokens but the first of rows that are asked for together."""
    prompt = list(chat.render_prompt([user(_QUESTION)], []))
    requests = [Request(0, prompt, SamplingParams(max_tokens=16), seed) for seed in (1, 2)]
    turns = [sample(request) for request in requests]
    for request, turn in zip(requests, turns, strict=True):
        again = sample(request)
        if again.token_ids != turn.token_ids:
            raise _Different(
                f"seed {request.seed} sampled {turn.token_ids[:8]} and then {again.token_ids[:8]}; a run could not be "
                "repeated"
            )
    # Rows of one opening and rows of another, by turns: a buffer that is not cleared shows the other's values.
    rows = [opening + turn.token_ids for turn in turns for opening in (prompt, prompt[::-1])]
    in_order = [score([row])[0] for row in rows]
    at_once = score(rows[::-1])[::-1]
    advice = (
        "turn prefix caching off (--no-enable-prefix-caching, or enable_prefix_caching: false in vllm_options), or "
        "take a version in which vLLM issue 42019 is mended"
    )
    for first, second in zip(in_order, at_once, strict=True):
        _agree("scores of the same tokens, asked for in another order,", first, second, advice)
    for turn, scores in zip(turns, in_order[::2], strict=True):
        _agree(
            "sampled and scored log-probs of the same tokens",
            np.asarray(turn.logprobs),
            scores[-len(turn.token_ids) :],
            "set logprobs_mode to raw_logprobs, and leave speculative decoding out",
        )
    if local is not None:
        for row, scores in zip(rows, in_order, strict=True):
            advice = "serve the very model that is loaded here, with the same dtype"
            _agree("its log-probs and those of the model here", scores, _local_scores(local, row), advice)


def _sample(client: HttpClient, model: ServedModel, chat: ChatFormat, salt: str, request: Request) -> Completion:
    body = sampling_body(request, model.name, chat.stop_token_ids) | {"cache_salt": salt}
    return client.post(
        "/v1/completions", body, lambda answer: read_completion(answer, request, chat.stop_token_ids, chat.vocab_size)
    )


def _score(client: HttpClient, model: ServedModel, rows: Sequence[list[int]]) -> list[NDArray[np.float32]]:
    with ThreadPoolExecutor(len(rows)) as pool:
        return list(pool.map(lambda row: score_tokens(client, model, row, range(1, len(row))).logprobs_N, rows))


def _local_scores(model: Any, row: Sequence[int]) -> NDArray[np.float32]:
    import torch

    with torch.no_grad():
        ids_T = torch.tensor(row, device=next(model.parameters()).device)
        logprobs_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        found: NDArray[np.float32] = logprobs_TV.gather(1, ids_T[1:, None])[:, 0].cpu().numpy()
        return found


def _agree(what: str, first: NDArray[Any], second: NDArray[Any], advice: str) -> None:
    gap = np.abs(first - second)
    if not (gap.mean() <= MEAN_GAP and gap.max() <= MAX_GAP):
        raise _Different(f"{what} differ by {gap.mean():.3g} nats on average and {gap.max():.3g} at most; {advice}")
