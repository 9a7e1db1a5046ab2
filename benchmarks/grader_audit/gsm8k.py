"""`score_answer` against the harness's own extraction and comparison, on changed gold solutions.

Run by `run.py`. The two functions are taken out of the installed sources, for the package itself cannot be imported
without everything that it asks for.
"""

from __future__ import annotations

import ast
import random
import re
import string
import sys
import types
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np

from opd_env.tasks.gsm8k import GSM8K, score_answer

COMPARISON = {
    "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
    "ignore_case": True,
    "ignore_punctuation": False,
}
"""From `tasks/gsm8k/gsm8k.yaml`, as are the two expressions in `audit`."""


def audit(path: str | None, packages: Path) -> int:
    regex_filter, exact_match = _harness(packages / "lm_eval")
    filters = (
        regex_filter("#### (\\-?[0-9\\.\\,]+)"),
        regex_filter("(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
    )
    rng = random.Random(0)
    outputs = different = strict = flexible = 0
    for solution in (example.metadata["solution"] for example in GSM8K("test", path=path)):
        for output in _changed(solution, rng):
            theirs = [
                bool(exact_match(one.apply([[output]], [{}])[0], [solution], **COMPARISON)["exact_match"])
                for one in filters
            ]
            ours = score_answer(output, solution)
            outputs += 1
            strict += ours.strict
            flexible += ours.flexible
            if [ours.strict, ours.flexible] != theirs:
                different += 1
                print(f"- {output!r}: ours {ours}, the harness's {theirs}")
    print(f"{outputs} outputs, {strict} right by strict and {flexible} by flexible: {different} disagreements")
    return different


def _harness(folder: Path):  # type: ignore[no-untyped-def]
    """The harness's `RegexFilter` and `exact_match_hf_evaluate`."""
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.filter", "lm_eval.api.registry"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["lm_eval.api.filter"].Filter = object  # type: ignore[attr-defined]
    sys.modules["lm_eval.api.registry"].register_filter = lambda name: lambda cls: cls  # type: ignore[attr-defined]
    spec = spec_from_file_location("lm_eval_extraction", folder / "filters" / "extraction.py")
    assert spec is not None
    assert spec.loader is not None
    extraction = module_from_spec(spec)
    spec.loader.exec_module(extraction)
    module = ast.parse((folder / "api" / "metrics.py").read_text())
    wanted = [node for node in module.body if getattr(node, "name", "") == "exact_match_hf_evaluate"]
    names = {"np": np, "re": re, "string": string}
    exec(compile(ast.Module(wanted, []), "metrics.py", "exec"), names)
    return extraction.RegexFilter, names["exact_match_hf_evaluate"]


def _changed(solution: str, rng: random.Random) -> Iterator[str]:
    gold = solution.rpartition("####")[2].strip()
    yield from (solution, solution.replace("#### ", "####"), solution + ".", solution + " dollars.", solution + ".00")
    yield from (f"The answer is {gold}", f"The answer is ${gold}.", f"#### {gold}\n#### 5", f"#### 5\n#### {gold}")
    yield from (f"{gold} and then ...", f"{gold} -", f"#### ${gold}", f"#### -{gold}", rf"\boxed{{{gold}}}")
    yield from ("", "...", "#### ,", solution.upper())
    for _ in range(3):
        letters = list(solution)
        for _ in range(rng.randint(1, 6)):
            letters[rng.randrange(len(letters))] = rng.choice("0123456789.,$-# \nx")
        yield "".join(letters)
    yield solution[: rng.randrange(len(solution))]
    yield solution[rng.randrange(len(solution)) :]
