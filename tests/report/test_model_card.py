"""A finished run's folder loads elsewhere, says what it is, and goes to the hub as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_env.cli import main
from opd_env.evaluation.read_run import Run
from opd_env.report.model_card import model_card, publish
from opd_env.settings.fields import ConfigError
from opd_env.trainer.run.config import LoRASettings
from tests.trainer.run.test_loop import trainer_of
from tests.trainer.toy import toy_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A finished run of adapters, and the student's logits right after it."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    trainer = trainer_of(toy_config(folder, steps=1, lora=LoRASettings(rank=2), learning_rate=1e-2))
    trainer.train()
    with torch.no_grad():
        return folder, trainer.parts.student.model(torch.arange(20)[None]).logits


class Hub:
    """Stands for ``huggingface_hub.HfApi``."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_what_was_trained_loads_in_plain_transformers(run: tuple[Path, torch.Tensor]) -> None:
    folder, expected = run
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(20)[None]).logits, expected, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name in model.state_dict())
    assert tokenizer.chat_template
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_card_holds_the_results_with_their_intervals_and_how_they_came_about(run: tuple[Path, Any]) -> None:
    folder, _ = run
    text = (publish(folder) / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert {"on-policy-distillation", "tool-use"} <= set(yaml.safe_load(header)["tags"])
    read = Run.read(folder)
    results = json.loads((folder / "results.json").read_text())
    for key, title in (("before", "Student before"), ("after", "Student after"), ("teacher", "Teacher")):
        low, high = results[key]["accuracy_ci"]
        shown = f"{100 * results[key]['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        assert f"| {title} | {shown} | {read.models[key].summary.tool_call_validity} | 2 |" in body  # type: ignore[union-attr]
    for fact in (
        "`toy_sums`", "| objective.divergence | `reverse_kl` |", "| teacher.model | `teacher` |",
        results["config_hash"], f"torch {results['versions']['torch']}", "vllm serve demo", "steps: 1",
    ):  # fmt: skip
        assert fact in body, fact
    assert "base_model" not in header  # "student" is not on the hub


@pytest.mark.parametrize(("student", "base"), [("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), ("./mine/model", None)])
def test_a_student_of_the_hub_is_named_as_the_base_model(run: tuple[Path, Any], student: str, base: str | None) -> None:
    read = Run.read(run[0])
    card = model_card(type(read)(**{**vars(read), "config": {**read.config, "student": {"model": student}}}), "me/mine")
    assert yaml.safe_load(card.split("---\n")[1]).get("base_model") == base


def test_pushing_uploads_the_folder_with_its_card(run: tuple[Path, Any]) -> None:
    hub = Hub()
    folder = publish(run[0], push="me/student", private=True, hub=hub)
    assert hub.calls[0] == ("create", "me/student", True, True)
    kind, name, files = hub.calls[1]
    assert (kind, name) == ("upload", "me/student")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert 'from_pretrained("me/student")' in (folder / "README.md").read_text()


def test_a_run_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no trained model yet; start the same opd-env train again"):
        publish(tmp_path)


def test_the_command_says_what_the_hub_says(
    run: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", str(run[0])]) == 0
    assert capsys.readouterr().out.strip() == str(run[0] / "model")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("401: log in with hf auth login")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    assert main(["publish", str(run[0]), "--push", "me/student"]) == 2
    assert capsys.readouterr().err.strip() == "opd-env: 401: log in with hf auth login"
