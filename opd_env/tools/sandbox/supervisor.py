"""The trainer's side of the kernel sandbox: one zygote, and how it is told to make a slot.

Test it alone: ``pytest tests/tools/sandbox``
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping

from opd_env.tools.sandbox.base import NOBODY, OutOfDescriptors, SetUpFailed
from opd_env.tools.sandbox.boot import guest_command, guest_environment
from opd_env.tools.sandbox.guest import protocol
from opd_env.tools.sandbox.guest.zygote import Settings
from opd_env.tools.sandbox.kernel_slot import Slot

_START_S = 60.0
"""Seconds that a zygote may take to import its modules on a busy machine."""
_SLOT_START_S = 10.0


class Zygote:
    """The process that slots are forked from, as its supervisor sees it."""

    def __init__(self, backend: str, modules: list[str], packages: Mapping[str, str], libraries: list[str]) -> None:
        try:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise _set_up_failure(error) from error
        with theirs:
            settings = Settings(
                backend=backend,
                control=theirs.fileno(),
                parent=os.getpid(),
                user=NOBODY,
                modules=modules,
                packages=dict(packages),
                libraries=libraries,
            )
            try:
                self._process = subprocess.Popen(
                    [*guest_command("zygote"), json.dumps(dataclasses.asdict(settings))],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=guest_environment("/w"),
                    cwd="/",
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            except OSError as error:
                self._control.close()
                raise _set_up_failure(error) from error
        try:
            _expect_ready(self._control, _START_S)
        except SetUpFailed:
            self.close()
            raise

    def spawn(self) -> Slot:
        """A new slot.

        Raises:
            SetUpFailed: if the zygote is gone or a step was refused.
        """
        with contextlib.ExitStack() as if_it_fails:
            try:
                control, their_control, requests, their_requests = (
                    if_it_fails.enter_context(end)
                    for _ in range(2)
                    for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                )
                socket.send_fds(self._control, [protocol.SPAWN], [their_control.fileno(), their_requests.fileno()])
                their_control.close()
                their_requests.close()
                handle = _expect_ready(control, _SLOT_START_S)
            except OSError as error:
                raise _set_up_failure(error) from error
            if_it_fails.pop_all()
            return Slot(control, requests, handle)

    def close(self) -> None:
        """Kills it, and with it all of its slots."""
        self._control.close()
        self._process.kill()
        self._process.wait()


def _set_up_failure(error: OSError) -> SetUpFailed:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return OutOfDescriptors(error)
    return SetUpFailed(f"start a process: {error}")


def _expect_ready(channel: socket.socket, seconds: float) -> int:
    """Waits for READY; returns the pidfd that came before it, or -1.

    Raises:
        SetUpFailed: if the other side says why it failed, ends, or is silent.
    """
    handle = -1
    deadline = time.monotonic() + seconds
    try:
        ready = False
        # The handle of a slot comes from another process than its READY: in either order.
        while True:
            channel.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                message, descriptors, flags, _ = socket.recv_fds(channel, 4096, 1)
            except TimeoutError:
                raise SetUpFailed(f"no answer within {seconds:g} s") from None
            if flags & socket.MSG_CTRUNC:
                raise OutOfDescriptors("a descriptor could not be received")
            if descriptors:
                handle = descriptors[0]
            if message.startswith(protocol.FAILED):
                raise SetUpFailed(message[1:].decode("utf-8", "replace"))
            if not message:
                raise SetUpFailed("the process ended without a word")
            ready = ready or message == protocol.READY
            if ready and (handle >= 0 or seconds == _START_S):
                channel.settimeout(None)
                return handle
    except BaseException:
        if handle >= 0:
            os.close(handle)
        raise
