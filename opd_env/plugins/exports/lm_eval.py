"""An evaluation as ``lm-eval`` writes it: ``results_….json`` and ``samples_….jsonl``.

The shape of version 0.4.13 (``lm_eval/result_schema.py``). The task's name starts with ``opd_env_`` and says whether
tools were used: it is another protocol than the harness's task of the same name, and must not be mixed with it.

Test it alone: ``pytest tests/plugins/exports/test_exports.py``
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opd_env.episode.files import write_whole
from opd_env.evaluation.comparison import Side
from opd_env.evaluation.counts import NEITHER_GOOD_NOR_BAD, WORSE_WHEN_HIGHER, fractions, rate_of
from opd_env.evaluation.run import fingerprint_of
from opd_env.evaluation.statistics import standard_error

_FILTER = "none"


def write_lm_eval(side: Side, output: Path) -> list[Path]:
    """Writes both files into ``output/MODEL``."""
    settings = side.settings
    task = f"opd_env_{settings['task']}{'_with_tools' if settings['tools'] else ''}"
    model = re.sub(r"[\"<>:/\|\\?\*\[\]]+", "__", settings["model"]) or "model"
    date = datetime.fromtimestamp(side.finished, UTC).replace(tzinfo=None).isoformat().replace(":", "-")
    samples = _samples(side)
    files = {
        f"results_{date}.json": json.dumps(_results(side, task, model, samples), indent=2, ensure_ascii=False),
        f"samples_{task}_{date}.jsonl": "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in samples),
    }
    paths = [output / model / name for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        write_whole(path, text)
    return paths


def _results(side: Side, task: str, model: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    settings = side.settings
    metrics: dict[str, Any] = {"name": task, "alias": f"{task} ({side.label})", "sample_len": len(samples)}
    better: dict[str, bool | None] = {}
    for name, fraction in fractions(side.table).items():
        found, error = rate_of(fraction), standard_error(*fraction)
        if found.n:
            metrics[f"{name},{_FILTER}"] = found.value
            metrics[f"{name}_stderr,{_FILTER}"] = error if error == error else "N/A"
            better[name] = None if name in NEITHER_GOOD_NOR_BAD else name not in WORSE_WHEN_HIGHER
    hashes = "".join(one["doc_hash"] + one["prompt_hash"] + one["target_hash"] for one in samples)
    return {
        "results": {task: metrics},
        "group_subtasks": {task: []},
        "configs": {task: {"task": task, "dataset_name": settings["task"], "test_split": settings["split"]}},
        "versions": {task: settings["version"]},
        "n-shot": {task: 0},
        "higher_is_better": {task: better},
        "n-samples": {task: {"original": settings["size"], "effective": len(samples)}},
        "config": {
            "model": "opd-env",
            "model_args": settings["model"],
            "model_sha": settings.get("weights_hash", ""),
            "gen_kwargs": dict(settings["sampling"]),
            "limit": settings.get("problems"),
            "random_seed": settings["seed"],
        },
        "date": side.finished,
        "model_source": "opd-env",
        "model_name": settings["model"],
        "model_name_sanitized": model,
        "chat_template_sha": settings.get("template_hash"),
        "task_hashes": {task: _sha(hashes)},
        "opd_env": {"settings": dict(settings), "versions": dict(side.versions)},
    }


def _samples(side: Side) -> list[dict[str, Any]]:
    """One entry per problem; its episodes are the repeats."""
    settings = side.settings
    rows = []
    for number, (key, episodes) in enumerate(side.table.played.items()):
        played = [side.trajectories[one.place] for one in episodes]
        document = {"id": key[1], "question": side.table.questions[key]}
        rows.append(
            {
                "doc_id": number,
                "doc": document,
                "target": "",
                "arguments": {"gen_args_0": {"arg_0": document["question"], "arg_1": dict(settings["sampling"])}},
                "resps": [["\n".join(turn.text for turn in one.turns) for one in played]],
                "filtered_resps": [one.extracted or one.answer or "" for one in played],
                "filter": _FILTER,
                "metrics": ["accuracy"],
                "doc_hash": fingerprint_of(document),
                "prompt_hash": _sha(document["question"]),
                "target_hash": _sha(""),
                "accuracy": sum(one.correct for one in played) / len(played),
            }
        )
    return rows


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
