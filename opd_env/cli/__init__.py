"""The command ``opd-env``. Every command lives in its own module and is imported when it is called.

Stands on everything; nothing stands on it. Read first: ``main``, the list of commands.
Who may change it: anyone, thinly: what a command does belongs to a room below.

Test it alone: ``pytest tests/cli/test_cli.py``
"""

from opd_env.cli.main import main

__all__ = ["main"]
