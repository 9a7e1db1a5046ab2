"""A secret of a tool reaches neither the student, nor a trajectory, nor the log."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.errors import UserError
from opd_env.tools import Tool, Toolbox, ToolError, ToolErrorKind
from opd_env.tools.redaction import MIN_SECRET_CHARS, redact, secrets_of

SECRET = 's3cr"et/ key\\é'


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_KEY", SECRET)


def key() -> str:
    return os.environ["SHOP_KEY"]


def failing(error: Callable[[str], BaseException]) -> Callable[[], None]:
    def fail() -> None:
        raise error(key())

    return fail


def make(function: Callable[[], object], **options: object) -> Tool:
    return Tool(name="t", description="T.", parameters={"type": "object"}, function=function, secrets=["SHOP_KEY"],
                **options)  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize(
    "function",
    [
        key,
        lambda: [{"the key": key()}],
        lambda: f"https://shop/?key={quote(key(), safe='')}",
        lambda: repr(key()),
        lambda: "x" * 3995 + key(),
        failing(RuntimeError),
        failing(KeyError),
        failing(lambda text: RuntimeError("x" * 295 + text)),
        failing(lambda text: ToolError(ToolErrorKind.EXCEPTION, f"key {text} was refused")),
        failing(SystemExit),
    ],
)
def test_it_is_taken_out_of_whatever_a_tool_gives(
    function: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        content = call(function)
    for text in (content, caplog.text):
        assert all(part not in text for part in (SECRET, "s3cr", quote(SECRET)))
    assert "[secret]" in content or len(content) > 290, content


def call(function: Callable[[], object], **options: object) -> str:
    with Toolbox([make(function, **options)]) as toolbox:
        return toolbox.call("t", {}).content


def test_it_is_taken_out_in_a_process_too() -> None:
    assert call(key, isolation="process") == "[secret]"


@pytest.mark.parametrize("value", [None, "", "short", "  \n"])
def test_a_missing_one_is_refused_before_the_first_call(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOP_KEY")
    if value is not None:
        monkeypatch.setenv("SHOP_KEY", value)
    with pytest.raises(UserError, match=r"tool 't' needs the environment variable SHOP_KEY with at least 6 "):
        Toolbox([make(key)])


@given(
    secret=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=MIN_SECRET_CHARS).filter(
        lambda text: len(text.strip()) >= MIN_SECRET_CHARS
    ),
    around=st.text(max_size=5),
)
def test_no_form_of_any_secret_is_left(secret: str, around: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOP_KEY", secret)
        forms = secrets_of(make(key))
    for text in (secret, json.dumps(secret), json.dumps(secret, ensure_ascii=False), quote(secret), repr(secret)):
        assert secret.strip() not in redact(f"{around}{text}{around}", forms).replace("[secret]", "")
