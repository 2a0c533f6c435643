"""Edits of a machine, and enrolment, while the disk of a side or the catalog fails."""

from __future__ import annotations

import random
from pathlib import Path

from asrfs.errors import AsrfsError
from tests.fakes.crash_storage import CrashStorage, Fault
from tests.fakes.failing_catalog import CatalogFault, fail
from tests.fakes.state_world import EditLook, EnrolLook, EnrolWorld, check_edited, edit_machine
from tests.fakes.vault_world import make_vault
from tests.proof.failing.kinds import (
    CATALOG,
    DISK,
    FATES,
    FOR_EVER,
    NEVER,
    SMALL_STEP,
    AnyFault,
    Failure,
    check_refusal,
    failing,
    note,
    refusing,
)
from tests.proof.level import Notes


def fail_edits(failure: Failure, mode: str, scratch: Path, rng: random.Random, notes: Notes) -> None:
    storage = CrashStorage()
    probe = storage.inject(failure.at(NEVER, False, rng))
    edit_machine(scratch / "host", storage, rng)
    for number in range(rng.randrange(SMALL_STEP), probe.seen, SMALL_STEP):
        with failing(number, failure, mode):
            storage, looks = CrashStorage(), list[EditLook]()
            fault = storage.inject(failure.at(number, mode == FOR_EVER, rng))
            with refusing(fault):
                edit_machine(scratch / "host", storage, rng, looks)
            check_edited(scratch / "host", storage.crash(rng.choice(FATES), rng), looks[-1], rng)
        note(notes, failure, mode)


def fail_enrolment(failure: Failure, mode: str, scratch: Path, rng: random.Random, notes: Notes) -> None:
    make_vault(scratch / "vault")

    def play(is_host: bool, number: int, for_ever: bool, looks: list[EnrolLook] | None = None) -> AnyFault:
        world = EnrolWorld(scratch, CrashStorage(), CrashStorage(), None)
        fault: Fault | CatalogFault
        if failure in CATALOG:
            fault = fail(world.catalog, CatalogFault(number, failure.error, for_ever, rng))
        else:
            fault = (world.host if is_host else world.storage).inject(failure.at(number, for_ever, rng))
        try:
            world.enrol_twice(looks)
        except (OSError, AsrfsError) as error:
            check_refusal(fault, error)
        return fault

    for is_host in (True, False) if failure in DISK else (False,):
        probe = play(is_host, NEVER, False)
        for number in range(rng.randrange(SMALL_STEP), probe.seen, SMALL_STEP):
            with failing(number, failure, mode):
                looks: list[EnrolLook] = []
                fault = play(is_host, number, mode == FOR_EVER, looks)
                assert fault.fired, "the fault never fired"
                look, fates = looks[-1], (rng.choice(FATES), rng.choice(FATES))
                doubt = fault.in_doubt if isinstance(fault, CatalogFault) else None
                catalog = rng.choice((look.catalog, doubt or look.catalog))
                host, store = look.host.crash(fates[0], rng), look.store.crash(fates[1], rng)
                EnrolWorld(scratch, host, store, catalog).check(look)
            note(notes, failure, mode)
