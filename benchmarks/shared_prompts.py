"""What is it worth to prefill once what episodes begin with? CPU seconds of rollouts, against the same without it.

The runs alternate, and both sample the same tokens, as far as sums in another order allow::

    OMP_NUM_THREADS=1 python benchmarks/shared_prompts.py --episodes 256 --runs 5
    OMP_NUM_THREADS=1 python benchmarks/shared_prompts.py --model smollm2 --episodes 32 --runs 2 --max_turn_tokens 24
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from opd_env.engines.local import LocalEngine
from opd_env.engines.models import load_model
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.rollouts import RolloutResult, rollout
from opd_env.formats import get_format
from opd_env.tasks import load_task


class CountingEngine(LocalEngine):
    """Counts what it prefills."""

    prefilled = 0
    """Tokens, padding included."""

    def _forward(self, first: int, new: list[list[int]]) -> None:
        width = max(map(len, new))
        self.prefilled += width * len(new) if width > 1 else 0
        super()._forward(first, new)


class LonelyEngine(CountingEngine):
    """Every episode reads its own slot only."""

    def _source(self, row: Any) -> tuple[int, int]:
        held = int(self._cache.shared(row.slot, row.slot + 1, row.prefix_T)[0])
        return row.slot, min(held, len(row.prefix_T) - 1)

    def _divide(self, rows: list[Any]) -> tuple[list[Any], list[Any]]:
        return rows, []


def main() -> None:
    parser = argparse.ArgumentParser(description="Rollouts with and without sharing the beginnings of prompts.")
    parser.add_argument("--model", default="packaged:student")
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--samples", type=int, default=1, help="of each problem")
    parser.add_argument("--max_turn_tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    loaded = load_model(args.model)
    chat, task = get_format(loaded.tokenizer), load_task("arithmetic", levels=[1, 2, 3])

    def measure(kind: type[CountingEngine]) -> tuple[float, RolloutResult]:
        engine = kind(loaded.model, chat.stop_token_ids, chat.vocab_size)
        began = time.process_time()
        result = rollout(
            task, engine, chat, indices=range(args.episodes // args.samples), samples=args.samples, tool_workers=0,
            limits=RolloutLimits(max_turns=6, max_turn_tokens=args.max_turn_tokens, max_tokens=1024),
        )  # fmt: skip
        seconds = time.process_time() - began
        print(f"    {kind.__name__}: {seconds:.2f} s of CPU, {engine.prefilled} tokens prefilled")
        return seconds, result

    ratios, same = [], 0
    for _ in range(args.runs):
        (alone_s, alone), (shared_s, shared) = measure(LonelyEngine), measure(CountingEngine)
        ratios.append(shared_s / alone_s)
        same = sum(
            a.token_ids.tolist() == b.token_ids.tolist()
            for a, b in zip(alone.trajectories, shared.trajectories, strict=True)
        )
    print(
        f"shared / alone: {statistics.median(ratios):.2f} of the CPU time; {same} of {args.episodes} episodes the same"
    )


if __name__ == "__main__":
    main()
