"""What every test of the trainer starts from."""

import pytest

from opd_env.trainer.math import divergences
from tests.trainer.together import launcher_environment


@pytest.fixture(autouse=True)
def forget_registered_divergences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A divergence that one test registers is gone for the next."""
    monkeypatch.setattr(divergences, "_REGISTERED", dict(divergences._REGISTERED))


@pytest.fixture(scope="session")
def sharding() -> dict[str, str]:
    """The variables of the shipped FSDP2 configuration."""
    return {name: value for name, value in launcher_environment("fsdp2.yaml").items() if "FSDP" in name}
