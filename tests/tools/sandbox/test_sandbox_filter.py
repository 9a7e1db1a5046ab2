"""The filters and their tables: numbers as the kernel's headers say, arguments checked bit by bit."""

import os
import platform
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_env.tools.sandbox.guest import seccomp, syscall_table
from opd_env.tools.sandbox.guest.syscall_table import AUDIT_ARCH, numbers

ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
# The generic header names these calls by their old names.
RENAMED = {"newfstatat": "fstatat"}


@pytest.mark.parametrize("machine", AUDIT_ARCH)
def test_numbers_are_those_of_the_kernels_headers(machine):
    header = HEADERS[machine]
    if not header.exists():
        pytest.skip(f"{header} is not installed")
    found = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", header.read_text())}
    for name, number in numbers(machine).items():
        assert found.get(name, found.get(RENAMED.get(name, ""))) == number, name


@pytest.mark.parametrize("machine", AUDIT_ARCH)
def test_no_number_stands_twice(machine):
    table = numbers(machine)
    assert len(set(table.values())) == len(table)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(NotImplementedError, match="riscv64"):
        numbers("riscv64")


def header_names(machine):
    """Name by number, from the kernel's header alone."""
    if not HEADERS[machine].exists():
        pytest.skip(f"{HEADERS[machine]} is not installed")
    found = re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", HEADERS[machine].read_text())
    old = {name: new for new, name in RENAMED.items()}
    return {int(number): old.get(name, name) for name, number in found}


def evaluate(program, number, arguments=(), arch=None):
    """Runs a filter as the kernel would."""
    data = struct.pack(
        "<iIQ6Q", number, arch or AUDIT_ARCH[platform.machine()], 0, *[*arguments, *[0] * (6 - len(arguments))]
    )
    position, accumulator = 0, 0
    while True:
        code, true, false, k = struct.unpack_from("<HBBI", program, position * 8)
        position += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif code == 0x54:
            accumulator &= k
        elif code == 0x15:
            position += true if accumulator == k else false
        elif code == 0x35:
            position += true if accumulator >= k else false
        else:
            assert code == 0x06
            return k


SLOT = seccomp.slot_filter(writable=True)
READ_ONLY = seccomp.slot_filter(writable=False)
PROGRAM = seccomp.program_filter(4321)
CALLS = numbers()


def refused(answer):
    return answer & 0xFFFF0000 == ERRNO and answer & 0xFFFF > 0


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
def test_what_is_not_listed_is_refused_whatever_its_arguments(number, arguments):
    answer = evaluate(SLOT, struct.unpack("<i", struct.pack("<I", number))[0], arguments)
    if number not in CALLS.values():
        assert answer == KILL if number >= 0x40000000 else refused(answer)
    assert evaluate(SLOT, 0, arch=0x40000003) == KILL


@pytest.mark.parametrize(
    "name", ["execve", "execveat", "mount", "umount2", "unshare", "pivot_root", "capset", "io_uring_setup", "open_tree"]
)
def test_the_slots_own_set_up_calls_are_closed_behind_it(name):
    assert refused(evaluate(SLOT, CALLS[name]))


@pytest.mark.parametrize("name", ["fchmod", "utimensat", "unlinkat", "mkdirat", "renameat2", "ftruncate", "linkat"])
def test_changes_are_allowed_only_in_a_world_of_its_own(name):
    assert evaluate(SLOT, CALLS[name]) == ALLOW
    assert refused(evaluate(READ_ONLY, CALLS[name]))


@pytest.mark.parametrize(
    ("name", "allowed", "denied"),
    [
        ("clone", [(17,), (0x3D0F00,)], [(0x10000011,), (0x20000,), (0x7E020000,), (0x40000000 | 17,)]),
        ("fcntl", [(0, 0), (0, 1030), (0, 6)], [(0, 8), (0, 10), (0, 1024), (0, 1026), (0, 1031), (0, 2**31)]),
        ("ioctl", [(0, 0x5401), (0, 0x541B)], [(0, 0x5412), (0, 0x8901), (0, 0x5452)]),
        ("socketpair", [(1, 1), (1, 1 | 0x80000)], [(1, 2), (1, 5), (2, 1), (1, 2 | 0x80000)]),
        ("getsockopt", [(3, 1, 3), (3, 1, 39)], [(3, 1, 17), (3, 1, 77), (3, 6, 3), (3, 1, 59), (3, 1, 2**31)]),
        (
            "futex",
            [(0, 0), (0, 128), (0, 9 | 256 | 128), (0, 5)],
            [(0, 6), (0, 7 | 128), (0, 11), (0, 13 | 256), (0, 512)],
        ),
        ("sendto", [(3, 1, 1, 0, 0, 0)], [(3, 1, 1, 0, 1, 0), (3, 1, 1, 0, 1 << 32, 0)]),
    ],
)
def test_arguments_are_checked_in_the_slot(name, allowed, denied):
    assert [evaluate(SLOT, CALLS[name], arguments) for arguments in allowed] == [ALLOW] * len(allowed)
    assert all(refused(evaluate(SLOT, CALLS[name], arguments)) for arguments in denied)


@pytest.mark.parametrize(
    ("name", "allowed", "denied"),
    [
        ("clone", [(0x3D0F00,)], [(17,), (0,), (0x4111,)]),
        ("kill", [(4321, 9), (4321, 0), (4321, 64)], [(1, 9), (0, 9), (2**64 - 1, 9), (4320, 9), (4321, 18)]),
        ("tgkill", [(4321, 5, 9)], [(1, 1, 9), (4321, 5, 18)]),
        ("prlimit64", [(0, 7, 0, 5), (4321, 7, 0, 5)], [(0, 7, 8, 0), (0, 7, 1 << 32, 0), (1, 7, 0, 5)]),
        ("prctl", [(15,), (16,)], [(1,), (4,), (22,), (38,)]),
        ("seccomp", [], [(1, 0, 0), (0, 0, 0)]),
        ("sendmsg", [], [(3, 0, 0)]),
        ("recvmsg", [], [(3, 0, 0)]),
        ("pidfd_open", [], [(1, 0)]),
        ("read", [(0,)], []),
    ],
)
def test_the_second_filter_takes_away_what_only_the_slot_needs(name, allowed, denied):
    assert [evaluate(PROGRAM, CALLS[name], arguments) for arguments in allowed] == [ALLOW] * len(allowed)
    assert all(refused(evaluate(PROGRAM, CALLS[name], arguments)) for arguments in denied)


def test_clone3_answers_that_it_does_not_exist_so_that_libraries_use_clone():
    assert evaluate(SLOT, CALLS["clone3"]) == ERRNO | 38


def test_the_other_architecture_can_be_assembled_too(monkeypatch):
    for machine in AUDIT_ARCH:
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        program = seccomp.slot_filter(writable=True)
        assert len(program) // 8 < 4096
        table = syscall_table.numbers(machine)
        assert evaluate(program, table["read"], arch=AUDIT_ARCH[machine]) == ALLOW
        assert refused(evaluate(program, table["mount"], arch=AUDIT_ARCH[machine]))


@pytest.mark.parametrize("machine", AUDIT_ARCH)
@pytest.mark.parametrize("writable", [True, False])
def test_every_number_that_is_let_through_has_a_name_on_the_list(monkeypatch, machine, writable):
    """On both architectures, with names that come from the kernel's header and not from our table."""
    names = header_names(machine)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    program = seccomp.slot_filter(writable=writable)
    listed = {*(seccomp._READS + seccomp._MEMORY + seccomp._TIME_AND_SIGNALS + seccomp._SELF).split()}
    listed |= {*seccomp._SLOT_ONLY.split(), *(seccomp._CHANGES.split() if writable else ())}
    by_arguments = {"fcntl", "ioctl", "socketpair", "getsockopt", "futex", "sendto", "clone"}
    samples = [(), (1, 1, 3), (2**64 - 1,) * 6, (1, 0x5401), (17, 0, 0)]
    numbers_let_through = {
        number
        for number in [*range(1200), 0x3FFFFFFF, 0x40000000, 0x40000001, 0x7FFFFFFF, -1, -(2**31)]
        if any(evaluate(program, number, sample, AUDIT_ARCH[machine]) == ALLOW for sample in samples)
    }
    assert {names[number] for number in numbers_let_through} == {
        name for name in names.values() if name in listed | by_arguments
    }
    wrong = [arch for arch in (1, 0x40000003, 0x40000028, *AUDIT_ARCH.values()) if arch != AUDIT_ARCH[machine]]
    assert all(evaluate(program, number, (), arch) == KILL for arch in wrong for number in range(600))


@pytest.mark.skipif(platform.system() != "Linux", reason="Landlock is Linux's")
def test_landlock_denies_in_a_process_of_its_own_and_passes_over_a_link_to_nothing(tmp_path):
    from opd_env.tools.sandbox.guest import landlock

    if landlock.abi() < landlock.REQUIRED_ABI:
        pytest.skip("this kernel has no Landlock, or an old one")
    (tmp_path / "a").write_text("a")
    # Debian's own Python has such a link in its library: to /etc, which the world that root builds does not have.
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    child = os.fork()
    if child == 0:
        try:
            landlock.restrict([os.path.dirname(os.__file__), f"{tmp_path}/link"])
            with open(os.__file__):
                pass
            for path, mode in ((tmp_path / "a", "r"), (tmp_path / "b", "w"), ("/etc/passwd", "r")):
                try:
                    with open(path, mode):
                        os._exit(1)
                except PermissionError:
                    continue
            os._exit(0)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
