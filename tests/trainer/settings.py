"""Settings for tests, written as keywords: ``small(steps=3, evaluation_every=1)``.

A keyword is a setting's last name where only one group has it (``steps``), or the dotted name with underscores
(``evaluation_every``). A few more are in ``PLAIN``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd_env.settings.fields import build, changed, field_types, nested_type
from opd_env.trainer.learn.objective import OPDObjective
from opd_env.trainer.run.config import OPDConfig

PLAIN = {
    "student": "student.model", "teacher": "teacher.model", "engine": "sampling.engine", "dtype": "student.dtype",
    "temperature": "sampling.temperature",
}  # fmt: skip

BASE = {"student": {"model": "student"}, "teacher": {"model": "teacher"}, "task": "arithmetic"}


def _names(settings: Any, prefix: str = "") -> list[str]:
    found = []
    for name, annotation in field_types(settings).items():
        nested = nested_type(annotation)
        found += [f"{prefix}{name}", *(_names(nested, f"{prefix}{name}.") if nested is not None else [])]
    return found


def dotted(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same options by their dotted names."""
    known = _names(OPDConfig)
    found = {}
    for keyword, value in options.items():
        if keyword in PLAIN:
            found[PLAIN[keyword]] = value
            continue
        exact = [name for name in known if name.replace(".", "_") == keyword]
        last = [name for name in known if name.rpartition(".")[2] == keyword and name.count(".") == 1]
        (name,) = exact or last  # or the keyword names no setting, or more than one
        found[name] = value
    return found


def config_of(**options: Any) -> OPDConfig:
    """Settings with the defaults, but for these."""
    return changed(build(OPDConfig, BASE), dotted(options))


def changed_by(config: OPDConfig, **options: Any) -> OPDConfig:
    """The same settings but for these."""
    return changed(config, dotted(options))


def objective_for(config: OPDConfig, teacher: Any, vocab_size: int) -> OPDObjective:
    """The objective of a run with these settings."""
    return OPDObjective(
        config.objective,
        teacher,
        vocab_size,
        temperature=config.sampling.temperature,
        samples_per_problem=config.sampling.samples_per_problem,
    )
