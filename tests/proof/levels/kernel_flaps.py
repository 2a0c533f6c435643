"""`flaps`: the link to the store breaks or hangs every few seconds under load, and the replica comes back by itself.

A case is one machine under a steady load of bytes that do not compress. Nothing above notices; when the flapping ends
the store has everything, byte for byte; what went over the link is little more than what was written; neither agent nor
store has grown.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.proof.kernel.flapping import Relay
from tests.proof.kernel.world import World, world
from tests.proof.level import Case, Context, Level, Notes
from tests.waiting import wait_until

FLAPS_A_CASE = 12
LOAD_BYTES_PER_S = 8 << 20
UP_BYTES, DOWN_S = (10 << 20, 30 << 20), (0.2, 2.0)
FLAP_S_MAX = 60
FIO_WAS_STOPPED = 128
SENT_SHARE_MAX = 1.3
AGENT_BYTES_MAX, STORE_BYTES_MAX = 400 << 20, 500 << 20
FAULTS = ("connection reset", "link hangs")


def _load(made: World, flaps: int) -> subprocess.Popen[str]:
    """fio on the disk itself, until it is stopped: longer than so many flaps can take."""
    words = [
        *("fio", "--name=load", f"--filename={made.disks[0]}", "--rw=randwrite", "--bs=64k", "--direct=1"),
        *("--ioengine=libaio", "--iodepth=4", f"--rate={LOAD_BYTES_PER_S}", "--refill_buffers", "--size=256M"),
        *("--time_based", f"--runtime={flaps * 2 * FLAP_S_MAX}", "--output-format=json"),
    ]
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)


def _through(made: World, relay: Relay) -> None:
    """Have the agent reach the store through the relay."""
    path = made.host.path / "keys" / "store.json"
    enrolment = json.loads(path.read_text())
    path.write_text(json.dumps(enrolment | {"data_port": relay.port}))
    made.kill_one("agent")
    wait_until(lambda: made.asrfs("status")["link"] == "connected", 60, what="a connection through the relay")


def _peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def _flap(relay: Relay, rng: random.Random, flaps: int, notes: Notes) -> None:
    for number in range(flaps):
        goal = relay.bytes_sent + rng.randint(*UP_BYTES)
        wait_until(lambda goal=goal: relay.bytes_sent >= goal, FLAP_S_MAX, what="bytes on the link")  # type: ignore[misc]
        fault = FAULTS[number % len(FAULTS)]
        relay.cut() if fault == "connection reset" else relay.hang()
        time.sleep(rng.uniform(*DOWN_S))  # sleep: how long a link is down is nobody's event
        relay.mend()
        notes.fired(fault)
        notes.count()


def run_case(made: World, rng: random.Random, flaps: int, notes: Notes) -> None:
    assert made.store.process is not None
    with Relay(int(made.store.data.rpartition(":")[2])) as relay:
        _through(made, relay)
        made.drained()
        before = relay.bytes_sent
        load = _load(made, flaps)
        try:
            _flap(relay, rng, flaps, notes)
            load.send_signal(signal.SIGINT)
            said, _ = load.communicate(timeout=120)
        finally:
            load.kill()
            load.wait()
        assert load.returncode == FIO_WAS_STOPPED, said
        made.drained()
        job = json.loads(said[said.index("{") :])["jobs"][0]
        written, sent = int(job["write"]["io_bytes"]), relay.bytes_sent - before
        assert job["error"] == 0 and written > 0, said
        assert relay.cuts >= flaps // 3, "the relay cut too little"
        assert sent <= SENT_SHARE_MAX * written, f"{sent} bytes were sent for {written}"
        agent = made.host.pid("agent")
        assert agent and _peak_bytes(agent) <= AGENT_BYTES_MAX
        assert _peak_bytes(made.store.process.pid) <= STORE_BYTES_MAX
        assert made.asrfs("status")["state"] == "protected"
        (exported,) = made.export("latest", "end")
        assert subprocess.run(["cmp", exported, made.disks[0]], check=False, timeout=120).returncode == 0, "I9"


def _cases(context: Context) -> Iterator[Case]:
    for number in itertools.count(1):
        label = f"case {number}"

        def run(notes: Notes, label: str = label) -> None:
            with world(context.scratch / label.replace(" ", "-"), flapping="256M") as made:
                run_case(made, context.rng(label), FLAPS_A_CASE, notes)

        yield Case(label, run)


LEVEL = Level(name="flaps", unit="flaps of the link", submission=FLAPS_A_CASE, release=100, faults=FAULTS, cases=_cases)
