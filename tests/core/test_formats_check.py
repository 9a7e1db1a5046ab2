"""The self-test of a format finds what it should: every family passes, a broken one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_env.cli.main import main
from opd_env.formats import HermesFormat, get_format
from opd_env.formats.check import check_format
from opd_env.formats.parse import ParsedTurn
from opd_env.messages import Message
from tests.core.families import FAMILIES, family_tokenizer
from tests.core.tiny import tiny_tokenizer


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes(name: str) -> None:
    chat = get_format(family_tokenizer(name))
    findings = {one.name: one for one in check_format(chat)}
    assert [one for one in findings.values() if one.fails] == []
    assert findings["append-only"].ok == (not chat.not_append_only)


class Forgetful(HermesFormat):
    """Loses calls, invents spans, and lets a user write markup."""

    def parse_text(self, text: str) -> ParsedTurn:
        return ParsedTurn(text, text.upper())

    def render_prompt(self, messages: list[Message], tools: object = ()) -> list[int]:  # type: ignore[override]
        return list(self._tokenizer.encode(messages[-1]["content"], add_special_tokens=False))

    def _prove(self) -> tuple[str, ...]:
        return ()


def test_faults_are_named() -> None:
    findings = {one.name: one for one in check_format(Forgetful(tiny_tokenizer()))}
    assert {name for name, one in findings.items() if one.fails} == {
        "calls read back", "text reads back", "tool text is text",
    }  # fmt: skip
    assert (
        "'<|im_end|>'" in findings["tool text is text"].detail
        or "special token" in findings["tool text is text"].detail
    )


def test_the_command_shows_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--format", "packaged:student"]) == 0
    shown = capsys.readouterr().out
    assert "hermes; a turn ends with <|im_end|>" in " ".join(shown.split())
    assert "always" in shown
    assert "✗" not in shown
    family_tokenizer("Qwen 3").save_pretrained(tmp_path)
    assert main(["doctor", "--format", str(tmp_path)]) == 0
    assert "a further question" in " ".join(capsys.readouterr().out.split())
    tiny_tokenizer(template="{{ messages }}").save_pretrained(tmp_path)
    assert main(["doctor", "--format", str(tmp_path)]) == 1
    assert "✗" in capsys.readouterr().out
    assert main(["doctor", "--format", str(tmp_path / "none")]) == 2
    assert "no folder" in capsys.readouterr().err
