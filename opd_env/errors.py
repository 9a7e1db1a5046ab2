"""The base of errors that a user can mend: the command line shows their sentence instead of a traceback.

``ValueError`` (settings, names, data), ``OSError`` (files, disk, network) and ``ImportError`` (extras) say enough by
themselves. What fits none of them is a ``UserError``.

Test it alone: ``pytest tests/core/test_cli.py``
"""


class UserError(RuntimeError):
    """Its text is one sentence: what is wrong, and what to do."""
