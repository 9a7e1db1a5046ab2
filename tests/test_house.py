"""The house: rooms that say what they are, and a core that a reader can own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "opd_env"
CORE = (
    "episode", "engines/base.py", "engines/local.py", "engines/cache.py", "trainer/batch.py",
    "trainer/math/advantages.py", "trainer/math/divergences.py", "trainer/math/logprobs.py", "trainer/math/loss.py",
    "trainer/math/modes.py", "trainer/learn", "trainer/run/loop.py", "trainer/run/learner.py",
    "trainer/run/rollouts.py", "trainer/run/config.py",
)  # fmt: skip
"""What a reader must own: episodes, the local engine, the mathematics (its proof apart), learning and the loop."""
OPTIONS = ("episode/store.py", "episode/files.py")
"""Of these rooms, what is no part of it: how episodes are kept on a disk."""


def lines(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*.py")
    return sum(len(file.read_text().splitlines()) for file in files)


def rooms() -> list[Path]:
    return sorted(file.parent for file in ROOT.rglob("__init__.py") if "guest" not in file.parts)


def test_the_core_stays_small() -> None:
    assert all((ROOT / name).exists() for name in CORE)
    counted = {name: lines(ROOT / name) for name in CORE}
    assert sum(counted.values()) - sum(lines(ROOT / name) for name in OPTIONS) < 6000, counted


@pytest.mark.parametrize("room", rooms(), ids=lambda room: str(room.relative_to(ROOT.parent)))
def test_a_room_says_what_it_is_and_is_no_street(room: Path) -> None:
    words = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    assert words, f"{room.name} does not say what it is"
    assert len(list(room.glob("*.py"))) <= 20


def test_the_links_at_the_top_lead_into_the_package_and_nothing_leads_out() -> None:
    for name in ("tools", "tasks", "trainer"):
        link = ROOT.parent / name
        assert link.is_file() or link.resolve() == (ROOT / name).resolve()  # a file: a clone without links
    assert not [path for path in ROOT.rglob("*") if path.is_symlink()]
