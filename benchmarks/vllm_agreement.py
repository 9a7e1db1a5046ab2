"""Does vLLM sample and score what transformers computes? Largest and mean difference of log-probs, per token.

Run it in the environment that ``make test-vllm`` builds; with ``--server`` against a running server, else in process::

    .venv-vllm/bin/python benchmarks/vllm_agreement.py --model packaged:student --episodes 64
    .venv-vllm/bin/python benchmarks/vllm_agreement.py --model packaged:student --server http://127.0.0.1:8000

*sampled*: log-probs that the engine recorded while it sampled, against transformers on the same tokens. *scored*:
``prompt_logprobs``, likewise. *order*: scores of the same rows, asked for in reversed order.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from opd_env.engines.base import Engine
from opd_env.engines.models import PACKAGED, load_model
from opd_env.engines.servers.client import HttpClient
from opd_env.engines.servers.engine import HttpEngine
from opd_env.engines.servers.protocol import score_tokens, served_model
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.rollouts import rollout
from opd_env.formats import get_format
from opd_env.tasks import load_task

Rows = list[tuple[list[int], list[int]]]


def local_scores(model: Any, rows: Rows) -> np.ndarray:
    """Log-probs of the rows' positions, one row at a time."""
    found = []
    with torch.no_grad():
        for ids, positions in rows:
            logprobs_TV = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            found += [float(logprobs_TV[place - 1, ids[place]]) for place in positions]
    return np.array(found)


def engine_scores(engine: Any, rows: Rows) -> np.ndarray:
    if isinstance(engine, HttpEngine):
        model = served_model(engine.client)
        scores = [score_tokens(engine.client, model, ids, positions) for ids, positions in rows]
    else:
        scores = engine.score(rows)
    return np.concatenate([one.logprobs_N for one in scores])


def main() -> None:
    parser = argparse.ArgumentParser(description="Agreement of vLLM's log-probs with those of transformers.")
    parser.add_argument("--model", default="packaged:student")
    parser.add_argument("--server", help="URL of a server of the model; else vLLM in this process")
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    loaded = load_model(args.model, dtype=args.dtype)
    chat = get_format(loaded.tokenizer)
    engine: Engine
    if args.server:
        engine = HttpEngine(HttpClient([args.server]), chat.stop_token_ids, chat.vocab_size)
    else:
        from opd_env.engines.vllm import VLLMEngine

        name = args.model.removeprefix("packaged:")
        folder = str(PACKAGED / name) if name != args.model else name
        engine = VLLMEngine(
            folder, chat.stop_token_ids, chat.vocab_size,
            capacity=32, max_context=512, dtype=args.dtype, enforce_eager=True,
        )  # fmt: skip
    limits = RolloutLimits(max_turns=6, max_turn_tokens=96, max_tokens=500)
    result = rollout(load_task(args.task), engine, chat, indices=range(args.episodes), limits=limits)
    if result.errors:
        raise RuntimeError(result.errors[0].message)
    episodes = result.trajectories
    rows: Rows = [
        (one.token_ids[row].tolist(), np.flatnonzero(one.sampled[row]).tolist()) for one in episodes for row in one.rows
    ]
    local = local_scores(loaded.model, rows)
    scored = engine_scores(engine, rows)
    counts = np.cumsum([len(positions) for _, positions in rows])[:-1]
    turned = np.concatenate(np.split(engine_scores(engine, rows[::-1]), len(local) - counts[::-1])[::-1])
    print(f"{args.model}, {args.dtype}, {'server' if args.server else 'in process'}: {len(local)} sampled tokens")
    print("| log-probs | mean difference | max difference |\n|---|---|---|")
    for name, first, second in (
        ("sampled by vLLM / transformers", np.concatenate([one.logprobs[one.sampled] for one in episodes]), local),
        ("scored by vLLM / transformers", scored, local),
        ("scored by vLLM in two orders", scored, turned),
    ):
        print(f"| {name} | {np.abs(first - second).mean():.1e} | {np.abs(first - second).max():.1e} |")
    engine.close()


if __name__ == "__main__":
    main()
