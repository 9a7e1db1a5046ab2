"""The zygote: walls itself in, imports what the code may need, and forks slots when it is told to.

It is started for one supervisor and one set of modules, holds no secrets, and runs nothing untrusted itself.
Two backends: ``namespaces`` builds a world of its own; ``landlock`` stays in the machine's and may only read
what Python needs.

Test it alone: ``pytest tests/tools/sandbox``
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

from opd_env.tools.sandbox.guest import landlock, linux, protocol, runner, seccomp, slot, world
from opd_env.tools.sandbox.guest.slot import Surroundings

_USER_INSIDE = 1000
_ROOM_FOR_THREADS = 1000
_MODULES = """
    abc argparse array ast asyncio base64 bisect calendar cmath collections.abc colorsys contextlib copy csv ctypes
    dataclasses datetime decimal difflib enum fractions functools hashlib heapq html inspect io itertools json
    keyword linecache locale logging math numbers operator os pathlib pprint queue random re secrets shutil signal
    socket statistics string struct tempfile textwrap threading time timeit tokenize traceback types typing
    unicodedata unittest uuid warnings zlib encodings.idna encodings.latin_1 encodings.utf_16
"""
"""Imported once, so that a program's own imports cost nothing. All others can be imported, too."""


@dataclass(frozen=True)
class Settings:
    """What the supervisor tells the zygote, as JSON on the command line."""

    backend: str
    control: int
    """Descriptor of the control socket."""
    parent: int
    """Process number of the supervisor."""
    user: int
    """If started by root: the user and group to become."""
    modules: list[str]
    """Modules to import before anything else."""
    packages: dict[str, str]
    """Folder of each installed package that may be imported, by its import name."""
    libraries: list[str]
    """Folders that these need beside their own."""


class _Packages:
    """Finds the packages of the settings, and no other: there are no site-packages in here."""

    def __init__(self, folders: Mapping[str, str]) -> None:
        self._folders = folders

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = self._folders.get(name)
        if folder is None:
            return None
        start = f"{folder}/__init__.py"
        return importlib.util.spec_from_file_location(name, start, submodule_search_locations=[folder])


def main(arguments: list[str]) -> NoReturn:
    """Serves until the supervisor closes the control socket, or is gone."""
    settings = Settings(**json.loads(arguments[0]))
    control = socket.socket(fileno=settings.control)
    step = ["start"]
    try:
        parent = os.pidfd_open(settings.parent)
        if os.getppid() != settings.parent:
            os._exit(0)
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_DFL)
        # If memory runs out, the kernel ends what untrusted code has filled, and not the trainer.
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")
        _import(settings)
        base_bytes = _address_space()
        base_threads, proc = 0, -1
        if settings.backend == "namespaces":
            proc = _enter_namespaces(settings, step)
            _fork_first_process(control, step)
        else:
            base_threads = _enter_landlock(settings, step)
    except BaseException as error:
        control.send(protocol.FAILED + f"{step[0]}: {error or type(error).__name__}".encode()[:4000])
        os._exit(1)
    runner.warm_up()
    namespace = runner.prepare()
    gc.collect()
    gc.freeze()
    control.send(protocol.READY)
    _serve(control, parent, proc, Surroundings(proc >= 0, base_bytes, base_threads, namespace))


def _import(settings: Settings) -> None:
    sys.meta_path.append(_Packages(settings.packages))
    for module in (*_MODULES.split(), *settings.modules):
        importlib.import_module(module)


def _enter_namespaces(settings: Settings, step: list[str]) -> int:
    """Unshares, builds the world, drops all rights; returns a descriptor of /proc for the slots' set-up."""
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    packages = [*settings.packages.values(), *settings.libraries]
    own = (
        linux.CLONE_NEWUSER
        | linux.CLONE_NEWPID
        | linux.CLONE_NEWNET
        | linux.CLONE_NEWIPC
        | linux.CLONE_NEWUTS
        | linux.CLONE_NEWCGROUP
    )
    as_root = os.geteuid() == 0
    if as_root:
        # The world first: the interpreter may lie where only root can enter.
        step[0] = "unshare the mount namespace"
        linux.unshare(linux.CLONE_NEWNS)
        step[0] = "build the file system"
        world.enter(packages)
        step[0] = "become an unprivileged user"
        _become(settings.user)
    user, group = os.geteuid(), os.getegid()
    step[0] = "unshare the user namespace"
    linux.set_dumpable(True)  # else /proc/self/uid_map belongs to root
    linux.unshare(own if as_root else own | linux.CLONE_NEWNS)
    linux.set_dumpable(True)
    step[0] = "map the user"
    linux.map_one_user(proc, _USER_INSIDE, user, group)
    if not as_root:
        step[0] = "build the file system"
        world.enter(packages)
    socket.sethostname("sandbox")
    step[0] = "drop capabilities"
    linux.drop_bounding_set()
    linux.drop_capabilities()
    linux.no_new_privileges()
    return proc


def _become(user: int) -> None:
    linux.drop_bounding_set()
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _fork_first_process(control: socket.socket, step: list[str]) -> None:
    """Goes on as process 1 of the new pid namespace; the process that was started waits for its end."""
    step[0] = "fork into the pid namespace"
    first = os.fork()
    if first:
        control.close()
        _, wait_status = os.waitpid(first, 0)
        os._exit(os.waitstatus_to_exitcode(wait_status) & 0xFF)
    linux.die_with_parent()
    os.setsid()


def _enter_landlock(settings: Settings, step: list[str]) -> int:
    """Restricts itself; returns how many threads the user has already."""
    packages = [*settings.packages.values(), *settings.libraries]
    step[0] = "find the interpreter's files"
    readable, listed = world.landlock_readable(packages)
    as_root = os.geteuid() == 0
    # RLIMIT_NPROC counts all threads of the user, the trainer's own with them, which may grow in number.
    threads = _threads_of(settings.user if as_root else os.geteuid()) + _ROOM_FOR_THREADS
    if as_root:
        # The interpreter may lie where only root can enter; where root may mount, that is mended.
        with contextlib.suppress(PermissionError):
            linux.unshare(linux.CLONE_NEWNS)
            world.enter(packages)
    step[0] = "restrict by Landlock"
    landlock.restrict(readable, listed, world.DEVICES)
    os.chdir("/")
    if as_root:
        step[0] = "become an unprivileged user"
        _become(settings.user)
    step[0] = "read the standard library as an unprivileged user"
    with open(contextlib.__file__, "rb"):
        return threads


def _threads_of(user: int) -> int:
    count = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                if entry.stat().st_uid == user:
                    count += len(os.listdir(f"{entry.path}/task"))
    return count


def _address_space() -> int:
    """Bytes of address space that this process has mapped."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def _serve(control: socket.socket, parent: int, proc: int, here: Surroundings) -> NoReturn:
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(parent, select.POLLIN)
    while True:
        events = dict(poll.poll(1000))
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if parent in events:
            os._exit(0)
        if control.fileno() in events:
            message, descriptors, _, _ = socket.recv_fds(control, 16, 2)
            if not message:
                os._exit(0)
            channel, requests = (socket.socket(fileno=descriptor) for descriptor in descriptors)
            child = os.fork()
            if child == 0:
                control.close()
                os.close(parent)
                _become_slot(channel, requests, proc, here)
            if not here.own_namespaces:
                _send_handle(channel, child)
            channel.close()
            requests.close()


def _send_handle(channel: socket.socket, process: int) -> None:
    handle = os.pidfd_open(process)
    socket.send_fds(channel, [protocol.PIDFD], [handle])
    os.close(handle)


def _become_slot(channel: socket.socket, requests: socket.socket, proc: int, here: Surroundings) -> NoReturn:
    """Goes on as a slot. Whatever fails is told to the supervisor, and ends the process."""
    step = "start the slot"
    try:
        if here.own_namespaces:
            step = "unshare the slot's namespaces"
            linux.set_dumpable(True)
            linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWPID | linux.CLONE_NEWNS | linux.CLONE_NEWIPC)
            linux.set_dumpable(True)
            linux.map_one_user(proc, _USER_INSIDE, _USER_INSIDE, _USER_INSIDE)
            first = os.fork()
            if first:
                _send_handle(channel, first)
                os._exit(0)
            os.close(proc)
            step = "mount the slot's folder"
            flags = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
            linux.mount(
                "none", world.WORK_FOLDER, "tmpfs", flags, f"size={protocol.FOLDER_BYTES},nr_inodes=2000,mode=700"
            )
            os.chdir(world.WORK_FOLDER)
            step = "drop capabilities"
            linux.drop_bounding_set()
            linux.drop_capabilities()
        else:
            linux.die_with_parent()
        linux.no_new_privileges()
        linux.set_dumpable(False)
        step = "install the filter"
        seccomp.install(seccomp.slot_filter(writable=here.own_namespaces))
        slot.serve(channel, requests, here)
    except BaseException as error:
        channel.send(protocol.FAILED + f"{step}: {error or type(error).__name__}".encode()[:4000])
    finally:
        os._exit(1)
