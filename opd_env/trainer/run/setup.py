"""Builds the parts of a run from its settings, and refuses what does not fit together.

Test it alone: ``pytest tests/trainer/run/test_setup.py``
"""

from __future__ import annotations

import importlib.util
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from opd_env.engines.models import LoadedModel, load_model, without_bars
from opd_env.errors import unknown
from opd_env.formats import ChatFormat, TemplateFormat, get_format
from opd_env.settings.fields import ConfigError, flat_dict
from opd_env.tasks import Task, load_task, require_trainable
from opd_env.tools import Toolbox
from opd_env.trainer.run.config import LoRASettings, OPDConfig
from opd_env.trainer.teachers.make import Needs, Single, Teachers, make_teachers

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""How long processes wait for one that lives: it may play a whole evaluation. PyTorch's own is 10 or 30 minutes."""


@dataclass(frozen=True)
class Parts:
    """What a run works with."""

    task: Task
    eval_task: Task
    student: LoadedModel
    """With adapters, if the settings ask for them."""
    chat: TemplateFormat
    teachers: Teachers

    @property
    def teacher(self) -> Single:
        """The teacher that the settings name."""
        return self.teachers.named

    def save_student(self, folder: Path) -> None:
        """Writes the student as a plain model and tokenizer. Adapters are merged into it for good."""
        model = self.student.model
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        with without_bars():
            model.save_pretrained(folder)
        self.student.tokenizer.save_pretrained(folder)


def make_parts(
    config: OPDConfig, device: torch.device, *, student: LoadedModel | None = None, teacher: LoadedModel | None = None
) -> Parts:
    """Loads tasks and models.

    Args:
        config: all settings.
        device: for all models.
        student, teacher: loaded already, or None to load what ``config`` names.

    Raises:
        ValueError: a name is unknown, the split is not for training, or the models do not fit each other.
        ModelUnavailable: a model cannot be loaded.
    """
    config.register()
    task = load_task(config.task, config.split, **config.task_options)
    require_trainable(task)
    eval_task = load_task(config.task, config.evaluation.split, **config.task_options)
    student = student or load_model(config.student.model, dtype=config.student.dtype, device=device)
    chat = get_format(student.tokenizer, config.student.chat_format, repair=config.student.repair_calls)
    _require_room(task, chat, config)
    teachers = make_teachers(config.teacher, _needs(config), [task, eval_task], chat, student, device, teacher)
    if config.student.lora is not None:
        student = LoadedModel(
            _with_adapters(student.model, config.student.lora, config.run.seed), student.tokenizer, student.name
        )
    return Parts(
        task=task,
        eval_task=eval_task,
        student=student,
        chat=chat,
        teachers=teachers,
    )


def _needs(config: OPDConfig) -> Needs:
    return Needs(
        max_tokens=config.sampling.limits.max_tokens,
        tools=config.tools,
        chat_format=config.student.chat_format,
        temperature=config.sampling.temperature,
        topk_tokens=config.objective.topk_tokens if config.objective.needs_distributions else None,
        seed=config.run.seed,
        tokens_per_microbatch=config.optimizer.tokens_per_microbatch,
        concurrent_episodes=config.sampling.concurrent_episodes,
        vllm_options=config.sampling.vllm_options,
    )


def _require_room(task: Task, chat: ChatFormat, config: OPDConfig) -> None:
    """Refuses unknown tools, and prompts that leave no room for an answer."""
    with Toolbox(task.tools_of(task[0]) if config.tools is None else config.tools) as toolbox:
        length = len(chat.render_prompt(task[0].messages, toolbox.schemas))
    if length >= config.sampling.limits.max_tokens:
        raise ConfigError(
            f"sampling.limits.max_tokens={config.sampling.limits.max_tokens} leaves no room for an answer: the first "
            f"prompt of task {config.task} has {length} tokens; raise it"
        )


def sandbox_levels(config: OPDConfig, task: Task) -> dict[str, Any]:
    """What holds the code that the student writes, by the tool that runs it; and by node, in a cluster."""
    with Toolbox(task.tools if config.tools is None else config.tools) as toolbox:
        levels, nodes = toolbox.sandbox_levels(), toolbox.sandbox_nodes()
    return {"sandbox": levels, **({"sandbox_nodes": nodes} if nodes else {})}


def make_accelerator(config: OPDConfig) -> Any:
    """An ``accelerate.Accelerator`` with the trackers that the settings name.

    Raises:
        ConfigError: a tracker is unknown or not installed, or ``accelerate`` is set up for what cannot be right here.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    for name in config.run.trackers:
        if name not in TRACKERS:
            raise ConfigError(unknown("tracker", name, TRACKERS))
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"the tracker {name!r} is not installed: pip install {name}, or leave it out of run.trackers"
            )
    folders = ProjectConfiguration(project_dir=config.run.output, logging_dir=f"{config.run.output}/trackers")
    accelerator = Accelerator(
        log_with=list(config.run.trackers) or None,
        project_config=folders,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
    )
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started > accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started, but accelerate takes each for a run of its own; without a GPU, set "
            "ACCELERATE_USE_CPU=true, or start with accelerate launch --config_file configs/accelerate/cpu.yaml"
        )
    if accelerator.distributed_type == "FSDP" and not accelerator.is_fsdp2:
        raise ConfigError(
            "accelerate is set up for FSDP1, which does not fit micro-batches whose number differs from step to step "
            "and process to process; set fsdp_version: 2, as configs/accelerate/fsdp2.yaml does"
        )
    if accelerator.distributed_type == "DEEPSPEED":
        _require_zero(accelerator.state.deepspeed_plugin)
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ConfigError(
            f"accelerate is set up for mixed precision {accelerator.mixed_precision}; expected no or bf16"
        )
    if accelerator.num_processes > 1:
        _require_whole_vllm(config)
    problems = config.sampling.problems_per_step
    if problems < accelerator.num_processes:
        raise ConfigError(
            f"{problems} problems per step do not give each of {accelerator.num_processes} processes one; raise "
            "sampling.episodes_per_step"
        )
    return accelerator


def _require_whole_vllm(config: OPDConfig) -> None:
    """Refuses one vLLM over several training processes: they play different episodes, and it would wait for all."""
    if "vllm" not in (config.sampling.engine, config.teacher.engine):
        return
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        size = config.sampling.vllm_options.get(name, 1)
        if size != 1:
            raise ConfigError(
                f"sampling.vllm_options: {name}={size}, but each training process has a vLLM of its own, on its own "
                "device; leave it out, or name a vLLM server over several devices (sampling.engine: URL, "
                "teacher.model: URL)"
            )


def _require_zero(settings: Any) -> None:
    """Refuses what DeepSpeed can do and this trainer cannot."""
    example = "configs/accelerate/deepspeed_zero3.yaml shows settings that work"
    if settings.zero_stage not in (1, 2, 3):
        raise ConfigError(f"DeepSpeed's zero_stage={settings.zero_stage}; expected 1, 2 or 3; {example}")
    if settings.zero3_init_flag:
        raise ConfigError(f"DeepSpeed's zero3_init_flag shares out the sampling copy too; set it to false; {example}")
    offloaded = {settings.offload_optimizer_device, settings.offload_param_device} - {None, "none"}
    if offloaded:
        raise ConfigError(f"DeepSpeed's offloading to {', '.join(sorted(offloaded))} is not supported; {example}")


def start_trackers(accelerator: Any, config: OPDConfig) -> None:
    """Starts the trackers of ``make_accelerator``, with the settings as they take them: numbers and text only."""
    if config.run.trackers:
        told = {
            name: value if isinstance(value, int | float) else str(value) for name, value in flat_dict(config).items()
        }
        accelerator.init_trackers("opd-env", config=told)


def leave(accelerator: Any) -> None:
    """Closes trackers and the group of processes: the last thing before a process ends.

    A thread of gloo's lets go of the Python objects of a collective only after it is done. If the interpreter is
    finalising by then, the process aborts; so a process of several waits a moment, in which that thread can run.
    """
    accelerator.end_training()
    if accelerator.num_processes > 1:
        time.sleep(0.5)


def _with_adapters(model: Any, settings: LoRASettings, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = "all-linear" if settings.targets == ("all-linear",) else list(settings.targets)
    torch.manual_seed(seed)
    try:
        return get_peft_model(
            model,
            LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, task_type="CAUSAL_LM"),
        )
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if _is_linear(part)})
        raise ConfigError(
            f"student.lora.targets={list(settings.targets)} fits no layer of the student; its linear layers are "
            f"{linear}"
        ) from error


def _is_linear(part: torch.nn.Module) -> bool:
    return isinstance(part, torch.nn.Linear)
