"""The package as users get it: quick to import, and whole when it is installed from a wheel."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import opd_env

ROOT = Path(__file__).parents[1]

PLAY = """
import opd_env
from opd_env import RolloutLimits, Trajectory, load_task, rollout, tool
from opd_env.engines.base import ScriptedEngine
from opd_env.formats import get_format
from opd_env.engines.models import load_model
from opd_env.episode.expert import play_expert
import tasks, tools                                    # the user's own, beside ours
assert tasks.MINE and tools.MINE
assert "site-packages" in opd_env.__file__, opd_env.__file__
chat = get_format(load_model("packaged:student").tokenizer)
trajectory = play_expert(load_task("arithmetic"), 0, chat)
assert isinstance(trajectory, Trajectory) and trajectory.correct and trajectory.drift == 0
print(trajectory.answer)
"""


def run(*words: str | Path, **options: object) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=240, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def test_import_needs_neither_torch_nor_numpy() -> None:
    code = "import opd_env, sys; print([name for name in ('torch', 'numpy', 'gymnasium') if name in sys.modules])"
    assert run(sys.executable, "-c", code).strip() == "[]"


def test_every_public_name_can_be_had() -> None:
    for name in opd_env.__all__:
        assert getattr(opd_env, name) is not None
    from opd_env.formats import get_format
    from opd_env.tasks.gsm8k import score_answer
    from opd_env.tools import open_sandbox
    from opd_env.trainer import OPDConfig, OPDTrainer, advantage, get_divergence, policy_loss, register_divergence

    assert dir(opd_env) == sorted([*opd_env.__all__, "__version__"]), "what completion shows is what there is to use"
    assert callable(opd_env.rollout)
    assert all([get_format, score_answer, open_sandbox, OPDConfig, OPDTrainer, advantage, get_divergence, policy_loss, register_divergence])  # fmt: skip  # noqa: E501
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        opd_env.nothing  # noqa: B018


@pytest.mark.slow
def test_a_wheel_runs_outside_the_checkout_beside_a_users_own_tools_and_tasks(tmp_path: Path) -> None:
    source = tmp_path / "source"
    skip = shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skip)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 6_000_000

    # An empty environment. Dependencies come from this one through PYTHONPATH, which runs no .pth file, so that the
    # checkout itself cannot be found.
    venv.create(tmp_path / "empty", with_pip=False, symlinks=True)
    python = tmp_path / "empty" / "bin" / "python"
    (target,) = (tmp_path / "empty" / "lib").glob("*/site-packages")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel)
    assert (target / "opd_env" / "py.typed").is_file()  # else type checkers take everything of ours for Any
    work = tmp_path / "work"
    (work / "tools").mkdir(parents=True)
    (work / "tools" / "__init__.py").write_text("MINE = True\n")
    (work / "tasks.py").write_text("MINE = True\n")
    (work / "play.py").write_text(PLAY)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(site.getsitepackages())}
    answer = run(python, "play.py", cwd=work, env=environment)
    assert answer.startswith("The answer is")
    listed = run(python, "-m", "opd_env.cli", "tools", cwd=work, env=environment)
    assert "calculator" in listed


def test_a_log_file_holds_no_progress_bars_of_other_libraries() -> None:
    code = "from opd_env.cli.main import main; main(['-V']); from tqdm.auto import tqdm; list(tqdm(range(3)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
