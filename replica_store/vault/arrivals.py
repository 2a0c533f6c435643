"""Machines that came to be protected here from where they were failed over to, or back: what was said of them then.

Each is a sealed object beside the log, and in no table, so a rebuild loses none. With it comes the policy that held
there, so that the same holds here: of that name if nothing else has it, else as NAME-of-MACHINE. What a person assigned
here is never changed, nor is what holds here for a machine that came back to where its policy was made.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import msgspec

from asrfs.errors import BadInputError, IntegrityError, RefusedError
from asrfs.model.arrival import Arrival, check_arrival
from asrfs.model.configuration import POLICY_DEFAULT
from asrfs.model.names import NAME_BYTES_MAX, is_id, is_name
from asrfs.model.policy import followed_texts
from replica_store.vault.books import Shelf
from replica_store.vault.configuration import policy_of
from replica_store.vault.policies import Assigned, Assignment, PolicyBook, read_book
from replica_store.vault.policy_changes import change_book
from replica_store.vault.rows import MachineRow
from replica_store.vault.vault import Vault


class KeptArrival(msgspec.Struct, frozen=True, kw_only=True):
    """The last arrival of a machine. `assigned`: the policy it was given for that, None if another holds; `is_made`:
    that policy was made for it, too."""

    generation: int
    machine_id: str
    arrival: Arrival
    assigned: str | None = None
    is_made: bool = False


def arrival_of(vault: Vault, machine_id: str) -> KeptArrival | None:
    """The last one; None of a machine that never came from elsewhere. Raises IntegrityError."""
    found, damages = _shelf_of(machine_id).newest(vault.objects, vault.sealer)
    if found is None and damages:
        raise IntegrityError(damages[0])
    return found


def check_away(vault: Vault, machine: MachineRow) -> None:
    """Raise RefusedError for a machine that has nowhere to come home from."""
    found = arrival_of(vault, machine.id)
    if found is None or not found.arrival.away:
        raise RefusedError(
            f"machine {machine.name} runs at home: it was not brought here by `replica-store reprotect` from where it "
            "was failed over to, so there is nothing to fail back; allowed: failover planned"
        )


def departure_of(vault: Vault, machine: MachineRow) -> Arrival:
    """What this vault says of a machine that was failed over from it, to the store that is to protect it."""
    before = arrival_of(vault, machine.id)
    book = read_book(vault.catalog)
    policy = policy_of(vault.catalog, book, machine.id).policy
    is_foreign = before is not None and before.assigned is not None and before.assigned == policy
    return Arrival(
        store_id=vault.id,
        away=before is None or not before.arrival.away,
        owner=before.arrival.owner if before is not None and is_foreign else vault.id,
        policy=before.arrival.policy if before is not None and is_foreign else policy,
        keys=book.texts(policy) or {},
    )


def note_arrival(vault: Vault, machine: MachineRow, arrival: Arrival) -> None:
    """Keep it, and have its policy hold. Inside the transaction that enrols the machine, by the one that serves."""
    check_arrival(arrival)
    before = arrival_of(vault, machine.id)
    present = policy_of(vault.catalog, read_book(vault.catalog), machine.id)
    is_new = before is not None or not vault.received_lsn(machine.id)
    kept = KeptArrival(
        generation=before.generation + 1 if before is not None else 1, machine_id=machine.id, arrival=arrival
    )
    if arrival.owner != vault.id and is_new and _may_follow(present, before):

        def follow(book: PolicyBook) -> PolicyBook:
            nonlocal kept
            book, kept = followed(book, machine, kept, before)
            return book

        change_book(vault, follow)
    shelf = _shelf_of(machine.id)
    shelf.put(vault.objects, vault.sealer, kept)
    shelf.remove_old(vault.objects, vault.sealer)


def _may_follow(present: Assigned, before: KeptArrival | None) -> bool:
    """Whether nobody decided here which policy the machine has."""
    return present.by == "default" or (
        present.by == "machine" and before is not None and before.assigned == present.policy
    )


def followed(
    book: PolicyBook, machine: MachineRow, kept: KeptArrival, before: KeptArrival | None
) -> tuple[PolicyBook, KeptArrival]:
    """The book in which the policy that came holds for the machine, and what to keep of that. PURE."""
    texts = followed_texts(kept.arrival.keys)
    others = [each for each in book.assignments if (each.kind, each.target_id) != ("machine", machine.id)]
    if kept.arrival.policy == POLICY_DEFAULT and book.texts(POLICY_DEFAULT) == texts:
        return msgspec.structs.replace(book, assignments=tuple(others)), kept
    is_own = before is not None and before.is_made and all(each.policy != before.assigned for each in others)
    for name in _names(kept.arrival.policy, machine.name):
        is_mine = is_own and before is not None and name == before.assigned
        if book.texts(name) is None or book.texts(name) == texts or is_mine:
            break
    is_made = book.texts(name) is None or is_mine
    assignments = sorted([*others, Assignment("machine", machine.id, name)], key=lambda each: each.target_id)
    after = msgspec.structs.replace(
        book,
        policies=book.policies | {name: texts} if name != POLICY_DEFAULT else book.policies,
        assignments=tuple(assignments),
    )
    return after, msgspec.structs.replace(kept, assigned=name, is_made=is_made)


def _names(policy: str, machine: str) -> Iterator[str]:
    """What the policy may be called here, best first; without end."""
    yield policy
    for number in count(1):
        end = f"-of-{machine}" if number == 1 else f"-of-{machine}-{number}"
        yield f"{policy}{end}" if len(policy) + len(end) <= NAME_BYTES_MAX else f"{policy[:20]}-{number}"


def _is_sound(kept: KeptArrival) -> bool:
    try:
        check_arrival(kept.arrival)
    except BadInputError:
        return False
    is_name_sound = kept.assigned is None or is_name(kept.assigned)
    return 0 < kept.generation < 1 << 62 and is_id(kept.machine_id) and is_name_sound


def _shelf_of(machine_id: str) -> Shelf[KeptArrival]:
    return Shelf(
        f"arrivals/{machine_id}-",
        b"asrfs arrival 1",
        "arrival of a machine",
        KeptArrival,
        lambda each: each.machine_id == machine_id and _is_sound(each),
    )
