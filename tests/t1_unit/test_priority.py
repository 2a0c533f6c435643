"""Who goes behind whom, as the kernel says it afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SAY = """
import ctypes, os, struct, sys, threading
from asrfs.storage import priority

def turns():
    got = ctypes.create_string_buffer(48)
    number = {"x86_64": 315, "aarch64": 275, "riscv64": 275, "ppc64le": 356, "s390x": 346}[os.uname().machine]
    assert ctypes.CDLL(None).syscall(number, 0, got, 48, 0) == 0
    return struct.unpack("=IIQiIQQQ", got.raw)[5]

for call in sys.argv[1:]:
    name, _, number = call.partition("=")
    getattr(priority, name)(*([int(number)] if number else []))
begun = []
thread = threading.Thread(target=lambda: begun.append(turns()))
thread.start()
thread.join()
session = open("/proc/self/autogroup").read() if os.path.exists("/proc/self/autogroup") else ""
session = session.split()[-1] if session else "none"
print(os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0) == os.SCHED_IDLE, session, turns(), *begun)
"""
LONGEST, SHORTEST = 100_000_000, 100_000


def said_after(*calls: str, leads: bool = True) -> tuple[int, bool, str, int, int]:
    """Niceness, whether it is idle, the session's niceness, length of turns, and of those of a thread begun then."""
    done = subprocess.run(
        [sys.executable, "-c", _SAY, *calls],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        start_new_session=leads,
    )
    niceness, idle, session, turns, begun = done.stdout.split()
    return int(niceness), idle == "True", session, int(turns), int(begun)


def length(turns_ns: int) -> int:
    """What is said of such turns: nothing by a kernel that knows none (before 6.12)."""
    return turns_ns if said_after()[3] else 0


def grouped(niceness: int) -> tuple[str, str]:
    """A kernel without groups of sessions has nothing to say, nor any of who was begun outside of all sessions."""
    return str(niceness), "none"


def test_who_stands_back_does_so_with_all_it_begins_and_keeps_its_share() -> None:
    niceness, idle, session, turns, begun = said_after("stand_back=19")
    assert (niceness, idle) == (19, False)
    assert session in grouped(0)
    assert turns == begun == length(LONGEST)


def test_who_yields_does_so_with_its_session() -> None:
    niceness, idle, session, turns, begun = said_after("yield_to_others")
    assert (niceness, idle) == (19, False)
    assert session in grouped(19)
    assert turns == begun == length(LONGEST)


def test_nobody_comes_forward_by_standing_back() -> None:
    niceness, _, session, *_ = said_after("yield_to_others", "stand_back=10")
    assert niceness == 19
    assert session in grouped(19)


def test_a_session_of_somebody_else_stays_as_it_is() -> None:
    before = said_after("be_usual", leads=False)[2]
    niceness, _, session, *_ = said_after("yield_to_others", leads=False)
    assert (niceness, session) == (19, before)


def test_a_disk_server_has_short_turns_and_nothing_else_changes() -> None:
    before = said_after("be_usual")
    after = said_after("stand_back=0", "serve_at_once")
    assert after == (*before[:3], length(SHORTEST), length(SHORTEST))


def test_a_command_waits_and_what_it_begins_does_not() -> None:
    usual = said_after("be_usual")[3]
    *_, turns, begun = said_after("wait_for_others")
    assert (turns, begun) == (length(LONGEST), usual)
    assert said_after("wait_for_others", "be_usual")[3:] == (usual, usual)


def test_one_that_runs_only_when_idle_stays_so() -> None:
    """Its own main says what it would be otherwise."""
    for call in ("serve_at_once", "be_usual", "wait_for_others", "stand_back=10"):
        niceness, idle, session, *_ = said_after("run_only_when_idle=0", call)
        assert (niceness, idle) == (19, True)
        assert session in grouped(19)


def test_a_child_in_a_session_of_its_own_has_the_niceness_of_ours() -> None:
    if not Path("/proc/self/autogroup").exists():
        return
    say = "import subprocess, sys; from asrfs.storage import priority; priority.yield_to_others()\n"
    say += "child = subprocess.Popen(['cat'], stdin=subprocess.PIPE, start_new_session=True)\n"
    say += "priority.pass_on(child.pid); print(open(f'/proc/{child.pid}/autogroup').read().split()[-1])\n"
    done = subprocess.run(
        [sys.executable, "-c", say], capture_output=True, text=True, check=True, timeout=60, start_new_session=True
    )
    assert done.stdout.strip() == "19"


def test_who_is_in_no_session_has_nothing_to_pass_on(tmp_path: Path) -> None:
    """As on a machine whose first process began us and never a session: the kernel then says nothing of our group. Here
    an empty file lies over what it says."""
    if not Path("/proc/self/autogroup").exists():
        return
    (tmp_path / "nothing").touch()
    say = "import os, subprocess, sys; from asrfs.storage import priority\n"
    say += "subprocess.run(['mount', '--bind', sys.argv[1], f'/proc/{os.getpid()}/autogroup'], check=True)\n"
    say += "assert open('/proc/self/autogroup').read() == ''\n"
    say += "child = subprocess.Popen(['cat'], stdin=subprocess.PIPE, start_new_session=True)\n"
    say += "priority.pass_on(child.pid); print(open(f'/proc/{child.pid}/autogroup').read().split()[-1])\n"
    command = ["unshare", "--mount", sys.executable, "-c", say, str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "0"
