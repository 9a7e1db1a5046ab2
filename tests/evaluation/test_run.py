"""Evaluations: right numbers, nothing lost by a kill, nothing played twice, nothing mixed."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_env.engines.base import GREEDY, Engine, Request, SamplingParams, ScriptedEngine
from opd_env.engines.models import weights_hash
from opd_env.episode.files import StoreError
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.store import TrajectoryWriter, load_trajectories
from opd_env.evaluation.counts import Summary
from opd_env.evaluation.result import EvaluationResult, results_markdown, results_table
from opd_env.evaluation.run import describe, evaluate
from opd_env.evaluation.statistics import wilson
from opd_env.formats import Rendered, get_format
from opd_env.messages import Message, assistant, user
from opd_env.tasks import Example, Grade, Task, grade_number
from opd_env.tools import get_tool, open_sandbox
from tests.tiny import tiny_tokenizer

CHAT = get_format(tiny_tokenizer())
DESCRIBED: dict[str, Any] = {
    "model": "", "samples": 1, "tools": None, "limits": RolloutLimits(), "sampling": GREEDY, "seed": 0,
}  # fmt: skip
WARM = SamplingParams(temperature=1.0)


class Doubles(Task):
    name = "doubles"
    version = "1"
    tools = ("calculator",)

    def __init__(self, size: int = 12) -> None:
        super().__init__("test")
        self.size = size

    def __len__(self) -> int:
        return self.size

    def example(self, index: int) -> Example:
        return Example(f"d{index}", (user(f"Double {index}?"),), str(2 * index), difficulty=1 + index % 2)

    def grade(self, example: Example, answer: str | None, turns: Sequence[Message] = ()) -> Grade:
        return grade_number(answer, example.answer)


def student(wrong: Sequence[int] = (), played: list[int] | None = None) -> Engine:
    """Calls the calculator, then answers; wrongly for the numbers in ``wrong``."""

    def respond(request: Request, turn: int) -> list[int]:
        number = int(CHAT.decode(request.token_ids).split("Double ")[1].split("?")[0])
        if turn == 0:
            if played is not None:
                played.append(number)
            call = f'<tool_call>\n{{"name": "calculator", "arguments": {{"expression": "2*{number}"}}}}\n</tool_call>'
            return CHAT.render_assistant(assistant(call))
        return CHAT.render_assistant(assistant(f"The answer is {2 * number + (number in wrong)}."))

    return ScriptedEngine(respond, CHAT.stop_token_ids)


class PowerCut(Exception):
    pass


def cut_after(episodes: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == episodes:
            raise PowerCut

    return progress


def run(**options: Any) -> EvaluationResult:
    options = {"task": Doubles(), "engine": student(wrong=(2, 5, 7)), "chat": CHAT} | options
    return evaluate(options.pop("task"), options.pop("engine"), options.pop("chat"), **options)


def test_the_summary_is_of_the_graded_episodes() -> None:
    result = run()
    assert result.summary.accuracy == wilson(9, 12)
    assert result.summary.tool_call_validity.value == 1
    assert [one.example_id for one in result.trajectories] == [f"d{index}" for index in range(12)]
    assert result.errors == []
    assert result.settings["problems"] == 12


def test_the_level_of_a_tools_sandbox_is_recorded() -> None:
    with open_sandbox("unsafe_subprocess") as sandbox:
        settings = run(tools=[get_tool("python", sandbox=sandbox)], limit=1).settings
    assert settings["sandbox"] == {"python": "none"}


def test_limit_takes_the_first_problems_and_samples_repeat_them() -> None:
    result = run(limit=3, samples=4, sampling=WARM)
    assert (result.summary.n, result.summary.samples, result.summary.episodes) == (3, 4, 12)
    assert [(one.example_id, one.sample) for one in result.trajectories][:5] == [
        ("d0", 0), ("d0", 1), ("d0", 2), ("d0", 3), ("d1", 0),
    ]  # fmt: skip
    assert run(limit=99).summary.n == 12


def test_progress_counts_every_episode() -> None:
    seen: list[tuple[int, int]] = []
    run(limit=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_score_with_tools_is_called_that() -> None:
    assert run(limit=1).label == "doubles (with tools: calculator)"
    assert run(limit=1, tools=[]).label == "doubles (no tools)"


def test_a_category_that_all_problems_share_is_part_of_the_label() -> None:
    class Sorted(Doubles):
        def example(self, index: int) -> Example:
            return replace(super().example(index), metadata={"category": "even" if index % 2 == 0 else "odd"})

    assert run(task=Sorted(), limit=1).label == "doubles even (with tools: calculator)"
    assert run(task=Sorted(), limit=2).label == "doubles (with tools: calculator)"


def test_senseless_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="samples=4 of greedy decoding would all be the same"):
        run(samples=4)
    with pytest.raises(ValueError, match="samples=0 and limit=None"):
        run(samples=0)
    with pytest.raises(ValueError, match="limit=0"):
        run(limit=0)


def test_a_folder_holds_settings_episodes_and_results(tmp_path: Path) -> None:
    result = run(folder=tmp_path / "eval", model="tiny")
    folder = tmp_path / "eval"
    assert sorted(file.name for file in folder.iterdir()) == [
        "results.json", "results.md", "settings.json", "trajectories.parquet",
    ]  # fmt: skip
    stored = json.loads((folder / "results.json").read_text())["evaluation"]
    assert stored["accuracy"] == 0.75
    assert stored["accuracy_ci"] == [result.summary.accuracy.low, result.summary.accuracy.high]
    assert (stored["n"], stored["tool_call_validity"], stored["label"]) == (12, 1.0, result.label)
    assert stored["settings"]["model"] == "tiny"
    assert stored["settings"]["sampling"]["temperature"] == 0
    assert stored["settings"]["tools"] == ["calculator"]
    assert stored["settings"]["sandbox"] is None
    assert {"python", "numpy", "torch", "transformers"} <= set(stored["versions"])
    assert Summary.from_json(stored).accuracy == result.summary.accuracy
    assert "| tiny | doubles (with tools: calculator) | 1 test | 1 | accuracy | 75.0 % | [46.8, 91.1] | 12 |" in (
        (folder / "results.md").read_text()
    )


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = run()
    with pytest.raises(PowerCut):
        run(folder=tmp_path, progress=cut_after(5))
    survived = {int(one.example_id[1:]) for one in load_trajectories(tmp_path)}
    assert len(survived) == 5
    assert not (tmp_path / "results.json").exists()
    played: list[int] = []
    seen: list[tuple[int, int]] = []
    result = run(
        folder=tmp_path,
        engine=student(wrong=(2, 5, 7), played=played),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert sorted(played) == sorted(set(range(12)) - survived)
    assert seen[0] == (6, 12)
    assert result.summary == replace(whole.summary, seconds_per_episode=result.summary.seconds_per_episode)
    assert len(load_trajectories(tmp_path)) == 12


def test_a_finished_evaluation_is_read_back_without_playing(tmp_path: Path) -> None:
    first = run(folder=tmp_path)
    played: list[int] = []
    second = run(folder=tmp_path, engine=student(played=played))
    assert played == []
    assert second.summary == first.summary


def test_more_problems_can_be_added_and_fewer_asked_for(tmp_path: Path) -> None:
    run(folder=tmp_path, limit=4)
    played: list[int] = []
    assert run(folder=tmp_path, limit=6, engine=student(played=played)).summary.n == 6
    assert sorted(played) == [4, 5]
    assert run(folder=tmp_path, limit=2).summary.n == 2
    assert len(load_trajectories(tmp_path)) == 6


def test_a_half_sampled_problem_is_completed_without_doubles(tmp_path: Path) -> None:
    with pytest.raises(PowerCut):
        run(folder=tmp_path, limit=3, samples=4, sampling=WARM, progress=cut_after(6))
    result = run(folder=tmp_path, limit=3, samples=4, sampling=WARM)
    keys = [(one.example_id, one.sample) for one in load_trajectories(tmp_path)]
    assert len(keys) == len(set(keys)) == 12
    assert result.summary.episodes == 12


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"model": "other"}, "model was 'tiny', now 'other'"),
        ({"weights_hash": "0123"}, "weights_hash was '', now '0123'"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"tools": []}, r"tools was \['calculator'\], now \[\]"),
        ({"task": Doubles(13)}, "size was 12, now 13"),
        ({"limits": RolloutLimits(max_turns=3)}, "limits was .*'max_turns': 8.* now .*'max_turns': 3"),
        ({"sampling": WARM}, "'temperature': 0.0.* now .*'temperature': 1.0"),
    ],
)
def test_other_settings_are_refused_with_the_difference(
    tmp_path: Path, change: dict[str, Any], difference: str
) -> None:
    run(folder=tmp_path, model="tiny")
    with pytest.raises(ValueError, match=difference):
        run(**({"folder": tmp_path, "model": "tiny"} | change))
    assert len(load_trajectories(tmp_path)) == 12


def test_a_changed_prompt_is_another_evaluation(tmp_path: Path) -> None:
    class Reworded(Doubles):
        def example(self, index: int) -> Example:
            return replace(super().example(index), messages=(user(f"Please! Double {index}?"),))

    run(folder=tmp_path)
    with pytest.raises(ValueError, match="prompt_hash was"):
        run(folder=tmp_path, task=Reworded())


def test_prompts_are_the_same_for_every_chat_format_and_templates_are_told_apart() -> None:
    wordy = get_format(tiny_tokenizer())
    plain = wordy.tool_results
    wordy.tool_results = lambda messages: Rendered(*(part * 2 for part in plain(messages)))  # type: ignore[method-assign]
    one, other = (describe(Doubles(), chat, **DESCRIBED) for chat in (CHAT, wordy))
    server = describe(Doubles(), None, **DESCRIBED)
    assert one["prompt_hash"] == other["prompt_hash"] == server["prompt_hash"]
    assert one["template_hash"] != other["template_hash"]
    assert server["template_hash"] == ""


def test_a_repaired_call_counts_only_when_asked_for_and_is_another_evaluation() -> None:
    def respond(request: Request, turn: int) -> list[int]:
        call = "<tool_call>{'name': 'calculator', 'arguments': {'expression': '2*0'}}</tool_call>"
        return CHAT.render_assistant(assistant(call if turn == 0 else "The answer is 0."))

    repairing = get_format(tiny_tokenizer(), repair=True)
    strict, repaired = (
        run(engine=ScriptedEngine(respond, CHAT.stop_token_ids), chat=chat, limit=1) for chat in (CHAT, repairing)
    )
    assert (strict.summary.repairs, strict.summary.tool_call_validity.value) == ({}, 0)
    assert repaired.summary.repairs == {"single quotes": 1}
    assert repaired.to_json()["repairs"] == {"single quotes": 1}
    assert "| repairs, single quotes | 1 |" in results_markdown([repaired])
    assert "repairs" not in results_markdown([strict])
    assert set(repaired.settings) - set(strict.settings) == {"repair_calls"}


def test_weights_that_differ_in_one_number_have_another_hash() -> None:
    model = torch.nn.Linear(3, 2)
    before = weights_hash(model)
    assert weights_hash(copy.deepcopy(model)) == before
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    assert weights_hash(model) != before
    assert weights_hash(model.to(torch.bfloat16)) != weights_hash(model.float())


def test_a_damaged_settings_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is not JSON"):
        run(folder=tmp_path)


def test_two_evaluations_of_one_folder_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PowerCut):
        run(folder=tmp_path, progress=cut_after(1))
    with TrajectoryWriter(tmp_path, "trajectories"), pytest.raises(StoreError, match="another process"):
        run(folder=tmp_path)


def test_a_folder_that_cannot_be_written_fails_before_anything_is_played(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    played: list[int] = []
    with pytest.raises(StoreError, match="cannot be used"):
        run(folder=tmp_path / "file" / "eval", engine=student(played=played))
    assert played == []


def test_the_terminal_table_shows_each_observed_metric_once() -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(results_table([run(model="tiny"), run(limit=3, samples=2, sampling=WARM)]))
    text = console.export_text()
    lines = [line.split() for line in text.splitlines()]
    assert "tiny doubles (with tools: calculator)" in text
    assert "test split, version 1, k = 1" in text
    assert "test split, version 1, k = 2" in text
    assert ["accuracy", "75.0", "%", "[46.8,", "91.1]", "12"] in lines
    assert sum(line[:1] == ["tool_call_validity"] for line in lines) == 2
    assert sum(line[:1] == ["pass@2"] for line in lines) == 1
    assert not any(line[:1] == ["over_call"] for line in lines)  # nothing was observed


def test_the_markdown_table_has_the_same_lines() -> None:
    observed = results_markdown([run(model="tiny")]).splitlines()
    assert observed[0] == "| Model | Task | Version | k | Metric | Value | 95 % interval | n |"
    label = "tiny | doubles (with tools: calculator)"
    assert observed[2] == f"| {label} | 1 test | 1 | accuracy | 75.0 % | [46.8, 91.1] | 12 |"
    assert not any("over_call" in line for line in observed)


def test_a_sigkill_loses_no_finished_episode(tmp_path: Path) -> None:
    code = """
        import sys, time
        from tests.evaluation.test_run import Doubles, student, CHAT
        from opd_env.evaluation.run import evaluate

        def progress(done, total):
            print(done, flush=True)
            time.sleep(0.05 if done < 10 else 60)  # it is killed then

        evaluate(Doubles(40), student(), CHAT, folder=sys.argv[1], progress=progress)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert process.stdout is not None
    for _ in range(10):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    reported = 10 + len(process.stdout.read().split())
    process.wait()
    survived = len(load_trajectories(tmp_path))
    assert 10 <= reported <= survived < 40
    played: list[int] = []
    assert run(task=Doubles(40), folder=tmp_path, engine=student(played=played)).summary.n == 40
    assert len(played) == 40 - survived


def test_ids_that_stand_twice_are_refused() -> None:
    class Same(Doubles):
        def example(self, index: int) -> Example:
            return replace(super().example(index), id="same")

    with pytest.raises(ValueError, match="1 different ids for its first 12 examples"):
        evaluate(Same(), student(), CHAT)
