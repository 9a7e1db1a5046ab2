"""Reads back what a run or an evaluation left in its folder, for reports.

Worked example::

    run = Run.read("runs/demo")
    run.models["after"].accuracy            # from results.json
    run.metrics[-1]["teacher/kl"]           # from metrics.jsonl

Whatever is missing is empty; whatever is damaged is an error that names file and line.

Test it alone: ``pytest tests/report/test_page.py``
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from opd_env.episode.store import load_written
from opd_env.episode.trajectory import Decode, Trajectory
from opd_env.evaluation.counts import REQUIRED, Played, Summary, tally
from opd_env.evaluation.statistics import Rate

MODELS = {"before": "Student before", "after": "Student after", "teacher": "Teacher", "evaluation": "Model"}
"""Entries of ``results.json``, in the order of the page, and what they are called."""


@dataclass(frozen=True)
class Model:
    """One evaluated model."""

    key: str
    """A key of ``MODELS``; members of a mixture of teachers share one."""
    title: str
    accuracy: Rate
    summary: Summary | None
    """None when ``results.json`` holds only the headline numbers."""
    label: str
    """The task and the tools that could be used; empty when it was not stored."""
    trajectories: Sequence[Trajectory]
    """Its episodes; empty when they were not stored."""
    log_ratios: Mapping[str, Sequence[float]]
    """Teacher minus student log-probs of an episode's sampled tokens, by ``example_id/sample``, if stored."""

    @cached_property
    def played(self) -> dict[str, Sequence[Played]]:
        """Its episodes by example id; reads all of them once."""
        return {key[1]: episodes for key, episodes in tally(self.trajectories).played.items()}

    @property
    def scores(self) -> dict[str, float]:
        """Share of correct episodes per problem."""
        return {key: sum(one.correct for one in episodes) / len(episodes) for key, episodes in self.played.items()}

    @property
    def first_episodes(self) -> dict[str, Played]:
        """The first episode of each problem."""
        return {key: one for key, episodes in self.played.items() for one in episodes if one.sample == 0}


@dataclass(frozen=True)
class Run:
    """A run folder."""

    name: str
    config: Mapping[str, Any]
    config_text: str
    results: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    models: Mapping[str, Model]
    """By key of ``results.json``, in the order of ``MODELS``; then ``teacher_2`` … of a mixture of teachers."""
    evaluated: Sequence[tuple[float, Summary]]
    """Evaluations of the student by step: before, during and after training."""
    decode: Decode | None
    """Text of token ids, by the newest ``tokenizer.json`` in the folder."""

    def setting(self, name: str) -> Any:
        """What ``config.yaml`` says of a dotted name, such as ``teacher.model``; None if it says nothing."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    @property
    def teachers(self) -> list[Model]:
        """The teacher; the members of a mixture, in the order in which ``teacher`` names them."""
        return [model for model in self.models.values() if model.key == "teacher"]

    @property
    def teacher(self) -> str:
        """The name of the teacher, or such as ``0.7 × mathematician + 0.3 × searcher``."""
        return mixture_text(self.results) or str(self.setting("teacher.model") or "")

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Reads a folder.

        Raises:
            ValueError: it holds nothing to report, or a file in it is damaged.
        """
        folder = Path(folder)
        results, metrics = read_json(folder / "results.json"), read_metrics(folder / "metrics.jsonl")
        if not results and not metrics:
            raise ValueError(f"{str(folder)!r} holds no results.json and no metrics.jsonl: there is nothing to report")
        entries = {key: (title, results.get(key)) for key, title in MODELS.items()}
        for number, entry in enumerate(mixture_of(results).values(), start=1):
            entries[entry["evaluation"]] = (f"Teacher {number}", entry)
        models = {key: model for key, entry in entries.items() if (model := _model(folder, key, *entry)) is not None}
        text = _text(folder / "config.yaml")
        return cls(
            name=folder.resolve().name,
            config=_yaml(text, folder / "config.yaml"),
            config_text=text,
            results=results,
            metrics=metrics,
            models=models,
            evaluated=_evaluated(folder, metrics, models),
            decode=tokenizer_of(folder),
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; none when there is no file. A last line that a kill cut short is left out.

    Raises:
        ValueError: another line is no JSON object.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_text(path).splitlines(keepends=True), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if not line.endswith("\n"):
                break
            raise ValueError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; empty when there is no file.

    Raises:
        ValueError: the file holds something else.
    """
    text = _text(path)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def mixture_of(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What ``results.json`` tells of each member of a mixture of teachers; empty for one teacher, and in runs that were
    begun before weights were noted."""
    return {name: entry for name, entry in results.get("teachers", {}).items() if "weight" in entry}


def mixture_text(results: Mapping[str, Any]) -> str:
    """Its weights and members, such as ``0.7 × mathematician + 0.3 × searcher``; empty when there is none."""
    return " + ".join(f"{entry['weight']:g} × {name}" for name, entry in mixture_of(results).items())


def _model(folder: Path, key: str, title: str, entry: Any) -> Model | None:
    if not isinstance(entry, dict) or entry.get("accuracy") is None:
        return None
    low, high = entry["accuracy_ci"]
    accuracy = Rate(entry["accuracy"], low, high, entry["n"])
    place = folder if key == "evaluation" else folder / "evaluations" / key
    return Model(
        key=key.partition("_")[0],
        title=title,
        accuracy=accuracy,
        summary=Summary.from_json(entry) if set(entry) >= REQUIRED else None,
        label=str(read_json(place / "results.json").get("evaluation", {}).get("label", "")),
        trajectories=load_written(place, "trajectories") or (),
        log_ratios=read_json(place / "log_ratios.json"),
    )


def _evaluated(
    folder: Path, metrics: Sequence[Mapping[str, Any]], models: Mapping[str, Model]
) -> list[tuple[float, Summary]]:
    found = []
    for file in sorted(folder.glob("evaluations/step_*/results.json")):
        entry = read_json(file).get("evaluation", {})
        if set(entry) >= REQUIRED:
            found.append((float(file.parent.name.removeprefix("step_")), Summary.from_json(entry)))
    ends = [models[key].summary if key in models else None for key in ("before", "after")]
    if ends[0] is not None:
        found.insert(0, (0.0, ends[0]))
    if ends[1] is not None and metrics:
        found.append((float(metrics[-1].get("step", len(metrics))), ends[1]))
    return found


def tokenizer_of(folder: Path) -> Decode | None:
    """Text of token ids, by the newest ``tokenizer.json`` below ``folder``; None when there is none."""
    files = sorted(folder.glob("**/tokenizer.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(files[-1]))
    return partial(tokenizer.decode, skip_special_tokens=False)


def _yaml(text: str, path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return config if isinstance(config, dict) else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
