"""Trackers, adapters and processes that do not fit are refused with what would."""

import sys

import pytest
import torch

from opd_env.configuration import ConfigError, import_files
from opd_env.tasks import list_tasks
from opd_env.trainer import setup
from opd_env.trainer.setup import make_accelerator, make_parts
from tests.trainer.toy import loaded, toy_config


def parts(config):
    return make_parts(config, torch.device("cpu"), student=loaded(1, "student"), teacher=loaded(2, "teacher"))


def test_a_tracker_that_is_not_installed_is_refused_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb, or leave it out of trackers"):
        make_accelerator(toy_config(tmp_path, trackers=("wandb",)))


def test_more_processes_than_problems_are_refused(tmp_path, monkeypatch):
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "num_processes", property(lambda self: 8))
    with pytest.raises(ConfigError, match="2 problems per step do not give each of 8 processes one"):
        make_accelerator(toy_config(tmp_path, episodes_per_step=4, samples_per_problem=2))


def test_train_and_evaluation_tasks_are_different_splits(tmp_path):
    built = parts(toy_config(tmp_path))
    assert (built.task.split, built.eval_task.split) == ("train", "test")
    assert built.teacher_chat is built.chat
    assert built.teacher_extra_tokens == 0


def test_demonstrations_change_the_teachers_prompt_only(tmp_path):
    built = parts(toy_config(tmp_path, teacher_demonstrations=2))
    messages = built.task[0].messages
    plain, privileged = (chat.render_prompt(messages) for chat in (built.chat, built.teacher_chat))
    assert len(plain) < len(privileged) <= len(plain) + built.teacher_extra_tokens
    assert privileged[-len("0 + 1?") :] == plain[-len("0 + 1?") :]


def test_files_of_the_user_are_run_once_and_their_tasks_are_known(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from opd_env.tasks import register_task\nfrom tests.trainer.toy import ToySums\n"
        "@register_task('mine')\nclass Mine(ToySums):\n    pass\n"
    )
    import_files([str(file)])
    import_files([str(file)])
    assert "mine" in list_tasks()
    assert parts(toy_config(tmp_path / "run", task="mine")).task.name == "mine"


def test_a_file_of_the_user_that_fails_is_named_with_its_line(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("x = 1\ny = x / 0\n")
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=r"broken.py:2 fails: ZeroDivisionError"):
        import_files([str(file)])
    assert set(sys.modules) == before
    file.write_text("x = (\n")
    with pytest.raises(ConfigError, match="fails: SyntaxError"):
        import_files([str(file)])
