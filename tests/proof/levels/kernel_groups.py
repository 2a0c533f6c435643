"""`groups`: points of groups of real machines, each in a network of its own, under ping-pong writes and faults.

A case is one group of two or four machines: points are cut on whichever member, and now and then an agent is stopped or
killed, a disk server is killed, a member is cut off. Everyone goes on writing within the deadline. At the end the store
lists what was said to be a point and nothing else, for all members, and no effect in it is without its cause.
"""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Iterator

from tests.proof.level import Case, Context, Level, Notes
from tests.t5_system.machine import HostUnderTest
from tests.t5_system.site import DISK, PingPong, Site
from tests.waiting import wait_until

POINTS_A_CASE = 55
FAULT_EVERY = 9
SIZES = (2, 4)
FAULTS = ("agent stopped", "agent killed", "disk server killed", "member cut off")


def _strike(site: Site, fault: str, victim: HostUnderTest) -> None:
    """Break it, ask for a point, mend it."""
    number = site.machines.index(victim)
    if fault == "agent stopped":
        victim.kill("agent", signal.SIGSTOP)
        try:
            point = site.create(site.machines[number - 1])
            assert point is None, "a point without a member"
        finally:
            victim.kill("agent", signal.SIGCONT)
    elif fault == "member cut off":
        site.cut_off(number)
        try:
            assert site.create(site.machines[number - 1]) is None, "a point without a member"
        finally:
            site.heal(number)
    else:
        victim.kill("agent" if fault == "agent killed" else "disk_server")


def _run(site: Site, rng: random.Random, notes: Notes) -> None:
    game = PingPong([machine.mount / f"{DISK}.img" for machine in site.machines], players=4)
    made: list[str] = []
    with game.playing():

        def go_on(count: int, what: str) -> None:
            goal = [done + count for done in game.done]
            wait_until(lambda: all(done >= at for done, at in zip(game.done, goal, strict=True)), 30, what=what)

        for turn in range(1, POINTS_A_CASE + 1):
            go_on(2, "writes between points")
            if turn % FAULT_EVERY == 0:
                fault = FAULTS[turn // FAULT_EVERY % len(FAULTS)]
                _strike(site, fault, rng.choice(site.machines))
                go_on(2, f"writes after the fault: {fault}")
                site.wait_until_joined()
                notes.fired(fault)
            point = site.create(rng.choice(site.machines))
            assert point, "nothing went wrong, and there is no point"
            made.append(point)
            notes.count()
    site.check_points(game, made)


def _cases(context: Context) -> Iterator[Case]:
    for number in itertools.count(1):
        size = SIZES[number % len(SIZES)]
        label = f"{size} machines {number}"

        def run(notes: Notes, label: str = label, size: int = size) -> None:
            scratch = context.scratch / label.replace(" ", "-")
            scratch.mkdir()
            site = Site(scratch, size)
            try:
                site.start()
                _run(site, context.rng(label), notes)
            finally:
                site.close()

        yield Case(label, run)


LEVEL = Level(
    name="groups",
    unit="points of groups",
    submission=4 * POINTS_A_CASE,
    release=40 * POINTS_A_CASE,
    faults=FAULTS,
    cases=_cases,
)
