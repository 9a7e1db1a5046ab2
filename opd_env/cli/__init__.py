"""The command ``opd-env``. Every command lives in its own module and is imported when it is called.

Test it alone: ``pytest tests/cli/test_cli.py``
"""

from opd_env.cli.main import main

__all__ = ["main"]
