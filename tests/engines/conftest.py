"""What tests of several files start once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.vllm_server import Server


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real vLLM server; its weights are those that a test gave it last."""
    server = Server(tmp_path_factory.mktemp("vllm") / "server.log")
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()
