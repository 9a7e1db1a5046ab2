"""verl's configuration, made once; verl is imported only where a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.plugins.verl.verl_worker import verl_config

    return verl_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def builtin_loop() -> Iterator[None]:
    """verl's registry as the plug-in left it: a worker that reads a file of agent loops changes it for good."""
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry

    before = dict(_agent_loop_registry)
    yield
    _agent_loop_registry.clear()
    _agent_loop_registry.update(before)
