"""The code on the far side of the wall: it runs in the processes that untrusted code is forked from.

It is started without the rest of opd_env, in a bare interpreter (``opd_env/tools/sandbox/interpreter.py``), so it
imports the standard library and itself, and nothing else.
"""
