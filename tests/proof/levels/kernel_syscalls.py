"""`syscalls`: disk server, agent and store are killed as they enter their n-th write, sync or rename.

A case is a machine under stamped writes. Every process it starts is struck once, at a call and a number drawn for it,
beginning with what it does when it starts; the one started after it takes the next strike. After each death the disks
hold exactly what was written, and nobody above saw an error; the store holds whatever it acknowledged (I3). At the end
exports and images are compared, block for block.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from replica_store.vault.vault import Vault
from tests.proof.kernel.loads import StampLoad
from tests.proof.kernel.world import World, world
from tests.proof.level import Case, Context, Level, Notes
from tests.t5_system.stamps import Stamper

CALLS = {
    "disk_server": {"pwritev": 300, "fdatasync": 30, "fsync": 2, "rename": 2},
    "agent": {"pwritev": 60, "fdatasync": 6, "fsync": 4, "rename": 4},
    "store": {"pwritev": 10, "pwrite64": 30, "fdatasync": 12, "fsync": 8, "link": 8, "unlink": 8},
}
"""What each role calls when it makes something durable, and the largest n tried. One thread has to reach it."""
BLOCKS = 512
STRIKES_A_CASE = {"disk_server": 12, "agent": 10, "store": 12}
CASE_SECONDS_MAX = 120.0


@dataclass(frozen=True)
class Strike:
    role: str
    call: str
    trace: Path

    @property
    def struck(self) -> bool:
        return self.trace.exists() and "killed by SIGKILL" in self.trace.read_text()


def _draw(rng: random.Random, made: World) -> list[Strike]:
    """Deal the strikes of a case: the calls of a role in random order, so that each comes before any comes twice."""
    strikes = []
    for role, count in STRIKES_A_CASE.items():
        calls = [call for _ in range(count) for call in rng.sample(sorted(CALLS[role]), len(CALLS[role]))]
        for call in calls[:count]:
            # Small numbers are the beginning of a life, where recovery is.
            number = rng.randint(1, rng.choice((2, CALLS[role][call])))
            strikes.append(Strike(role, call, made.deal(role, call, number)))
    return strikes


def _look_after_store(made: World) -> None:
    """If the store is dead: it holds what it acknowledged; start the next one, which may be struck at its start."""
    process = made.store.process
    if process is not None and process.poll() is None:
        return
    acknowledged = made.acknowledged()
    with Vault.open(str(made.store.path)) as vault:
        received = vault.received_lsn(made.host.state.load_machine().id)
    assert received >= acknowledged, f"I3: LSN {acknowledged} was acknowledged, the store ends at {received}"
    made.revive_store()


def _run(made: World, rng: random.Random, notes: Notes) -> None:
    load = StampLoad(Stamper(rng.randrange(1 << 30), len(made.disks), BLOCKS), made.disks)
    try:
        load.go_on(50, "writes before the first strike")
        waiting = _draw(rng, made)
        made.kill("disk_server")
        made.kill("agent")
        made.kill_store()
        deadline = time.monotonic() + CASE_SECONDS_MAX
        while waiting and time.monotonic() < deadline:
            _look_after_store(made)
            load.go_on(2, "writes between strikes")
            for strike in [strike for strike in waiting if strike.struck]:
                waiting.remove(strike)
                if strike.role == "store":
                    made.wait_for_struck_store(strike.trace)
                load.go_on(2, f"writes after {strike.call} of the {strike.role}")
                load.check()
                notes.count()
                notes.fired(f"{strike.role} {strike.call}")
        _disarm(made, waiting)
        last = load.stop()
    finally:
        load.abandon()
    _look_after_store(made)
    made.drained()
    load.stamper.check(made.export("latest", "end"), exactly=last)
    for _ in range(2):
        lsn = made.store.state_at(made.host.name, rng.randint(len(made.disks), made.acknowledged()))
        load.stamper.check(made.export(f"lsn:{lsn}", "some"))
    assert made.store.ask("verify")["damages"] == []
    assert made.host.stop() == 0, made.host.said()
    load.stamper.check(made.images(), exactly=last)


def _disarm(made: World, waiting: list[Strike]) -> None:
    """Take back what was never reached, and replace the processes that still wait for it."""
    taken = {strike.role for strike in waiting if not made.withdraw(strike.trace) and not strike.struck}
    if "disk_server" in taken:
        made.host.wait_for_next("disk_server", made.kill("disk_server"))
    if "agent" in taken:
        made.host.wait_for_next("agent", made.kill("agent"))
    if "store" in taken:
        made.kill_store()


def _cases(context: Context) -> Iterator[Case]:
    number = 0
    while True:
        number += 1
        label = f"machine {number}"

        def run(notes: Notes, label: str = label) -> None:
            with world(context.scratch / label.replace(" ", "-"), root="2M", more="2M") as made:
                _run(made, context.rng(label), notes)

        yield Case(label, run)


LEVEL = Level(
    name="syscalls",
    unit="kills at a system call",
    submission=100,
    release=2000,
    faults=tuple(f"{role} {call}" for role, calls in CALLS.items() for call in calls),
    cases=_cases,
)
