"""The file system that the code sees: an interpreter, its libraries, four devices, an empty folder.

Of the machine's files only those that Python needs are there, read-only. There is no /proc, no /etc (but
ld.so.cache), no /home, no /tmp, no /dev/shm.

Test it alone: ``pytest tests/tools/sandbox/test_sandbox_attacks.py``
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from opd_env.tools.sandbox.guest import linux

WORK_FOLDER = "/w"
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_STAGE = "/dev"  # exists everywhere; covered in our own mount namespace only, once its devices are in hand
_MORE_FILES = ("/etc/ld.so.cache", "/usr/share/zoneinfo")
_PACKAGE_FOLDERS = ("site-packages", "dist-packages")


def standard_library() -> list[str]:
    """Folders of the standard library, resolved."""
    return sorted({os.path.realpath(path) for path in sys.path if os.path.isdir(path)})


def library_folders() -> list[str]:
    """Folders of the shared libraries that this process has mapped: import first what will be needed."""
    with open("/proc/self/maps") as maps:
        files = {line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line}
    return sorted({os.path.dirname(os.path.realpath(file)) for file in files if ".so" in file})


def without_nested(paths: Iterable[str]) -> list[str]:
    """The paths that lie in no other of them."""
    kept: list[str] = []
    for path in sorted({os.path.realpath(path) for path in paths if os.path.exists(path)}):
        if not kept or not path.startswith((f"{kept[-1]}/", *(f"{parent}/" for parent in kept))):
            kept.append(path)
    return kept


def landlock_readable(packages: Sequence[str]) -> tuple[list[str], list[str]]:
    """What the code may read where the machine's own tree stays in place.

    Returns:
        Folders and files that may be read, and folders that may only be listed (the standard library's own:
        its entries are named one by one, without what is installed for other programs).
    """
    listed = standard_library()
    readable = [*packages, *_MORE_FILES]
    for folder in listed:
        readable += [entry.path for entry in os.scandir(folder) if entry.name not in _PACKAGE_FOLDERS]
    with open("/proc/self/maps") as maps:
        mapped = {line.split(maxsplit=5)[-1].strip() for line in maps if ".so" in line}
    for folder in library_folders():
        holds_python = any(f"{path}/".startswith(f"{folder}/") for path in listed)
        inside = (os.path.realpath(file) for file in mapped)
        readable += [file for file in inside if os.path.dirname(file) == folder] if holds_python else [folder]
    return readable, listed


def enter(packages: Sequence[str]) -> None:
    """Builds the world and makes it this process's root. Needs CAP_SYS_ADMIN in its mount namespace.

    Args:
        packages: folders of installed packages that the code may import.
    """
    masks = [
        os.path.join(folder, name)
        for folder in standard_library()
        for name in _PACKAGE_FOLDERS
        if os.path.isdir(os.path.join(folder, name))
    ]
    masked = [path for path in packages if any(path.startswith(f"{mask}/") for mask in masks)]
    others = [path for path in packages if path not in masked]
    sources = without_nested([*standard_library(), *library_folders(), *others, *_MORE_FILES])

    linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
    trees = {path: linux.open_tree(path) for path in (*sources, *masked, *DEVICES)}
    links = {path: os.readlink(path) for path in _top_level_links()}
    tmpfs = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    linux.mount("none", _STAGE, "tmpfs", tmpfs, "size=1m,nr_inodes=1000,mode=755")
    for path in sources:
        _attach(trees[path], path, linux.MOUNT_ATTR_NODEV)
    for path in DEVICES:
        _attach(trees[path], path, 0)
    for path in masks:
        linux.mount("none", _STAGE + path, "tmpfs", tmpfs, "size=64k,nr_inodes=100,mode=755")
    for path in masked:
        _attach(trees[path], path, linux.MOUNT_ATTR_NODEV)
    for path, target in links.items():
        if not os.path.lexists(_STAGE + path):
            os.makedirs(os.path.dirname(_STAGE + path), exist_ok=True)
            os.symlink(target, _STAGE + path)
    os.mkdir(_STAGE + WORK_FOLDER)
    linux.pivot_into(_STAGE)
    linux.restrict_mounts(-1, "/", linux.MOUNT_ATTR_RDONLY)


def _attach(tree: int, path: str, attributes: int) -> None:
    target = Path(_STAGE + path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.isdir(path) and path not in DEVICES:
        target.mkdir(exist_ok=True)
    else:
        target.touch()
    always = linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID
    linux.restrict_mounts(tree, "", always | attributes)
    linux.move_mount(tree, str(target))
    os.close(tree)


def _top_level_links() -> list[str]:
    """Links such as /lib -> usr/lib, through which the loader finds its libraries."""
    candidates = ["/lib", "/lib32", "/lib64", "/libx32", "/usr/lib64"]
    return [path for path in candidates if os.path.islink(path)]
