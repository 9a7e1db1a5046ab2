"""The tools that come with the kit: calculator, search, code execution.

A newcomer may add one: a typed, documented function with ``@tool``, a line in ``tools.catalogue``, and its tests.
"""
