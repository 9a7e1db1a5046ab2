"""A teacher with worked examples reads them, then the student's own question and turns, and nothing else."""

from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from opd_env.episode.expert import play_expert
from opd_env.formats import get_format
from opd_env.messages import assistant, system, user
from opd_env.tasks import Example, Grade, Task, load_task
from opd_env.tools import Toolbox
from opd_env.trainer import OPDTrainer
from opd_env.trainer.teachers.prompts import DemonstrationFormat, ExampleFinder, TaskPrompts, play_demonstrations
from tests.tiny import tiny_tokenizer
from tests.trainer.toy import loaded, row_of, toy_config

CHAT = get_format(tiny_tokenizer())
TASK, HELD_OUT = load_task("arithmetic", "train", levels=[1]), load_task("arithmetic", "test", levels=[1])
PLAYED = play_demonstrations(TASK, CHAT, count=2)
with Toolbox(TASK.tools) as toolbox:
    SCHEMAS = toolbox.schemas


def student_turns(trajectory):
    return CHAT.decode(trajectory.token_ids[trajectory.turns[0].start :].tolist())


def test_the_prompt_is_the_demonstrations_then_the_question():
    ids = DemonstrationFormat(CHAT, PLAYED).render_prompt([system("Be brief."), user("What is 6 * 7?")], SCHEMAS)
    (first, one), (second, two), _ = PLAYED
    expected = CHAT.decode(CHAT.render_prompt([system("Be brief."), first], SCHEMAS))
    expected += student_turns(one) + f"\n<|im_start|>user\n{second['content']}<|im_end|>\n<|im_start|>assistant\n"
    expected += student_turns(two) + "\n<|im_start|>user\nWhat is 6 * 7?<|im_end|>\n<|im_start|>assistant\n"
    assert CHAT.decode(ids) == expected
    assert len(ids) - len(CHAT.render_prompt([system("Be brief."), user("What is 6 * 7?")], SCHEMAS)) <= (
        DemonstrationFormat(CHAT, PLAYED).longest
    )


def test_a_question_is_never_its_own_demonstration():
    asked = PLAYED[0][0]
    text = CHAT.decode(DemonstrationFormat(CHAT, PLAYED).render_prompt([asked], SCHEMAS))
    assert text.count(asked["content"]) == 1
    assert text.endswith(f"{asked['content']}<|im_end|>\n<|im_start|>assistant\n")
    assert all(other["content"] in text for other, _ in PLAYED[1:])


@pytest.mark.parametrize("task", [TASK, HELD_OUT], ids=["train", "held out"])
def test_a_teacher_reads_its_prompt_then_the_student_s_tokens(task):
    trajectory = play_expert(task, 3, CHAT)
    prompts = TaskPrompts(ExampleFinder([TASK, HELD_OUT]), DemonstrationFormat(CHAT, PLAYED))
    row = row_of(trajectory, prompts(trajectory))
    text = CHAT.decode(row.token_ids_T.tolist())
    assert text.endswith(f"{trajectory.question}<|im_end|>\n<|im_start|>assistant\n{student_turns(trajectory)}")
    assert PLAYED[0][0]["content"] in text
    assert np.array_equal(row.token_ids_T[row.sampled_T], trajectory.token_ids[trajectory.sampled])


class Numbered(Task):
    """Ids that say nothing about the split."""

    name = "numbered"
    version = "1"
    tools = ("calculator",)
    splits = ("train", "test")

    def __len__(self):
        return 1

    def example(self, index):
        return Example("0", (user(f"A question of {self.split}?"),), "1", difficulty=1)

    def grade(self, example, answer, turns=()):
        return Grade(answer == "1")

    def expert(self, example):
        return [assistant("1")]


def test_the_same_id_in_two_splits_keeps_its_own_question():
    tasks = [Numbered("train"), Numbered("test")]
    prompts = TaskPrompts(ExampleFinder(tasks), CHAT)
    for task in reversed(tasks):
        assert f"A question of {task.split}?" in CHAT.decode(prompts(play_expert(task, 0, CHAT))[0])


def test_a_trajectory_of_another_task_is_refused():
    trajectory = play_expert(HELD_OUT, 0, CHAT)
    with pytest.raises(ValueError, match=rf"'arithmetic' \(train\) has no example '{trajectory.example_id}'"):
        TaskPrompts(ExampleFinder([TASK]), CHAT)(trajectory)


def test_too_few_experts_are_refused():
    with pytest.raises(ValueError, match=r"teacher\.demonstrations=1 needs 2 examples .* there are 1"):
        play_demonstrations(Numbered("train"), CHAT, count=1)


def test_a_whole_run_scores_held_out_episodes_after_demonstrations(tmp_path):
    """Evaluations play the test split, which the training task does not hold."""
    config = toy_config(tmp_path / "run", steps=1, teacher_demonstrations=2)
    results = OPDTrainer(
        config,
        student=loaded(1, "student"),
        teacher=loaded(2, "teacher"),
        console=Console(file=StringIO()),
    ).train()
    assert results["after"]["n"] == config.evaluation.problems
    assert (tmp_path / "run" / "evaluations" / "after" / "log_ratios.json").exists()


def test_a_teacher_reads_the_tools_that_an_example_brings():
    class OwnTools(Numbered):
        def tools_of(self, example):
            return ["python"]

    task = OwnTools("train")
    trajectory = play_expert(task, 0, CHAT)
    assert "Tools: python" in CHAT.decode(trajectory.token_ids.tolist())
    assert TaskPrompts(ExampleFinder([task]), CHAT)(trajectory) == [trajectory.token_ids[trajectory.turn == 0].tolist()]
