"""An install never lies: it ends with the whole package, or with an error.

Each way that users take ends in an empty environment of its own; there everything is imported and an episode is played,
from another folder, beside tools/ and tasks.py of the user.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDS_MORE = ("opd_env.plugins.verl", "opd_env.plugins.deepspeed", "opd_env.plugins.ray", "opd_env.cli.__main__")
"""Modules that need an extra to be imported, or run something."""

PLAY = f"""
import importlib, pkgutil, sys
import opd_env
import tasks, tools                                    # the user's own, beside ours
from opd_env import Trajectory, load_task
from opd_env.engines.models import load_model
from opd_env.episode.expert import play_expert
from opd_env.formats import get_format
assert tasks.MINE and tools.MINE
for module in pkgutil.walk_packages(opd_env.__path__, "opd_env.", onerror=lambda name: None):
    if not module.name.startswith({NEEDS_MORE!r}):
        importlib.import_module(module.name)
loaded = [name for name in sys.modules if name.startswith("opd_env.")]
rooms = {{name.split(".")[1] for name in loaded}}
assert {{"episode", "engines", "tools", "tasks", "trainer", "report", "settings"}} <= rooms, rooms
chat = get_format(load_model("packaged:student").tokenizer)
trajectory = play_expert(load_task("arithmetic"), 0, chat)
assert isinstance(trajectory, Trajectory) and trajectory.correct and trajectory.drift == 0
print(opd_env.__file__)
print(len(loaded), "modules;", trajectory.answer)
"""


def run(*words: object, **options: object) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=280, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def git(*words: object) -> str:
    return run("git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", ROOT, *words).strip()


@pytest.fixture(scope="module")
def tree() -> str:
    """What git would archive now: the last commit, or the working tree where it has changes."""
    return git("stash", "create") or "HEAD"


@pytest.fixture
def empty(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """An environment without packages. Dependencies come from this one, behind its own packages and without the .pth
    files there, so that the checkout itself cannot be found."""
    venv.create(tmp_path / "empty", with_pip=False, symlinks=True)
    (packages,) = (tmp_path / "empty" / "lib").glob("*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return tmp_path / "empty" / "bin" / "python", {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def from_a_zip_archive(tree: str, tmp: Path) -> Path:
    """What a hosting page's "Download ZIP" gives."""
    git("archive", "--format=zip", "--prefix=opd-env-main/", "-o", tmp / "main.zip", tree)
    return tmp / "main.zip"


def from_the_sdist(tree: str, tmp: Path) -> Path:
    source = unpacked(tree, tmp)
    run(sys.executable, "-c", "import setuptools.build_meta as backend; backend.build_sdist('.')", cwd=source)
    (sdist,) = source.glob("*.tar.gz")
    assert sdist.stat().st_size < 6_000_000
    return sdist


def from_a_clone_without_links(tree: str, tmp: Path) -> Path:
    """As on Windows: a link is checked out as a small file that holds its target."""
    clone = tmp / "clone"
    run("git", "-c", "core.symlinks=false", "clone", "-q", "-c", "core.symlinks=false", "--no-checkout", ROOT, clone)
    run("git", "-C", clone, "checkout", "-q", git("rev-parse", tree))
    assert (clone / "tools").is_file()
    return clone


def unpacked(tree: str, tmp: Path) -> Path:
    archive = from_a_zip_archive(tree, tmp)
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp / "unpacked")
    return tmp / "unpacked" / "opd-env-main"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "options"),
    [(from_a_zip_archive, ()), (from_the_sdist, ()), (from_a_clone_without_links, ()), (unpacked, ("--editable",))],
    ids=["zip archive", "sdist", "clone without links", "editable"],
)
def test_an_install_has_everything_and_plays_from_another_folder(
    tree: str,
    empty: tuple[Path, dict[str, str]],
    tmp_path: Path,
    source: Callable[[str, Path], Path],
    options: tuple[str, ...],
) -> None:
    python, environment = empty
    install = ("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(python, *install, *options, source(tree, tmp_path), env=environment, cwd=tmp_path)
    work = tmp_path / "work"
    (work / "tools").mkdir(parents=True)
    (work / "tools" / "__init__.py").write_text("MINE = True\n")
    (work / "tasks.py").write_text("MINE = True\n")
    (work / "play.py").write_text(PLAY)
    where, played = run(python, "play.py", cwd=work, env=environment).strip().splitlines()
    assert Path(where).is_relative_to(tmp_path), "the installed package was used, not the checkout"
    assert "The answer is" in played
    assert (Path(where).parent / "py.typed").is_file()  # else type checkers take everything of ours for Any
    assert "calculator" in run(python, "-m", "opd_env.cli", "tools", cwd=work, env=environment)
