"""Makes a run's trained student ready to be shared: a filled model card beside it, and an upload to the hub.

Worked example::

    folder = publish("runs/demo")                        # writes runs/demo/model/README.md
    publish("runs/demo", push="me/student", private=True)

``runs/demo/model`` is what ``save_pretrained`` wrote, adapters merged: transformers and vLLM load it as it is.

Test it alone: ``pytest tests/report/test_model_card.py``
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_env.episode.files import write_whole
from opd_env.evaluation.read_run import Run
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
    results = run.results
    student = str(run.setting("student.model"))
    rows = "\n".join(
        f"| {model.title} | {model.accuracy} | {model.summary.tool_call_validity if model.summary else '–'} "
        f"| {model.accuracy.n} |"
        for model in run.models.values()
    )
    settings = _rows({name: run.setting(name) for name in _SETTINGS} | {"teacher.model": run.teacher})
    made_with = _rows({key: results[key] for key in ("config_hash", "git_commit") if key in results})
    trained = f"{run.setting('run.steps')} × {run.setting('sampling.episodes_per_step')} episodes"
    shown = "\n".join(line for line in run.config_text.splitlines() if not line.strip().startswith("output:"))
    versions = ", ".join(f"{package} {version}" for package, version in results["versions"].items())
    return f"""---
{_header(student)}
---

# {name}

{_code(student)}, taught to use tools by on-policy distillation from {_code(run.teacher)} on the task
{_code(run.setting("task"))}: it played {trained} with real tool calls, and learned from what the teacher
thought of every token that it sampled. Made with opd-env. Licence and limits of {_code(student)} apply.

## Results

On the split {_code(run.setting("evaluation.split"))} at temperature {run.setting("evaluation.temperature")}, with 95 %
intervals:

| | accuracy | valid tool calls | problems |
|---|---|---|---|
{rows}

## How it was made

| setting | value |
|---|---|
{settings}
{made_with}
| seconds | {results["seconds"]:.0f} |

{versions}. The whole configuration:

```yaml
{shown}
```

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

```bash
vllm serve {name}
opd-env eval --model {name} --task {run.setting("task")}
```
"""


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


def _rows(values: Mapping[str, Any]) -> str:
    return "\n".join(f"| {key} | {_code(value)} |" for key, value in values.items() if value not in (None, {}, []))


def _code(value: Any) -> str:
    """As code; a bar would end the cell of a table."""
    return f"`{str(value).replace('`', '').replace('|', chr(92) + '|')}`"
