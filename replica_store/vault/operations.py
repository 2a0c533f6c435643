"""Failover operations: what is being tried, what is failed over, and what became of it.

Each is a row of the catalog and a sealed object beside the log, so that a rebuilt catalog has it again: of its objects
the one with the highest generation is valid. A change is durable, there and in the catalog, before it is reported. A
change that died between object and catalog was asked for, and a rebuild may find it; the next one is newer still.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from asrfs.errors import BadInputError, IntegrityError, NotFoundError
from asrfs.model.names import is_id, is_name
from replica_store.vault.books import Shelf
from replica_store.vault.catalog import Catalog
from replica_store.vault.keys import Sealer
from replica_store.vault.objects import Objects
from replica_store.vault.vault import Vault, lock_descriptions

Kind = Literal["test", "unplanned", "planned", "failback"]
HANDED_OVER: tuple[Kind, ...] = ("planned", "failback")
"""What the machine's host has a part in."""
OperationState = Literal["preparing", "serving", "commit-pending", "committed", "returned", "cancelled", "cleaned"]
ENDED: tuple[OperationState, ...] = ("cancelled", "cleaned")
"""What these left is taken away by whoever comes next. Of `returned` ones only a person does that: they hold what may
be the only copy of something."""

LOCK_S_MAX = 10.0
_PREFIX = "operations/"
_NAME = re.compile(r"operations/(?P<id>[0-9a-f]{32})-[0-9a-f]+\.obj")
_COLUMNS = "id, machine_id, kind, state, generation, content"


class ChosenPoint(msgspec.Struct, frozen=True, kw_only=True):
    """The cut that was chosen; `id`, `name` and `consistency` of the listed point there, if there is one. `is_tail`: it
    is the end of a tail, beside the history."""

    selector: str
    lsn: int
    epoch: int
    time_ns: int
    id: str | None = None
    name: str | None = None
    consistency: str | None = None
    is_tail: bool = False

    @property
    def place(self) -> str:
        """What means this cut and no other wherever points are chosen."""
        return self.name if self.is_tail and self.name else f"lsn:{self.lsn}"


class Step(msgspec.Struct, frozen=True):
    """A part of the work, and how long it took."""

    name: str
    seconds: float


class Examined(msgspec.Struct, frozen=True, kw_only=True):
    """What fsck said of a disk. `replayed`: on a copy, after its journal was replayed there, as a start does."""

    disk: str
    filesystem: str | None
    result: Literal["clean", "damaged", "no filesystem"]
    text: str = ""
    replayed: bool = False


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """How the user's check command ended."""

    command: str
    exit_code: int
    output: str


class Booted(msgspec.Struct, frozen=True, kw_only=True):
    """How the start of the recovered machine went. `failure`: why it does not run, empty if it does."""

    kind: str
    failure: str = ""


class Reprotection(msgspec.Struct, frozen=True, kw_only=True):
    """The other direction. `store`: the management address of the other store; `enrolled`: the recovered machine has
    its certificate; `done_ns`: since when the other store has all of it, None until then."""

    store: str
    begun_ns: int
    enrolled: bool = False
    done_ns: int | None = None


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """A change of state, and why."""

    time_ns: int
    state: OperationState
    text: str


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """Where a recovered machine is: absolute paths. `directory`: of the operation's own files; `made`: directories that
    were made for it, which go with it, parents first; `namespace`: of a network of its own."""

    directory: str
    state: str
    mount: str
    made: tuple[str, ...] = ()
    namespace: str | None = None


class HandoverAsked(msgspec.Struct, frozen=True, kw_only=True):
    """What a planned failover asked of the machine's host, and what that answered.

    Until `until_ns` (the store's clock) it is asked. `lsn`: up to which it handed over, having found `chunks_compared`
    chunks to be equal; `error`: why it did not. `is_used`: the failover goes on from there, and `epoch` is the one that
    the machine was in then (0: that of the failover's point). `is_back`: the host has its machine again, or never let
    go of it.
    """

    seconds_max: int
    until_ns: int
    lsn: int | None = None
    chunks_compared: int = 0
    chunks_different: int = 0
    error: str | None = None
    is_used: bool = False
    epoch: int = 0
    is_back: bool = False

    @property
    def is_answered(self) -> bool:
        return self.lsn is not None or self.error is not None


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One failover. `remains`: processes, mounts or directories of it are there, or may be.

    `begun_s`: when its present preparation began is in the first of `steps`; `rto_s` is their sum once it was ready.
    `epoch`: what commit raised the machine to; `closed_serial`: of the certificate that was good until then.
    `handover`: of a planned one. `plan`: id of the run of a plan it belongs to. `boots`: the machine is started as its
    boot settings say.
    """

    id: str
    machine_id: str
    machine: str
    kind: Kind
    state: OperationState
    point: ChosenPoint
    places: Places
    begun_ns: int
    generation: int = 0
    remains: bool = True
    expires_ns: int | None = None
    space_limit_bytes: int | None = None
    check_command: str | None = None
    data_loss_s: float | None = None
    disks: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    rto_s: float | None = None
    examined: tuple[Examined, ...] = ()
    checked: Checked | None = None
    warnings: tuple[str, ...] = ()
    epoch: int | None = None
    handover: HandoverAsked | None = None
    plan: str | None = None
    boots: bool = True
    booted: Booted | None = None
    closed_serial: str | None = None
    reprotection: Reprotection | None = None
    causes: tuple[Cause, ...] = ()

    def to(self, state: OperationState, time_ns: int, text: str) -> Operation:
        """In another state, with the cause noted."""
        cause = Cause(time_ns=time_ns, state=state, text=text)
        return msgspec.structs.replace(self, state=state, causes=(*self.causes, cause))


def is_sound(operation: Operation) -> bool:
    """Whether it is such as this program writes, wherever it was found."""
    other = operation.reprotection
    times_ns = [operation.point.time_ns, operation.begun_ns]
    times_ns += [] if other is None else [other.begun_ns, other.done_ns or 0]
    return (
        is_id(operation.id)
        and is_id(operation.machine_id)
        and is_name(operation.machine)
        and operation.generation > 0
        and operation.point.lsn > 0
        and all(0 <= time_ns < 1 << 63 for time_ns in times_ns)
        and (operation.plan is None or is_id(operation.plan))
        and (other is None or other.store.isprintable())
        and all(_is_place(path) for path in (operation.places.directory, operation.places.state))
        and all(_is_place(path) for path in (operation.places.mount, *operation.places.made))
    )


def _is_place(path: str) -> bool:
    return path.startswith("/") and path != "/" and os.path.normpath(path) == path


# ---- reading --------------------------------------------------------------------------------------------------------


def operations(catalog: Catalog, machine_id: str | None = None) -> list[Operation]:
    """All, or those of a machine, oldest first. Raises IntegrityError."""
    rows = (
        catalog.select(f"SELECT {_COLUMNS} FROM operations")  # noqa: S608
        if machine_id is None
        else catalog.select(f"SELECT {_COLUMNS} FROM operations WHERE machine_id = ?", (machine_id,))  # noqa: S608
    )
    return sorted((_operation(catalog, *row) for row in rows), key=lambda each: (each.begun_ns, each.id))


def operation(catalog: Catalog, text: str) -> Operation:
    """By its id or the beginning of it. Raises NotFoundError, BadInputError if several begin so."""
    if not re.fullmatch(r"[0-9a-f]{4,32}", text):
        raise NotFoundError(f"there is no failover {text[:40]!r}: see `replica-store failover list --all`")
    found = [each for each in operations(catalog) if each.id.startswith(text)]
    if not found:
        raise NotFoundError(f"there is no failover {text}: see `replica-store failover list --all`")
    if len(found) > 1:
        raise BadInputError(f"{len(found)} failovers have an id that begins with {text}: give more of it")
    return found[0]


def sealed_operation(vault: Vault, text: str) -> Operation:
    """The same, for who acts on it: what is unmounted and removed on its word is sealed, and not a row's alone.

    Raises IntegrityError, too.
    """
    found = operation(vault.catalog, text)
    if shelf_of(found.id).of_generation(vault.objects, vault.sealer, found.generation) != found:
        raise IntegrityError(
            f"the catalog says of failover {found.id[:12]} what no object of the vault says: make the catalog again "
            "with `replica-store rebuild`"
        )
    return found


def _operation(catalog: Catalog, *row: object) -> Operation:
    try:
        found = msgspec.json.decode(str(row[5]), type=Operation)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        found = None
    columns = None if found is None else (found.id, found.machine_id, found.kind, found.state, found.generation)
    if found is None or columns != row[:5] or not is_sound(found):
        raise IntegrityError(
            f"{catalog.path}: a row of operations cannot be: make the catalog again with `replica-store rebuild`"
        )
    return found


def holder(found: Iterable[Operation]) -> Operation | None:
    """The newest failover of a machine that holds its protection: it is failed over, or committed elsewhere."""
    holding = [each for each in found if each.kind != "test" and each.state not in (*ENDED, "returned")]
    return holding[-1] if holding else None


def asking(catalog: Catalog) -> list[Operation]:
    """Those whose host has something to hear, or did not say yet that it has its machine back; oldest first. Cheap:
    asked all the time. Raises IntegrityError."""
    rows = catalog.select(
        f"SELECT {_COLUMNS} FROM operations WHERE state IN ('preparing', 'cancelled') "  # noqa: S608
        "AND CASE WHEN json_valid(content) THEN json_extract(content, '$.handover.is_back') END = 0"
    )
    return sorted((_operation(catalog, *row) for row in rows), key=lambda each: (each.begun_ns, each.id))


def committed_by(catalog: Catalog, machine_id: str) -> str | None:
    """Id of the failover by which a machine runs elsewhere for good. Cheap: asked whenever something is received."""
    rows = catalog.select(
        "SELECT id FROM operations WHERE machine_id = ? AND state = 'committed' LIMIT 1", (machine_id,)
    )
    return str(rows[0][0]) if rows else None


# ---- changing -------------------------------------------------------------------------------------------------------


def begin(root: str, make: Callable[[Vault], Operation]) -> Operation:
    """A new operation, durable. `make` may look at the vault and refuse; nobody else changes an operation meanwhile."""
    return _save(root, make)


def change(root: str, operation_id: str, make: Callable[[Vault, Operation], Operation]) -> Operation:
    """Another state of an operation, durable when this returns. `make` is given what is there and may refuse."""
    return _save(root, lambda vault: make(vault, sealed_operation(vault, operation_id)))


def _save(root: str, make: Callable[[Vault], Operation]) -> Operation:
    # Opened behind the lock: a rebuild puts another catalog in the place of this one.
    with lock_descriptions(root, LOCK_S_MAX), Vault.open(root, writable=True) as vault:
        with vault.catalog.transaction():
            made = make(vault)
            shelf = shelf_of(made.id)
            newest, _ = shelf.newest(vault.objects, vault.sealer)
            generation = max(made.generation, newest.generation if newest else 0) + 1
            made = msgspec.structs.replace(made, generation=generation)
            shelf.put(vault.objects, vault.sealer, made)
            write_operation(vault.catalog, made)
        shelf.remove_old(vault.objects, vault.sealer)
    return made


def write_operation(catalog: Catalog, made: Operation) -> None:
    """Make or replace its row. Inside a transaction."""
    catalog.change(
        f"INSERT OR REPLACE INTO operations ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)",  # noqa: S608
        (made.id, made.machine_id, made.kind, made.state, made.generation, msgspec.json.encode(made).decode()),
    )


def shelf_of(operation_id: str) -> Shelf[Operation]:
    """The sealed objects of one operation."""
    return Shelf(
        f"{_PREFIX}{operation_id}-",
        b"asrfs failover operation 1",
        "failover operation",
        Operation,
        lambda each: each.id == operation_id and is_sound(each),
    )


def sealed_operations(objects: Objects, sealer: Sealer) -> tuple[list[Operation], list[str]]:
    """The valid state of each among the vault's objects, and a line for each object that cannot be read."""
    matches = (_NAME.fullmatch(name) for name in objects.list(_PREFIX))
    found, damages = [], []
    for operation_id in sorted({match["id"] for match in matches if match is not None}):
        newest, unreadable = shelf_of(operation_id).newest(objects, sealer)
        damages += unreadable
        if newest is not None:
            found.append(newest)
    return found, damages
