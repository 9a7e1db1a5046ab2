"""The arms of the study: what each changes in ``study.yaml``, and which are the same run under two names.

Worked example::

    arm_named("jsd_opd").config(seed=0, output="runs/mine")         # an OPDConfig

Three identities save runs; ``tests/benchmarks/test_opd_plus_study.py`` checks them on the advantages themselves:

- reverse KL: ``opd`` = ``opd_plus_centred``, both are ln u
- JSD, and every f with f'(1) = 0: ``opd_plus`` = ``opd_plus_centred``
- forward KL: the value baseline E_p[u] is 1, which is what centring subtracts

Test it alone: ``pytest tests/benchmarks/test_opd_plus_study.py``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_env.settings.fields import changed
from opd_env.trainer import OPDConfig, load_config, register_divergence

SHARED = Path(__file__).with_name("study.yaml")


class Kind(StrEnum):
    """What is done with the student."""

    AS_IT_IS = "as_it_is"
    """Nothing: the student before training."""
    TEACHER = "teacher"
    """Nothing, and it is the teacher that is evaluated."""
    ON_POLICY = "on_policy"
    """The training loop: rollouts, teacher, updates."""
    SUPERVISED = "supervised"
    """As many updates on expert episodes, with as many tokens as the first on-policy arm has sampled."""


@dataclass(frozen=True)
class Arm:
    """One way to train, run once per seed."""

    name: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What differs from ``study.yaml``, by dotted name."""
    kind: Kind = Kind.ON_POLICY
    same_as: str = ""
    """Other names of the same run."""

    def config(self, seed: int, output: str | Path, changes: Mapping[str, Any] | None = None) -> OPDConfig:
        """The settings of one run; ``changes`` are those of the whole study."""
        shared = load_config([str(SHARED)])
        return changed(shared, {**self.settings, **(changes or {}), "run.seed": seed, "run.output": str(output)})


def _arm(name: str, label: str, divergence: str, mode: str, same_as: str = "", **more: Any) -> Arm:
    objective = {"divergence": divergence, "mode": mode, **more}
    return Arm(name, label, {f"objective.{key}": value for key, value in objective.items()}, same_as=same_as)


ARMS = (
    Arm("student", "student before", kind=Kind.AS_IT_IS),
    Arm("teacher", "teacher", kind=Kind.TEACHER),
    _arm("reverse_kl_opd", "reverse KL, OPD", "reverse_kl", "opd", same_as="reverse KL, centred"),
    _arm("reverse_kl_opd_plus", "reverse KL, OPD+", "reverse_kl", "opd_plus"),
    _arm("forward_kl_opd", "forward KL, OPD", "forward_kl", "opd"),
    _arm("forward_kl_opd_plus", "forward KL, OPD+", "forward_kl", "opd_plus"),
    _arm("forward_kl_centred", "forward KL, centred", "forward_kl", "opd_plus_centred", same_as="with value baseline"),
    _arm("jsd_opd", "JSD, OPD", "jsd", "opd"),
    _arm("jsd_opd_plus", "JSD, OPD+", "jsd", "opd_plus", same_as="JSD, centred"),
    _arm("total_variation", "total variation, OPD+", "total_variation", "opd_plus", same_as="centred"),
    _arm("hellinger", "Hellinger, OPD+", "hellinger", "opd_plus", same_as="centred"),
    _arm("constant", "constant −1", "constant", "opd_plus"),
    _arm("reverse_kl_value", "reverse KL, value baseline", "reverse_kl", "opd_plus", baseline="value"),
    _arm("reverse_kl_full", "reverse KL, exact over the vocabulary", "reverse_kl", "opd_plus", estimator="full"),
    Arm("reward", "reward only", settings={
        "objective.divergence_coefficient": 0.0, "objective.reward_coefficient": 1.0, "sampling.samples_per_problem": 8,
    }),
    Arm("sft", "SFT on expert episodes", kind=Kind.SUPERVISED),
)  # fmt: skip
REFERENCE = "reverse_kl_opd"
"""The first on-policy arm: others are compared with it, and the supervised arm takes its number of tokens."""
COMPARISONS = (
    ("forward_kl_opd", "forward_kl_opd_plus"),
    ("forward_kl_opd", "forward_kl_centred"),
    ("forward_kl_opd_plus", "forward_kl_centred"),
    ("jsd_opd", "jsd_opd_plus"),
    ("reverse_kl_opd_plus", "reverse_kl_opd"),
    ("reverse_kl_opd", "forward_kl_centred"),
    ("reverse_kl_opd", "jsd_opd_plus"),
    ("reverse_kl_opd", "total_variation"),
    ("reverse_kl_opd", "hellinger"),
    ("reverse_kl_opd", "reverse_kl_value"),
    ("reverse_kl_opd", "reverse_kl_full"),
    ("constant", "reverse_kl_opd_plus"),
    ("sft", "reverse_kl_opd"),
    ("reward", "reverse_kl_opd"),
)
"""The questions that were asked before the runs, as (first, second): is the second better?"""


def arm_named(name: str) -> Arm:
    """The arm of that name.

    Raises:
        ValueError: there is none.
    """
    for arm in ARMS:
        if arm.name == name:
            return arm
    raise ValueError(f"no arm {name!r}; there are {', '.join(arm.name for arm in ARMS)}")


def _nothing(u: Tensor) -> Tensor:
    """``1 − u`` is 0 in expectation whatever the teacher says, and its OPD+ weight is −1 for every token.

    Beyond log u = 8, which ``clip_log_ratio: 6`` keeps out, it bends: a linear f is refused as no divergence.
    """
    return 1 - u + torch.relu(u - 2981.0) ** 2


def register_control() -> None:
    """Makes the divergence of the arm ``constant`` known, when it is to run: it is none, and would fail ``certify``."""
    register_divergence("constant", _nothing)
