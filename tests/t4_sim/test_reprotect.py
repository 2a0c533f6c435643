"""Reprotecting on a real vault, whoever dies at whichever step; the recovered machine's own program is a script."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asrfs.errors import AuthenticationError, BadInputError, RefusedError, TemporaryError
from asrfs.model.arrival import Arrival, decode_arrival
from asrfs.storage.system_clock import SystemClock
from replica_store.cli import main
from replica_store.failover import actions, leaving, reprotect, undoing
from replica_store.failover.actions import Failovers
from replica_store.failover.reprotect import Reprotecting, Wish
from replica_store.failover.wanted import Wanted
from replica_store.vault.enrolment import make_token, put_description
from replica_store.vault.operations import Operation, change, operation
from replica_store.vault.protection import protection_of
from replica_store.vault.rebuild import rebuild
from replica_store.vault.standing import standing_of
from replica_store.vault.vault import Vault
from tests.fakes.filled_vault import fill_vault
from tests.fakes.memory_history import random_history

MACHINE = "web1"
STORE = "site-a.example.org:9444"
STEPS = ("order", "start", "hydrate", "enrol", "connect", "replicate")


class Died(Exception):
    """As a SIGKILL."""


class Host:
    """The recovered machine, as far as its program shows it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bases = 3
        self.epoch = 2
        self.link = "not enrolled"
        self.state = "recovered"
        self.records_left = 0
        self.said: list[tuple[str, ...]] = []
        self.tokens: list[str] = []
        self.alarms: list[dict[str, str]] = []
        self.arrival: Arrival | None = None
        self.dies_after = ""
        self.is_slow = False
        monkeypatch.setattr(actions, "prepare", self._prepare)
        monkeypatch.setattr(actions, "bring_back", lambda root, found: found)
        monkeypatch.setattr(undoing, "discard", lambda found: None)
        monkeypatch.setattr(reprotect, "has_bases", self._has_bases)
        monkeypatch.setattr(reprotect, "LOOK_EVERY_S", 0.0)
        monkeypatch.setattr(reprotect, "ASK_EVERY_S", 0.0)
        monkeypatch.setattr(reprotect, "REFUSED_S", 0.0)
        monkeypatch.setattr(reprotect, "asrfs", self.asrfs)
        monkeypatch.setattr(leaving, "asrfs", self.asrfs)
        monkeypatch.setattr(reprotect, "statuses_of", self._statuses)

    def _prepare(self, root: str, begun: Operation, *_: Any, **__: Any) -> Operation:
        Path(begun.places.state, "keys").mkdir(parents=True)
        return msgspec.structs.replace(begun, rto_s=0.1)

    def _has_bases(self, found: Operation) -> bool:
        self.bases -= ("set", "hydration=on") in self.said and self.bases > 0
        return self.bases > 0

    def asrfs(self, found: Operation, *words: str, said: bytes = b"") -> str:
        self.said.append(words)
        if words == ("--json", "status"):
            self._go_on()
            return json.dumps(self.status())
        if words[0] == "enroll":
            self.arrival = decode_arrival(Path(words[words.index("--arrival") + 1]).read_bytes(), "here")
            address, port = words[words.index("--store") + 1].split(":")
            known = {"host": address, "manage_port": int(port)}
            self.tokens.append(said.decode())
            Path(found.places.state, "keys/store.json").write_text(json.dumps(known))
            self.epoch, self.link, self.state = (
                int(words[words.index("--above-epoch") + 1]) + 1,
                "connecting",
                "initial-replication",
            )
        if words[0] == "pause":
            self.link = "paused"
        if words[0] == self.dies_after:
            raise Died
        return ""

    def _statuses(self, found: Operation) -> Iterator[dict[str, Any]]:
        while True:
            yield json.loads(self.asrfs(found, "--json", "status"))

    def _go_on(self) -> None:
        """What time does."""
        if self.link == "connecting":
            self.link = "connected"
        elif self.link == "connected" and not self.is_slow:
            self.state = "protected"

    def status(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "link": self.link,
            "link_reason": "no store answers" if self.link == "refused" else "",
            "state": self.state,
            "reason": "",
            "alarms": self.alarms,
            "lag": {"records": self.records_left},
        }

    @property
    def enrolments(self) -> list[tuple[str, ...]]:
        return [words for words in self.said if words[0] == "enroll"]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


@pytest.fixture
def root(scratch: Path) -> str:
    history = random_history(7, records=20, disks={"root": 16 * 4096})
    history.marker(name="end")
    history.seal()
    fill_vault(scratch / "vault", history)
    with Vault.open(str(scratch / "vault")) as vault:
        put_description(vault, vault.machine(MACHINE))
    return str(scratch / "vault")


@pytest.fixture
def token(scratch: Path) -> str:
    with Vault.create(str(scratch / "other"), "site-a", SystemClock()) as other:
        return make_token(other, MACHINE, SystemClock())


@pytest.fixture
def pending(root: str, host: Host) -> Operation:
    return Failovers(root, SystemClock()).unplanned(Wanted(machine=MACHINE, selector="latest"))


@pytest.fixture
def committed(root: str, pending: Operation) -> Operation:
    return Failovers(root, SystemClock()).commit(pending.id)


def run(root: str, token: str, told: Callable[[str], None] = lambda step: None, **more: Any) -> Operation:
    wish = Wish(**{"machine": MACHINE, "store": STORE, "token": token, "wait": True, **more})
    return Reprotecting(root, SystemClock(), told).run(wish)


def standing(root: str) -> str:
    with Vault.open(root) as vault:
        machine = vault.machine(MACHINE)
        state = str(protection_of(vault, machine))
        assert standing_of(vault, machine, SystemClock().time_ns()).state == state
        return state


def test_the_other_direction(root: str, host: Host, committed: Operation, token: str) -> None:
    seen: dict[str, str] = {}
    found = run(root, token, lambda step: seen.update({step: standing(root)}))
    assert list(seen) == list(STEPS)
    assert seen["order"] == "committed" and set(list(seen.values())[1:]) == {"reprotecting"}
    assert standing(root) == "protected" and found.reprotection is not None and found.reprotection.done_ns
    words = ("enroll", "--store", STORE, "--token", "-", "--above-epoch", str(committed.epoch))
    assert [each[: len(words)] for each in host.enrolments] == [words], (
        "the token is nobody's to see in a list of processes"
    )
    assert host.tokens == [f"{token}\n"]
    assert host.said.index(("set", "hydration=on")) < host.said.index(host.enrolments[0]) and host.bases == 0
    assert run(root, token) == found, "once more is nothing new"
    rebuild(root)
    with Vault.open(root) as vault:
        assert operation(vault.catalog, committed.id) == found
    with pytest.raises(RefusedError, match="protected in the other direction, by the store at site-a"):
        Failovers(root, SystemClock()).unplanned(Wanted(machine=MACHINE, selector="latest"))
    for verb in ("commit", "cancel"):
        with pytest.raises(RefusedError):
            getattr(Failovers(root, SystemClock()), verb)(found.id)


@pytest.mark.parametrize("step", STEPS)
def test_whoever_dies_before_a_step(root: str, host: Host, committed: Operation, token: str, step: str) -> None:
    def told(begun: str) -> None:
        if begun == step:
            raise Died

    with pytest.raises(Died):
        run(root, token, told)
    assert standing(root) in ("committed", "reprotecting")
    assert run(root, token).reprotection.done_ns  # type: ignore[union-attr]
    assert len(host.enrolments) == 1 and standing(root) == "protected"


def test_who_dies_when_the_token_is_used_up(root: str, host: Host, committed: Operation, token: str) -> None:
    host.dies_after = "enroll"
    with pytest.raises(Died):
        run(root, token)
    assert run(root, token).reprotection.done_ns and len(host.enrolments) == 1  # type: ignore[union-attr]


def test_who_dies_while_it_is_being_enrolled(
    root: str, host: Host, committed: Operation, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the command of before had begun goes on without it, and uses the token up."""

    def used_up_meanwhile(found: Operation, *words: str, said: bytes = b"") -> str:
        answer = host.asrfs(found, *words, said=said)
        if words[0] == "enroll":
            raise AuthenticationError("asrfs enroll: the token has been used")
        return answer

    monkeypatch.setattr(reprotect, "asrfs", used_up_meanwhile)
    assert run(root, token).reprotection.done_ns and standing(root) == "protected"  # type: ignore[union-attr]


def test_another_place(root: str, host: Host, committed: Operation, token: str) -> None:
    host.is_slow = True
    run(root, token, wait=False)
    assert standing(root) == "reprotecting"
    host.is_slow = False
    found = run(root, token, store="site-c.example.org")
    assert [("--instead" in each, each[2]) for each in host.enrolments] == [
        (False, STORE),
        (True, "site-c.example.org:443"),
    ]
    assert found.reprotection is not None and found.reprotection.store == "site-c.example.org:443"


def test_seeds_can_be_brought_first(root: str, host: Host, committed: Operation, token: str) -> None:
    found = run(root, token, paused=True)
    assert host.said.index(("pause",)) < host.said.index(host.enrolments[0])
    assert found.reprotection is not None and found.reprotection.enrolled and standing(root) == "reprotecting"
    host.link = "paused"
    with pytest.raises(RefusedError, match="asrfs resume"):
        run(root, token)
    host.link = "connected"
    assert [each.id for each in Reprotecting(root, SystemClock()).look_at_all()] == [found.id]
    assert standing(root) == "protected" and Reprotecting(root, SystemClock()).look_at_all() == []


def test_refused_before_it_is_time(root: str, host: Host, pending: Operation, token: str, scratch: Path) -> None:
    with pytest.raises(RefusedError, match="failed-over: reprotect is refused; allowed: change-point, cancel, commit"):
        run(root, token)
    Failovers(root, SystemClock()).cancel(pending.id)
    with pytest.raises(RefusedError, match="protected: reprotect is refused"):
        run(root, token)
    Failovers(root, SystemClock()).unplanned(Wanted(machine=MACHINE, selector="latest"))
    assert main.run(["--vault", root, "reprotect", MACHINE, "--store", STORE, "--token", token]) == 4
    assert host.enrolments == [] and standing(root) == "failed-over"


def test_refused_for_ever(root: str, host: Host, committed: Operation, token: str, scratch: Path) -> None:
    with Vault.open(root, writable=True) as vault:
        own, strange = (make_token(vault, name, SystemClock()) for name in (MACHINE, "db1"))
    with pytest.raises(RefusedError, match="this very store"):
        run(root, own)
    with Vault.open(str(scratch / "other"), writable=True) as other:
        strange = make_token(other, "db1", SystemClock())
    for bad in (strange, "asrfs1.", "no token"):
        with pytest.raises(BadInputError):
            run(root, bad)
    with pytest.raises(BadInputError):
        run(root, token, store="no address:99999")
    assert host.said == [] and standing(root) == "committed"


def test_what_stands_in_the_way_is_said(root: str, host: Host, committed: Operation, token: str) -> None:
    host.bases = 1 << 30
    host.alarms = [{"id": "hydration", "severity": "critical", "text": "there is no space for disk root"}]
    with pytest.raises(TemporaryError, match="no space for disk root"):
        run(root, token)
    host.alarms = []
    with pytest.raises(TemporaryError, match="its time is up"):
        run(root, token, seconds_max=0.01)
    assert host.enrolments == [], "what another store protects must not hang on this vault"
    host.bases = 0
    host.dies_after = "enroll"
    with pytest.raises(Died):
        run(root, token)
    host.link = "refused"
    with pytest.raises(TemporaryError, match=r"not connected yet.*no store answers"):
        run(root, token)


def test_a_store_that_is_away_is_waited_for_as_long_as_was_said(
    root: str, host: Host, committed: Operation, token: str
) -> None:
    host.dies_after = "enroll"
    with pytest.raises(Died):
        run(root, token)
    host.link = "waiting"
    begun = time.monotonic()
    with pytest.raises(TemporaryError, match=r"it is enrolled, and not connected yet.*: waiting"):
        run(root, token, seconds_max=0.2)
    assert 0.2 <= time.monotonic() - begun < reprotect.CONNECT_S_MAX / 2
    host.link = "connecting"
    assert run(root, token, seconds_max=60.0).reprotection.done_ns  # type: ignore[union-attr]


def test_i7_what_it_left_is_removed_by_a_person_and_only_if_nothing_is_lost(
    root: str, host: Host, committed: Operation
) -> None:
    failovers = Failovers(root, SystemClock())
    with pytest.raises(RefusedError, match="is no test"):
        failovers.cleanup(committed.id)
    returned = change(root, committed.id, lambda vault, before: before.to("returned", 1, "it came back"))
    assert standing(root) == "protected"
    assert failovers.sweep() == [] and Path(returned.places.state).is_dir(), "nobody takes it away by himself"
    with pytest.raises(RefusedError, match="returned: resume is refused; allowed: cleanup"):
        failovers.resume(committed.id)
    with pytest.raises(RefusedError, match="does not know that another side"):
        failovers.cleanup(committed.id)
    Path(returned.places.state, "fenced.json").write_text("{}")
    host.records_left = 5
    with pytest.raises(RefusedError, match="5 records that no store has"):
        failovers.cleanup(committed.id)
    leaving.check_left_behind(returned, gives_up=True)
    host.records_left = 0
    again = failovers.unplanned(Wanted(machine=MACHINE, selector="latest"))
    assert again.places.state != returned.places.state
    cleaned = failovers.cleanup(committed.id)
    assert (cleaned.state, cleaned.remains) == ("cleaned", False) and not Path(returned.places.state).exists()
    assert Path(again.places.state).is_dir()


def test_a_failure_of_the_other_program_is_its_own(
    root: str, host: Host, committed: Operation, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used_up(found: Operation, *words: str, said: bytes = b"") -> str:
        if words[0] == "enroll":
            raise AuthenticationError("asrfs enroll: the token has been used")
        return host.asrfs(found, *words)

    monkeypatch.setattr(reprotect, "asrfs", used_up)
    with pytest.raises(AuthenticationError, match="has been used"):
        run(root, token)
    assert standing(root) == "reprotecting"
