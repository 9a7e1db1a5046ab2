"""Every example of docs/tools.md runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from opd_env.tools import catalogue
from opd_env.tools.run import process

ROOT = Path(__file__).parents[2]
SECTIONS = re.split(r"^(?=#)", (ROOT / "docs/tools.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
EXAMPLES = {
    section.splitlines()[0].lstrip("# "): example
    for section in SECTIONS
    for example in re.findall(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
}


@pytest.mark.parametrize("heading", EXAMPLES)
def test_the_example_runs(heading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = EXAMPLES[heading]
    if "mount_mcp" in example and importlib.util.find_spec("mcp") is None:
        pytest.skip("needs the extra mcp")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(catalogue, "_registered", {})
    monkeypatch.setenv("SHOP_KEY", "is set by the example")
    assert "assert " in example
    exec(compile(example, heading, "exec"), {"__name__": "__main__"})
    process._idle.clear()


def test_every_section_with_an_example_is_found() -> None:
    assert len(EXAMPLES) >= 10
