"""Where a tool's code runs, and how it is stopped: a thread, or a process.

Stands on: ``tools.contract`` and ``tools.tool_error``. Read first: ``thread``.
Who may change it: with the hostile tools of ``tests/tools/run`` (hang, raise, flood, die).
"""
