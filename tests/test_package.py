"""The package as users get it: quick to import, with the names that are promised."""

from __future__ import annotations

import subprocess
import sys

import pytest

import opd_env


def run(*words: object, **options: object) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=240, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def test_import_needs_neither_torch_nor_numpy() -> None:
    code = "import opd_env, sys; print([name for name in ('torch', 'numpy', 'gymnasium') if name in sys.modules])"
    assert run(sys.executable, "-c", code).strip() == "[]"


def test_every_public_name_can_be_had() -> None:
    for name in opd_env.__all__:
        assert getattr(opd_env, name) is not None
    from opd_env.formats import get_format
    from opd_env.tasks.gsm8k import score_answer
    from opd_env.tools import open_sandbox
    from opd_env.trainer import OPDConfig, OPDTrainer, advantage, get_divergence, policy_loss, register_divergence

    assert dir(opd_env) == sorted([*opd_env.__all__, "__version__"]), "what completion shows is what there is to use"
    assert callable(opd_env.rollout)
    assert all([get_format, score_answer, open_sandbox, OPDConfig, OPDTrainer, advantage, get_divergence, policy_loss, register_divergence])  # fmt: skip  # noqa: E501
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        opd_env.nothing  # noqa: B018


def test_a_log_file_holds_no_progress_bars_of_other_libraries() -> None:
    code = "from opd_env.cli.main import main; main(['-V']); from tqdm.auto import tqdm; list(tqdm(range(3)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
