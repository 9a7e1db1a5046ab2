"""BFCL's multi-turn rules against `multi_turn_checker` of bfcl-eval, on the gold calls and on changed ones.

Run by `run.py`. The official checker evaluates calls as Python source; ours runs them by name.
"""

from __future__ import annotations

import random
import re

from opd_env.tasks.function_calls.bfcl_multi_turn import CATEGORIES, BFCLMultiTurn, judge
from tests.tasks.bfcl_changes import changed, gold_calls, official_verdict

CHANGED = 9
"""Changed versions of each problem's gold calls."""


def audit() -> int:
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker

    rng = random.Random(0)
    right = problems = outputs = passed = explained = different = 0
    for category in CATEGORIES:
        for example in BFCLMultiTurn(category=category):
            about = example.metadata
            gold = gold_calls(example)
            for number in range(1 + CHANGED):
                done = gold if number == 0 else changed(gold, example, rng)
                ours = not judge(about["classes"], about["config"], done, about["gold"])[1]
                theirs = official_verdict(multi_turn_checker, example, done, f"m{number}")
                problems += number == 0
                right += number == 0 and ours and theirs
                outputs += 1
                passed += ours
                if ours != theirs:
                    rewritten = any(re.search(r"\w\s*\(", repr(call.arguments)) for calls in done for call in calls)
                    explained += rewritten
                    different += not rewritten
                    why = "the harness may rewrite `name(` inside an argument" if rewritten else "not explained"
                    print(f"- {example.id}: ours {ours}, official {theirs} ({why}): {done}")
    print(f"gold: {right} of {problems} right by both")
    print(f"{outputs} outputs, {passed} right: {different} disagreements, and {explained} explained")
    return different + problems - right
