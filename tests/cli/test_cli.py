"""The command line: what it prints, and one sentence for everything a user can get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_env.cli import main
from opd_env.cli.main import COMMANDS


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence on standard error with which these words are refused."""
    assert main(words) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("opd-env: ")
    assert "Traceback" not in line
    return line


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'train'" in fails(capsys, "trian")


MODELS = ("--student.model", "packaged:student", "--teacher.model", "packaged:teacher", "--task", "arithmetic")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("train", *MODELS, "--divergance", "jsd"), "did you mean '--objective.divergence'"),
        (("train", *MODELS, "--objective.divergence", "jds"), "did you mean 'jsd'"),
        (("train", *MODELS, "--top_p", "0.95"), "off-policy"),
        (("train", *MODELS[:-1], "arithmetik"), "did you mean 'arithmetic'"),
        (("train", *MODELS, "--tools", "calculater"), "did you mean 'calculator'"),
        (("train", *MODELS, "--run.steps", "many"), "steps"),
        (("train", *MODELS, "--run.trackers", "wandbee"), "wandb"),
        (("train", *MODELS[:1], "packaged:pupil", *MODELS[2:]), "packaged:student"),
        (("train", "no_such_file.yaml"), "no_such_file.yaml"),
        (("eval", "--model", "packaged:student"), "task must be set"),
        (("eval", "--model", "packaged:student", "--task", "arithmetic", "--split", "exam"), "exam"),
        (("eval", "--model", "packaged:student", "--task", "arithmetic", "--dtype", "float7"), "float32"),
        (("train", *MODELS, "--student.chat_format", "hermess"), "did you mean 'hermes'?"),
        (
            ("eval", "--model", "packaged:pupil", "--task", "arithmetic", "--chat_format", "lama"),
            "did you mean 'llama'?",
        ),
        (("eval", "--model", "runs/no_such_run/model", "--task", "arithmetic"), "there is no folder 'runs/no_such_run"),
        (("rollout", "--model", "packaged:pupil", "--task", "x", "--chat_format", "lama"), "did you mean 'llama'?"),
        (
            ("eval", "--model", "http://127.0.0.1:1/v1", "--task", "arithmetic", "--repair_calls", "true"),
            "leave them out",
        ),
        (("tools", "calculater"), "did you mean 'calculator'"),
        (("tools", "test", "calculator", "--example", "{"), "not JSON"),
        (("tasks", "gsm8k", "--options", '{"path": "nowhere"}'), "nowhere"),
        (("certify", "jds"), "did you mean 'jsd'"),
        (("report", "no_such_run"), "no_such_run"),
        (("train", "-x"), "unknown option -x"),
        (("eval", "--model", "packaged:student", "--task", ""), "task is empty"),
        (("eval", "--model", "packaged:student", "--task", "arithmetic", "--dtype", "int8"), "float32"),
        (("rollout", "--model", "packaged:student", "--task", "arithmetic", "--first", "-1"), "first=-1"),
        (("rollout", "--model", "packaged:student", "--task", "arithmetic", "--first", "10000000"), "first=10000000"),
        (("rollout", "--model", "http://127.0.0.1:1/v1", "--task", "arithmetic"), "score it with opd-env eval"),
        (("compare", "no_such_run"), "there is no no_such_run"),
        (("compare",), "the following arguments are required: evaluations; opd-env compare --help"),
        (("compare", "a", "--flips", "x"), "invalid int value: 'x'"),
        (("publish", "no_such_run"), "no folder 'no_such_run'"),
        (("tasks", "mixture"), "needs the option tasks"),
        (("tasks", "arithmetic", "--count", "-1"), "--count is -1"),
    ],
)
def test_a_mistake_is_one_sentence_that_says_what_to_do(
    words: tuple[str, ...],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in fails(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_row_names_file_and_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n{"question": 3}\n')
    assert "train.jsonl" in fails(capsys, "tasks", "gsm8k", "--options", json.dumps({"path": str(tmp_path)}))


def test_tools_and_tasks_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tools"]) == 0
    listed = capsys.readouterr().out
    assert "calculator" in listed
    assert "Searches passages" in listed
    assert "missing" not in listed
    assert main(["tools", "search", "--options", '{"passages": [{"text": "one"}], "name": "look"}']) == 0
    assert json.loads(capsys.readouterr().out)["function"]["name"] == "look"
    assert main(["tools", "calculator"]) == 0
    assert json.loads(capsys.readouterr().out)["function"]["name"] == "calculator"
    assert main(["tools", "test", "calculator", "--example", '{"expression": "6*7"}']) == 0
    assert "42" in capsys.readouterr().out
    assert main(["tasks"]) == 0
    assert "gsm8k" in capsys.readouterr().out
    assert main(["tasks", "arithmetic", "--count", "1"]) == 0
    assert "How many" in capsys.readouterr().out


def test_a_users_own_tool_and_task_are_found_by_imports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from opd_env import register_tool, tool\n"
        "@register_tool\n@tool\ndef shout(text: str) -> str:\n"
        '    """Writes louder.\n\n    Args:\n        text: what to write.\n    """\n'
        "    return text.upper()\n"
    )
    assert main(["tools", "test", "shout", "--imports", str(file), "--example", '{"text": "a"}']) == 0
    assert "A" in capsys.readouterr().out


def test_brackets_of_a_users_task_are_text_and_no_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # a failed episode is counted, as for users
    file = tmp_path / "brackets.py"
    file.write_text(
        "from dataclasses import replace\n"
        "from opd_env import Example, Grade, Task, ToolError, ToolErrorKind, get_tool, register_task\n"
        "from opd_env.messages import user\n"
        "def fail(**arguments):\n    raise ToolError(ToolErrorKind.SANDBOX, 'no room in [/tmp]')\n"
        "QUESTION = 'A shop has 56 boxes. Each box holds 19 stamps. How many stamps are there?'\n"
        "@register_task('brackets')\nclass Brackets(Task):\n"
        '    """Lists [b]."""\n    version = "1"\n'
        "    tools = (replace(get_tool('calculator'), function=fail),)\n"
        "    def __len__(self): return 1\n"
        "    def example(self, index): return Example('[i]', (user(QUESTION),), answer='[a]')\n"
        "    def grade(self, example, answer, turns=()): return Grade(False)\n"
    )
    assert main(["tasks", "brackets", "--imports", str(file)]) == 0
    assert "[i]  difficulty 0, answer [a]" in capsys.readouterr().out
    assert main(["tasks"]) == 0
    assert "Lists [b]." in capsys.readouterr().out
    play = ["--model", "packaged:teacher", "--task", "brackets", "--imports", str(file), "--temperature", "0"]
    assert main(["rollout", *play]) == 1
    shown = capsys.readouterr().out
    assert "[i] failed: " in shown
    assert "no room in [/tmp]" in shown


def test_doctor_tells_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "code sandbox" in shown
    assert "packaged:student" in shown
    assert "opd-env[wandb]" in shown or "extra wandb" in shown


def test_eval_scores_a_packaged_model_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "eval",
        "--model",
        "packaged:teacher",
        "--task",
        "arithmetic",
        "--problems",
        "4",
        "--output",
        str(tmp_path),
    ]
    assert main(words) == 0
    assert "accuracy" in capsys.readouterr().out
    (folder,) = (tmp_path / "packaged_teacher").iterdir()
    assert folder.name.startswith("arithmetic-")
    results = json.loads((folder / "results.json").read_text())["evaluation"]
    assert results["n"] == 4
    assert len(results["settings"]["weights_hash"]) == 16
    assert main([*words[:-3], "6", *words[-2:]]) == 0
    assert json.loads((folder / "results.json").read_text())["evaluation"]["n"] == 6
    assert main([*words, "--temperature", "1", "--samples", "2"]) == 0
    before = set((tmp_path / "packaged_teacher").iterdir())
    assert len(before) == 2
    assert main([*words, "--chat_format", "hermes"]) == 0  # what is found by itself
    assert set((tmp_path / "packaged_teacher").iterdir()) == before
    assert main([*words, "--repair_calls", "true"]) == 0
    (repaired,) = set((tmp_path / "packaged_teacher").iterdir()) - before
    assert json.loads((repaired / "settings.json").read_text())["repair_calls"] is True


def test_rollout_shows_episodes_and_saves_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "episodes.parquet"
    words = ["rollout", "--model", "packaged:teacher", "--task", "arithmetic", "--problems", "2", "--output", str(file)]
    assert main(words) == 0
    assert "<tool_call>" in capsys.readouterr().out
    from opd_env.episode.store import load_trajectories

    assert len(load_trajectories(file)) == 2


@pytest.mark.parametrize("command", ["train", "eval", "rollout"])
def test_every_setting_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Inherited ones too: under every name stands what it means, and where it has one, its default."""
    with pytest.raises(SystemExit):
        main([command, "--help-all"])
    entries = capsys.readouterr().out.split("\n  --")[1:]
    assert len(entries) > 15
    bare = [entry.split()[0] for entry in entries if len(entry.partition("\n")[2].split()) < 2]
    assert bare == []
