"""The parser of commands without a settings file: a mistake is one sentence, like every other.

Test it alone: ``pytest tests/cli/test_cli.py``
"""

from __future__ import annotations

import argparse
from typing import NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """Raises instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Takes argparse's sentence.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}; {self.prog} --help tells what it takes")
