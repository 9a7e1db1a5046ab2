"""The self-test of a format finds what it should: every family passes, a broken one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_env.cli.main import main
from opd_env.formats import FORMATS, get_format
from opd_env.formats.check import check_format, check_formats
from opd_env.formats.hermes import HermesFormat
from opd_env.formats.parse import ParsedTurn
from opd_env.messages import Message
from tests.formats.families import FAMILIES, family_tokenizer
from tests.tiny import tiny_tokenizer


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
        return list(tiny_tokenizer().encode(messages[-1]["content"], add_special_tokens=False))


def test_faults_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_env.formats.template._Proof.cases", lambda proof: ())
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
    assert "✗" not in shown.partition("chat_format")[0]
    assert "chat_format hermes ✓ passes" in " ".join(shown.split())
    family_tokenizer("Qwen 3").save_pretrained(tmp_path)
    assert main(["doctor", "--format", str(tmp_path)]) == 0
    assert "a further question" in " ".join(capsys.readouterr().out.split())
    tiny_tokenizer(template="{{ messages }}").save_pretrained(tmp_path)
    assert main(["doctor", "--format", str(tmp_path)]) == 1
    assert "✗" in capsys.readouterr().out
    assert main(["doctor", "--format", str(tmp_path / "none")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_a_format_can_be_named_and_all_are_told_of(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gemma = family_tokenizer("Gemma 3")
    findings = {one.name: one for one in check_formats(gemma)}
    assert list(findings) == list(FORMATS)
    assert {name for name, one in findings.items() if one.ok} == {"hermes", "tool_code"}
    assert "describes no tools" in findings["llama"].detail
    assert not next(one for one in check_formats(family_tokenizer("Qwen 3")) if one.name == "hermes").fails
    gemma.save_pretrained(tmp_path)
    assert main(["doctor", "--format", str(tmp_path), "--chat_format", "hermes"]) == 0
    assert "hermes; a turn ends with <end_of_turn>" in " ".join(capsys.readouterr().out.split())
    assert main(["doctor", "--format", str(tmp_path), "--chat_format", "llama"]) == 1
    assert "✗" in capsys.readouterr().out
    assert main(["doctor", "--format", str(tmp_path), "--chat_format", "lama"]) == 2
    assert "did you mean 'llama'?" in capsys.readouterr().err
    assert main(["doctor", "--chat_format", "llama"]) == 2
    assert "give --format MODEL too" in capsys.readouterr().err
