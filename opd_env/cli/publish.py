"""``opd-env publish`` writes a run's model card, and uploads the trained student.

Test it alone: ``pytest tests/report/test_model_card.py``
"""

from __future__ import annotations

from collections.abc import Sequence

from opd_env.cli.arguments import ArgumentParser
from opd_env.report.model_card import publish


def run(command: str, arguments: Sequence[str]) -> int:
    """Carries out the command."""
    parser = ArgumentParser(
        prog=f"opd-env {command}",
        description="Writes a model card into RUN/model, which transformers and vLLM load; --push uploads that folder.",
    )
    parser.add_argument("run", help="the folder of a finished run, such as runs/demo")
    parser.add_argument("--push", metavar="OWNER/NAME", help="repository on the Hugging Face hub to upload to")
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    chosen = parser.parse_args(list(arguments))

    print(publish(chosen.run, push=chosen.push, private=chosen.private))
    return 0
