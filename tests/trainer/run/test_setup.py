"""Trackers, adapters and processes that do not fit are refused with what would."""

import sys
from dataclasses import replace

import pytest
import torch

from opd_env.settings.fields import ConfigError, import_files
from opd_env.tasks import list_tasks
from opd_env.trainer.run import setup
from opd_env.trainer.run.setup import make_accelerator, make_parts
from tests.trainer.toy import loaded, made_trajectory, toy_config


def parts(config):
    return make_parts(config, torch.device("cpu"), student=loaded(1, "student"), teacher=loaded(2, "teacher"))


def test_a_tracker_that_is_not_installed_is_refused_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb, or leave it out"):
        make_accelerator(toy_config(tmp_path, trackers=("wandb",)))


def test_more_processes_than_problems_are_refused(tmp_path, monkeypatch):
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "num_processes", property(lambda self: 8))
    with pytest.raises(ConfigError, match="2 problems per step do not give each of 8 processes one"):
        make_accelerator(toy_config(tmp_path, episodes_per_step=4, samples_per_problem=2))


def test_train_and_evaluation_tasks_are_different_splits(tmp_path):
    built = parts(toy_config(tmp_path))
    assert (built.task.split, built.eval_task.split) == ("train", "test")
    assert built.teachers.chat is built.chat
    assert built.teachers.extra_tokens == 0


def test_the_chat_format_and_repairs_reach_student_and_teacher(tmp_path):
    made = parts(toy_config(tmp_path, chat_format="hermes", repair_calls=True, teacher_demonstrations=1))
    assert (made.chat.name, made.chat.repair, made.teachers.chat.repair) == ("hermes", True, True)
    assert not parts(toy_config(tmp_path)).chat.repair


def test_demonstrations_change_the_teachers_prompt_only(tmp_path):
    built = parts(toy_config(tmp_path, teacher_demonstrations=2))
    messages = built.task[0].messages
    plain, privileged = (chat.render_prompt(messages) for chat in (built.chat, built.teachers.chat))
    assert len(plain) < len(privileged) <= len(plain) + built.teachers.extra_tokens
    assert privileged[-len("0 + 1?") :] == plain[-len("0 + 1?") :]


def test_the_answer_stands_in_the_teachers_prompt_and_nowhere_else(tmp_path):
    built = parts(toy_config(tmp_path, teacher_sees_answer=True))
    example = built.task[3]
    plain = built.chat.render_prompt(example.messages)
    assert built.teachers.chat is built.chat  # what the teacher is evaluated with
    trajectory = replace(
        made_trajectory(3, prompt=len(plain)), example_id=example.id, question=example.messages[-1]["content"]
    )
    (row,) = built.teachers.named.rows([trajectory])
    prompt = built.chat.decode(row.token_ids_T[: -len(trajectory.token_ids) + len(plain)].tolist())
    assert "The correct answer is 4." in prompt
    assert "correct answer" not in built.chat.decode(plain)
    assert len(row.token_ids_T) <= len(trajectory.token_ids) + built.teachers.extra_tokens + len(plain)
    assert row.sampled_T.sum() == trajectory.num_sampled


@pytest.mark.parametrize(
    ("routes", "reason"),
    [
        ({"calculater": "x"}, "teacher.routes: no tool .*'calculater' .did you mean 'calculator'"),
        ({"toy_sum": "x"}, "did you mean 'toy_sums'"),
    ],
)
def test_a_route_that_no_problem_can_take_is_refused_before_a_model_is_loaded(tmp_path, routes, reason):
    with pytest.raises(ConfigError, match=reason):
        parts(toy_config(tmp_path, estimator="sampled", teacher_routes=routes))


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
