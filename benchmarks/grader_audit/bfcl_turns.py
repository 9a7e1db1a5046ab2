"""BFCL's multi-turn rules against `multi_turn_checker` of bfcl-eval, on the gold calls and on changed ones.

Run by `run.py`. The official checker evaluates calls as Python source; ours runs them by name.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from opd_env.messages import ToolCall
from opd_env.tasks import Example
from opd_env.tasks.bfcl_backends import Backends, functions_of
from opd_env.tasks.bfcl_multi_turn import CATEGORIES, BFCLMultiTurn, judge, read_call

CHANGED = 9
"""Changed versions of each problem's gold calls."""
Calls = list[list[ToolCall]]


def audit() -> int:
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker

    rng = random.Random(0)
    right = problems = outputs = passed = explained = different = 0
    for category in CATEGORIES:
        for example in BFCLMultiTurn(category=category):
            about = example.metadata
            row = {"id": example.id, "initial_config": about["config"], "involved_classes": about["classes"]}
            gold = _gold(example)
            for number in range(1 + CHANGED):
                done = gold if number == 0 else _changed(gold, example, rng)
                ours = not judge(about["classes"], about["config"], done, about["gold"])[1]
                texts = [[[_source(call)] for call in calls] for calls in done]
                theirs = multi_turn_checker(texts, about["gold"], row, about["category"], f"m{number}")["valid"]
                problems += number == 0
                right += number == 0 and ours and theirs
                outputs += 1
                passed += ours
                if ours != theirs:
                    rewritten = any(re.search(r"\w\s*\(", repr(call.arguments)) for calls in done for call in calls)
                    explained += rewritten
                    different += not rewritten
                    why = "the harness may rewrite `name(` inside an argument" if rewritten else "not explained"
                    print(f"- {example.id}: ours {ours}, official {theirs} ({why}): {texts}")
    print(f"gold: {right} of {problems} right by both")
    print(f"{outputs} outputs, {passed} right: {different} disagreements, and {explained} explained")
    return different + problems - right


def _gold(example: Example) -> Calls:
    backends = Backends(example.metadata["classes"], example.metadata["config"])
    turns = [[read_call(text) for text in texts] for texts in example.metadata["gold"]]
    return [[ToolCall(one.name, backends.named(one.name, *one.args, **one.keywords)) for one in turn] for turn in turns]


def _source(call: ToolCall) -> str:
    return f"{call.name}({', '.join(f'{name}={value!r}' for name, value in call.arguments.items())})"


def _changed(gold: Calls, example: Example, rng: random.Random) -> Calls:
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
            names: Sequence[str] = [one["name"] for one in functions_of(example.metadata["classes"])]
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


def _other(value: object, rng: random.Random) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice([value + 1, -value, str(value), float(value)])
    if isinstance(value, str):
        return rng.choice([value + "x", value.upper(), "", [value]])
    return rng.choice([None, "x", value[::-1] if isinstance(value, list) else {}])
