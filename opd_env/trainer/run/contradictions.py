"""Settings that are fine alone and cannot give a right run together: refused with the reason, before anything loads.

Worked example::

    refuse_contradictions(OPDConfig(…, estimator="full", gamma=0.5))     # ConfigError: gamma=0.5 has no meaning with …

Test it alone: ``pytest tests/trainer/run/test_config.py``
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from opd_env.engines.servers.urls import is_url
from opd_env.formats import format_named
from opd_env.settings.fields import ConfigError
from opd_env.trainer.learn.token_weights import Scheme
from opd_env.trainer.math.modes import Baseline, Estimator, Mode, RatioPolicy

if TYPE_CHECKING:
    from opd_env.trainer.run.config import OPDConfig


def refuse_contradictions(config: OPDConfig) -> None:
    """Checks everything that more than one setting decides.

    Raises:
        ConfigError: one sentence on what contradicts what, and what to set instead.
    """
    if config.chat_format is not None:
        try:
            format_named(config.chat_format)
        except ValueError as error:
            raise ConfigError(f"chat_format: {error}") from error
    _off_policy(config)
    _counts(config)
    _estimate(config)
    _cross_tokenizer(config)
    _reward(config)
    _ahead(config)
    _mixture(config)
    _servers(config)


def _off_policy(config: OPDConfig) -> None:
    reason = "would make the rollouts off-policy (OPD needs samples from the full distribution)"
    if config.top_p != 1.0:
        raise ConfigError(f"top_p={config.top_p} {reason}; set top_p=1.0")
    if config.top_k != 0:
        raise ConfigError(f"top_k={config.top_k} {reason}; set top_k=0")


def _counts(config: OPDConfig) -> None:
    if config.eval_split == config.split:
        raise ConfigError(f"eval_split and split are both {config.split!r}; evaluate on a split that is not trained on")
    if config.episodes_per_step % config.samples_per_problem:
        raise ConfigError(
            f"episodes_per_step={config.episodes_per_step} is not a multiple of "
            f"samples_per_problem={config.samples_per_problem}; change one"
        )
    if config.eval_samples > 1 and config.eval_temperature == 0:
        raise ConfigError(
            f"eval_samples={config.eval_samples} of greedy decoding would all be the same; set eval_temperature, or "
            "eval_samples=1"
        )
    problems = config.episodes_per_step // config.samples_per_problem
    if config.updates_per_step > problems:
        raise ConfigError(
            f"updates_per_step={config.updates_per_step} is more than the {problems} problems of a step; every "
            "update needs one"
        )
    updates = config.steps * config.updates_per_step
    if config.warmup_steps > updates:
        raise ConfigError(f"warmup_steps={config.warmup_steps} is more than the run's {updates} updates; lower it")


def _estimate(config: OPDConfig) -> None:
    if config.clip_ratio is not None and config.truncate_weight is not None:
        raise ConfigError("clip_ratio and truncate_weight bound the same importance ratio; set one of them")
    if config.baseline is Baseline.VALUE and config.mode is Mode.OPD:
        raise ConfigError(
            "baseline=value is the mean of the OPD+ weight and has no meaning with mode=opd; set mode=opd_plus"
        )
    if config.estimator is Estimator.SAMPLED:
        centred = config.mode is not Mode.OPD_PLUS or config.baseline is Baseline.VALUE
        known = config.weights.known_before_the_token and config.weight_scheme is Scheme.NONE
        if not centred and not known:
            raise ConfigError(
                "these weights depend on the sampled token or on what follows, so that the constant in the advantage "
                "of mode=opd_plus would push the student; set mode=opd_plus_centred or baseline=value"
            )
        return
    if config.estimator is Estimator.FULL and (config.teacher_routes or config.teacher_cache):
        name = "teacher_routes" if config.teacher_routes else "teacher_cache"
        raise ConfigError(
            f"{name} is for log-probs, and estimator=full takes one teacher's logits of every token; set "
            "estimator=topk or estimator=sampled"
        )
    for name, off in (("gamma", 0.0), ("baseline", Baseline.NONE), ("clip_ratio", None), ("truncate_weight", None)):
        if getattr(config, name) != off:
            raise ConfigError(
                f"{name}={getattr(config, name)} has no meaning with estimator={config.estimator}, which sums over "
                f"what could have been sampled at each token; set estimator=sampled, or leave {name} out"
            )


def _cross_tokenizer(config: OPDConfig) -> None:
    if not config.cross_tokenizer:
        return
    if config.estimator is not Estimator.SAMPLED:
        raise ConfigError(
            f"cross_tokenizer compares spans of text, and estimator={config.estimator} needs one vocabulary; set "
            "estimator=sampled"
        )
    for name, off in (
        ("baseline", Baseline.NONE), ("gamma", 0.0), ("weight_scheme", Scheme.NONE), ("teacher_demonstrations", 0),
        ("teacher_sees_answer", False), ("teacher_routes", {}), ("teacher_mixture", {}),
        ("teacher_cache", None),
    ):  # fmt: skip
        if getattr(config, name) != off:
            raise ConfigError(
                f"{name}={getattr(config, name)} does not work with cross_tokenizer, which judges spans of text by one "
                f"teacher that reads what the student read; leave {name} out"
            )


def _reward(config: OPDConfig) -> None:
    if config.reward_coefficient > 0 and config.samples_per_problem == 1:
        raise ConfigError(
            f"reward_coefficient={config.reward_coefficient} compares a problem's samples with each other, and "
            "samples_per_problem=1 leaves nothing to compare; set samples_per_problem to 4 or more"
        )
    if config.divergence_coefficient == config.reward_coefficient == 0:
        raise ConfigError("divergence_coefficient and reward_coefficient are both 0: nothing would be learnt; set one")


def _ahead(config: OPDConfig) -> None:
    """What an importance ratio per token does not correct."""
    if not config.rollout_ahead:
        return
    if config.estimator is Estimator.SAMPLED and config.ratio_policy is not RatioPolicy.CURRENT:
        raise ConfigError(
            "rollout_ahead samples with the student of one step before, and ratio_policy=rollout would compare the "
            "teacher with that one, which biases the update; set ratio_policy=current"
        )
    if config.gamma > 0:
        raise ConfigError(
            f"gamma={config.gamma} counts the divergence of later tokens, which with rollout_ahead an older student "
            "chose, and no ratio of a token corrects that; set gamma=0, or leave rollout_ahead out"
        )
    if config.cross_tokenizer:
        raise ConfigError(
            "cross_tokenizer compares spans of tokens, and the ratio of a token does not correct that an older student "
            "chose the others; leave rollout_ahead or cross_tokenizer out"
        )


def _mixture(config: OPDConfig) -> None:
    weights = config.teacher_mixture
    if not weights:
        return
    if config.teacher not in weights:
        raise ConfigError(
            f"teacher_mixture names {', '.join(weights)} but not the teacher {config.teacher}; give all teachers of "
            "the mixture, and name one of them as teacher"
        )
    numbers = all(isinstance(weight, int | float) and weight > 0 for weight in weights.values())
    if not numbers or abs(math.fsum(weights.values()) - 1) > 1e-6:
        shown = ", ".join(f"{name}: {weight}" for name, weight in weights.items())
        raise ConfigError(f"teacher_mixture is {{{shown}}}; the weights must be above 0 and add up to 1")
    if config.needs_distributions and _by_vllm(config):
        option = "baseline=value" if config.estimator is Estimator.SAMPLED else f"estimator={config.estimator}"
        raise ConfigError(
            f"{option} needs the whole distribution of the teacher_mixture, and vLLM gives few tokens of each "
            "member; set estimator=sampled and baseline=none, or teacher_engine=local and models instead of URLs"
        )


def _servers(config: OPDConfig) -> None:
    """What vLLM's API cannot give."""
    if config.engine not in ("local", "vllm") and not is_url(config.engine):
        raise ConfigError(
            f"engine={config.engine!r} is unknown; set local, vllm, or the URL of a vLLM server such as "
            "http://127.0.0.1:8000"
        )
    outside = _by_vllm(config)
    if config.temperature != 1.0 and (config.engine != "local" or outside):
        raise ConfigError(
            f"temperature={config.temperature}: vLLM reports log-probs at temperature 1 only; set temperature=1, or "
            "engine=local and a local teacher"
        )
    if (config.engine != "local" or outside) and config.eval_temperature not in (0.0, 1.0):
        raise ConfigError(
            f"eval_temperature={config.eval_temperature} with engine={config.engine}, teacher={config.teacher}: vLLM "
            "reports log-probs at temperature 1 only; set eval_temperature to 0 or 1"
        )
    both_in_process = config.engine == config.teacher_engine == "vllm"
    if config.rollout_ahead and both_in_process:
        raise ConfigError(
            "rollout_ahead with engine=vllm and teacher_engine=vllm would run two vLLM at once in one process, which "
            "share state; put one of them behind a server, or leave rollout_ahead out"
        )
    if not outside:
        return
    if config.estimator is Estimator.FULL:
        raise ConfigError(
            "estimator=full needs the teacher's logits, and vLLM gives log-probs of few tokens; set estimator=sampled, "
            "or estimator=topk with topk_tokens up to a server's --max-logprobs (20 by default)"
        )
    for name, off in (("cross_tokenizer", False), ("teacher_cache", None)):
        if getattr(config, name) != off:
            raise ConfigError(
                f"{name} needs a teacher in this process that transformers runs, not {outside}; name a model, with "
                "teacher_engine=local"
            )
    if config.teacher_offload and config.teacher_engine is not config.teacher_engine.LOCAL:
        raise ConfigError("teacher_offload is for teachers of teacher_engine=local; vLLM keeps its own memory")


def _by_vllm(config: OPDConfig) -> str:
    """Names of teachers that vLLM runs; empty if there is none."""
    names = (config.teacher, *config.teacher_mixture, *config.teacher_routes.values())
    in_process = config.teacher_engine is not config.teacher_engine.LOCAL
    return ", ".join(dict.fromkeys(name for name in names if in_process or is_url(name)))
