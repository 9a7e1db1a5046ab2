"""Run by root: becomes a normal user, who can reach the interpreter, and executes a Python program as him.

    python tests/tools/sandbox/sandbox_as_user.py program.py arguments

The interpreter may lie in a folder that only root may enter. In a mount namespace of its own, such a folder
is covered by an empty one with the interpreter mounted in it, so nothing of the machine changes.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from opd_env.tools.sandbox.guest import linux

USER = 61_234


def closed_to_others(path: Path) -> Path | None:
    """The first folder on the way to a path that not everybody may enter."""
    for folder in reversed([path, *path.parents]):
        if not folder.stat().st_mode & stat.S_IXOTH:
            return folder
    return None


def main(arguments: list[str]) -> None:
    """Never returns: executes the program."""
    needed = {Path(os.path.realpath(sys.base_prefix)), Path(sys.prefix).resolve(), Path.cwd()}
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
    for path in sorted(needed):
        while (closed := closed_to_others(path)) is not None:
            tree = linux.open_tree(str(path))
            linux.mount("none", str(closed), "tmpfs", 0, "size=1m,mode=755")
            path.mkdir(parents=True, exist_ok=True)
            linux.move_mount(tree, str(path))
            os.close(tree)
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    os.execve(sys.executable, [sys.executable, *arguments], {**os.environ, "HOME": "/"})


if __name__ == "__main__":
    main(sys.argv[1:])
