"""Gold calls of BFCL's multi-turn problems, and the same with one thing changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from opd_env.messages import ToolCall
from opd_env.tasks import Example
from opd_env.tasks.function_calls.bfcl_backends import Backends, functions_of
from opd_env.tasks.function_calls.bfcl_multi_turn import read_call

Calls = list[list[ToolCall]]
"""Of every user turn."""


def gold_calls(example: Example) -> Calls:
    """The gold calls, arguments by name."""
    backends = Backends(example.metadata["classes"], example.metadata["config"])
    turns = [[read_call(text) for text in texts] for texts in example.metadata["gold"]]
    return [[ToolCall(one.name, backends.named(one.name, *one.args, **one.keywords)) for one in turn] for turn in turns]


def changed(gold: Calls, example: Example, rng: random.Random) -> Calls:
    """A call more, less, elsewhere, in another order, of another function or with another argument."""
    done = [[ToolCall(call.name, dict(call.arguments)) for call in calls] for calls in gold]
    turn = rng.choice([number for number, calls in enumerate(done) if calls])
    index = rng.randrange(len(done[turn]))
    call = done[turn][index]
    match rng.randrange(9):
        case 0:
            del done[turn][index]
        case 1:
            done[turn].insert(index, call)
        case 2:
            done[turn].reverse()
        case 3:
            done[rng.randrange(len(done))].append(done[turn].pop(index))
        case 4:
            names = [document["name"] for document in functions_of(example.metadata["classes"])]
            done[turn][index] = ToolCall(rng.choice(names), call.arguments)
        case 5:
            call.arguments["extra"] = 1
        case 6:
            done[turn] = []
        case _:
            if call.arguments:
                name = rng.choice(sorted(call.arguments))
                call.arguments[name] = _other(call.arguments[name], rng)
    return done


def official_verdict(check: Callable[..., Any], example: Example, calls: Calls, name: str) -> bool:
    """What ``multi_turn_checker`` of bfcl-eval says, which evaluates calls as Python source."""
    texts = [[[f"{c.name}({', '.join(f'{k}={v!r}' for k, v in c.arguments.items())})"] for c in turn] for turn in calls]
    about = example.metadata
    row = {"id": example.id, "initial_config": about["config"], "involved_classes": about["classes"]}
    return bool(check(texts, about["gold"], row, about["category"], name)["valid"])


def _other(value: object, rng: random.Random) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice([value + 1, -value, str(value), float(value)])
    if isinstance(value, str):
        return rng.choice([value + "x", value.upper(), "", [value]])
    return rng.choice([None, "x", value[::-1] if isinstance(value, list) else {}])
