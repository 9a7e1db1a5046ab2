"""Tools of a real MCP server: schemas are kept, errors typed, and a server that hangs or dies is started again."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opd_env.tools import Toolbox, ToolErrorKind, get_tool
from opd_env.tools import catalogue as tool_catalogue
from opd_env.tools.mcp import tools as mcp
from opd_env.tools.mcp.tools import MountedServer, mount_mcp, register_mcp_servers
from opd_env.tools.redaction import SecretMissing
from tests.ports import kept_port

pytest.importorskip("mcp", reason="needs the extra mcp")
from opd_env.tools.mcp.connection import MCPUnavailable

SHOP = str(Path(__file__).with_name("mcp_shop.py"))
LIMIT = 2.0


@pytest.fixture(scope="module")
def key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOP_KEY", "s3cret-key")
        yield


@pytest.fixture(scope="module")
def shop(key: None) -> Iterator[MountedServer]:
    with mount_mcp([sys.executable, SHOP], timeout_s=LIMIT, secrets=["SHOP_KEY"]) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def http_shop() -> Iterator[MountedServer]:
    with kept_port() as port, subprocess.Popen([sys.executable, SHOP, str(port)], stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    mounted = mount_mcp(f"http://127.0.0.1:{port}/mcp", timeout_s=LIMIT)
                    break
                except MCPUnavailable:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.2)
            with mounted:
                yield mounted
        finally:
            process.kill()


@pytest.fixture(params=["shop", "http_shop"])
def toolbox(request: pytest.FixtureRequest) -> Toolbox:
    return Toolbox(list(request.getfixturevalue(request.param)))


def test_names_descriptions_and_schemas_are_the_servers(toolbox: Toolbox) -> None:
    assert [tool.name for tool in toolbox] == ["price", "misbehave", "hang"]
    assert [tool.mutates_state for tool in toolbox] == [False, True, True]
    price = toolbox.schemas[0]["function"]
    assert price["description"] == "Says what something costs."
    assert price["parameters"]["required"] == ["item"]
    assert price["parameters"]["properties"]["item"]["description"] == "what to buy"


def test_it_answers_and_refuses_like_any_tool(toolbox: Toolbox) -> None:
    assert '"total": 3.0' in toolbox.call("price", {"item": "pen", "count": 2}).content
    wrong = toolbox.call("price", {"itm": "pen"})
    assert wrong.error is ToolErrorKind.SCHEMA
    assert "did you mean 'item'" in wrong.content
    failed = toolbox.call("price", {"item": "unicorn"})
    assert failed.error is ToolErrorKind.EXCEPTION
    assert "no unicorn on sale" in failed.content


def test_a_call_that_hangs_is_a_timeout_and_the_server_goes_on(toolbox: Toolbox) -> None:
    pid = toolbox.call("misbehave", {"how": "pid"}).content
    start = time.monotonic()
    assert toolbox.call("hang", {"server_too": False}).error is ToolErrorKind.TIMEOUT
    assert LIMIT <= time.monotonic() - start < LIMIT + 30
    assert toolbox.call("misbehave", {"how": "pid"}).content == pid


@pytest.mark.parametrize("how", ["die", "hang"])
def test_a_server_that_dies_or_hangs_is_an_error_on_time_and_is_started_again(shop: MountedServer, how: str) -> None:
    toolbox = Toolbox(list(shop))
    pid = toolbox.call("misbehave", {"how": "pid"}).content
    start = time.monotonic()
    if how == "die":
        assert toolbox.call("misbehave", {"how": "die"}).error is ToolErrorKind.EXCEPTION
    else:
        assert toolbox.call("hang", {"server_too": True}).error is ToolErrorKind.TIMEOUT
    assert time.monotonic() - start < LIMIT + 30
    deadline = time.monotonic() + 30
    while not (again := toolbox.call("misbehave", {"how": "pid"})).ok:
        assert time.monotonic() < deadline
    assert again.content != pid


def test_long_answers_are_cut_and_secrets_taken_out(shop: MountedServer, caplog: pytest.LogCaptureFixture) -> None:
    toolbox = Toolbox(list(shop))
    with caplog.at_level(logging.DEBUG):
        assert toolbox.call("misbehave", {"how": "long"}).truncated
        assert toolbox.call("misbehave", {"how": "key"}).content == "[secret]"
        assert "s3cret" not in toolbox.call("price", {"item": "unicorn"}).content
    assert "s3cret" not in caplog.text


def test_a_server_that_cannot_be_started_is_refused_with_its_last_words(key: None) -> None:
    with pytest.raises(MCPUnavailable, match="no/such/program"):
        mount_mcp(["no/such/program"])
    program = "import os, sys; sys.exit(os.environ['SHOP_KEY'] + ' is wrong')"
    with pytest.raises(MCPUnavailable, match=r"it said: .*\[secret\] is wrong"):
        mount_mcp([sys.executable, "-c", program], secrets=["SHOP_KEY"])
    with pytest.raises(MCPUnavailable, match=r"127\.0\.0\.1:9/mcp"):
        mount_mcp("http://127.0.0.1:9/mcp")
    with pytest.raises(SecretMissing, match="NO_SUCH_KEY"):
        mount_mcp([sys.executable, SHOP], secrets=["NO_SUCH_KEY"])


def test_a_server_that_is_gone_for_good_is_not_the_students_fault(tmp_path: Path, key: None) -> None:
    once = tmp_path / "once.py"
    once.write_text(Path(SHOP).read_text())
    with mount_mcp([sys.executable, str(once)], prefix="once_") as mounted, Toolbox(list(mounted)) as toolbox:
        once.unlink()
        assert toolbox.call("once_misbehave", {"how": "die"}).error is ToolErrorKind.EXCEPTION
        gone = toolbox.call("once_price", {"item": "pen"})
    assert gone.error is ToolErrorKind.SANDBOX
    assert "cannot be reached" in gone.content


def test_servers_of_a_settings_file_are_mounted_once_and_named_like_other_tools(
    key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool_catalogue, "_registered", {})
    servers = {"shop": {"server": [sys.executable, SHOP], "prefix": "shop_"}}
    register_mcp_servers(servers)
    register_mcp_servers(servers)
    assert Toolbox(["shop_price"]).call("shop_price", {"item": "pen"}).ok
    assert get_tool("shop_price").name == "shop_price"
    mcp._registered.pop("shop").close()
    with pytest.raises(ValueError, match=r"mcp_servers\.maps: .*'commnd'"):
        register_mcp_servers({"maps": {"commnd": ["x"]}})
