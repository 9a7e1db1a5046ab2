"""Makes a run's trained student ready to be shared: a filled model card beside it, and an upload to the hub.

Worked example::

    folder = publish("runs/demo")                        # writes runs/demo/model/README.md
    publish("runs/demo", push="me/student", private=True)

``runs/demo/model`` is what ``save_pretrained`` wrote, adapters merged: transformers and vLLM load it as it is.

Test it alone: ``pytest tests/report/test_model_card.py``
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opd_env.episode.files import write_whole
from opd_env.evaluation.read_run import Run
from opd_env.report.page import template
from opd_env.settings.fields import ConfigError


def publish(run: str | Path, *, push: str | None = None, private: bool = False, hub: Any = None) -> Path:
    """Writes the model card; with ``push``, uploads the folder.

    Args:
        run: the folder of a finished run.
        push: the repository to upload to, ``owner/name``; made if it is missing.
        private: whether a repository that is made can be seen by its owner only.
        hub: a ``huggingface_hub.HfApi``; by default one with the user's token.

    Returns:
        The folder of the model.

    Raises:
        ConfigError: the run is not finished.
        OSError: the card cannot be written, or the hub refuses; the message says why.
    """
    folder = Path(run) / "model"
    if not Path(run).is_dir():
        raise ConfigError(f"no folder {str(run)!r}; give that of a finished run, such as runs/demo")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{str(run)!r} holds no trained model yet; start the same opd-env train again to finish it")
    card = folder / "README.md"
    write_whole(card, model_card(Run.read(run), push or Path(run).resolve().name))
    if push is not None:
        if hub is None:
            from huggingface_hub import HfApi

            hub = HfApi(library_name="opd-env")
        hub.create_repo(push, private=private, exist_ok=True)
        hub.upload_folder(repo_id=push, folder_path=folder, commit_message="Student trained with opd-env")
    return folder


def model_card(run: Run, name: str) -> str:
    """The text of ``README.md``: what the model is, how it was made, what it was found to do, and how to use it."""
    chosen = {setting: run.setting(setting) for setting in _SETTINGS} | {"teacher.model": run.teacher}
    made_with = {key: run.results[key] for key in ("config_hash", "git_commit") if key in run.results}
    card: str = template("model_card.md.jinja").render(
        name=name,
        run=run,
        setting=run.setting,
        settings=chosen | made_with,
        header=_header(str(run.setting("student.model"))),
    )
    return card + "\n"  # jinja leaves out the last one


_SETTINGS = (
    "student.model", "teacher.model", "task", "task_options", "tools", "objective.divergence",
    "objective.divergence_options", "objective.mode", "objective.estimator", "run.steps", "sampling.episodes_per_step",
    "optimizer.updates_per_step", "optimizer.learning_rate", "student.lora", "sampling.temperature", "run.seed",
)  # fmt: skip


def _header(student: str) -> str:
    from huggingface_hub import ModelCardData

    on_the_hub = student.count("/") == 1 and not student.startswith((".", "/", "~")) and not Path(student).exists()
    text: str = ModelCardData(
        base_model=student if on_the_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["opd-env", "on-policy-distillation", "tool-use"],
    ).to_yaml()
    return text.strip()
