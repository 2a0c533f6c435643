"""Promotions: points that are copied back over the disks of machines, whose hosts go on with them.

    preparing ─▶ writing ─▶ releasing ─▶ done      when all hosts are ready; have written; have let go
        └─▶ cancelled                              when one cannot, or time is up: then nothing has changed

One promotion has all members of a group, or one machine; nobody writes before all are ready, and no guest writes before
all have written. A member that is failed over for good meanwhile is not waited for. Each is a row of the catalog and a
sealed object, as failovers are: a change is durable before anybody hears of it, and no row alone has a host write.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

import msgspec

from asrfs.errors import BadInputError, IntegrityError, NotFoundError, RefusedError
from asrfs.model.boot import BOOT_BYTES_MAX
from asrfs.model.machine import DiskRecord
from asrfs.model.names import is_id, is_name
from replica_store.vault.books import Shelf
from replica_store.vault.catalog import Catalog
from replica_store.vault.keys import Sealer
from replica_store.vault.objects import Objects
from replica_store.vault.operations import ChosenPoint
from replica_store.vault.vault import Vault, lock_descriptions

PromotionState = Literal["preparing", "writing", "releasing", "done", "cancelled"]
LOCK_S_MAX = 10.0
_PREFIX = "promotions/"
_NAME = re.compile(r"promotions/(?P<id>[0-9a-f]{32})-[0-9a-f]+\.obj")
_COLUMNS = "id, state, is_over, generation, content"


class PromotedMachine(msgspec.Struct, frozen=True, kw_only=True):
    """One machine of it. `records`: its disks that are written, as they were at the point; `left`: slots of those that
    stay; `boot`: as it is said to the host (`protocol.messages.Promote`).

    `before_lsn`: of the point of what the disks were, once the host is ready; `end_lsn`: where they are what they were
    at the point; `error`: why the host cannot, at the moment or for good. `attempt`: of the last `write` that the host
    was told; `untouched`: of the last for which it has written nothing, and begins nothing before the next: 0, none,
    once all are ready; -1 where nobody counts. `is_back`:
    guests may use the disks. `has_left`: it was failed over meanwhile, and takes no part any more. `epoch`: of the
    machine when the host was ready.
    """

    machine_id: str
    machine: str
    point: ChosenPoint
    records: tuple[DiskRecord, ...]
    left: tuple[int, ...] = ()
    boot: bytes | None = None
    bytes_changed: int = 0
    before_lsn: int | None = None
    end_lsn: int | None = None
    bytes_written: int = 0
    error: str | None = None
    exit_code: int = 0
    attempt: int = 0
    untouched: int = -1
    is_back: bool = False
    has_left: bool = False
    epoch: int = 0

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was written for it, and nothing can be before its host is told to again."""
        return self.attempt == self.untouched


class PromotionCause(msgspec.Struct, frozen=True, kw_only=True):
    time_ns: int
    state: PromotionState
    text: str


class Promotion(msgspec.Struct, frozen=True, kw_only=True):
    """`target`: what was named, a machine or a group, and `selector`, its point.

    Until `until_ns` (store's clock) all hosts are to be ready."""

    id: str
    target: str
    selector: str
    group: str | None
    state: PromotionState
    machines: tuple[PromotedMachine, ...]
    begun_ns: int
    until_ns: int
    generation: int = 0
    causes: tuple[PromotionCause, ...] = ()

    @property
    def is_over(self) -> bool:
        """Whether no host has anything to hear any more."""
        return self.state == "done" or (self.state == "cancelled" and all(each.is_back for each in self.machines))

    def member(self, machine_id: str) -> PromotedMachine | None:
        return next((each for each in self.machines if each.machine_id == machine_id), None)

    def point_of(self, machine_id: str) -> str:
        """What one of its machines goes back to, for people."""
        member = self.member(machine_id)
        return "a point" if member is None else f"LSN {member.point.lsn}"

    def with_member(self, changed: PromotedMachine) -> Promotion:
        machines = tuple(changed if each.machine_id == changed.machine_id else each for each in self.machines)
        return msgspec.structs.replace(self, machines=machines)

    def to(self, state: PromotionState, time_ns: int, text: str) -> Promotion:
        """In another state, with the cause noted."""
        cause = PromotionCause(time_ns=time_ns, state=state, text=text)
        return msgspec.structs.replace(self, state=state, causes=(*self.causes, cause))


def is_sound(promotion: Promotion) -> bool:
    """Whether it is such as this program writes, wherever it was found."""
    return (
        is_id(promotion.id)
        and is_name(promotion.target)
        and promotion.generation > 0
        and bool(promotion.machines)
        and all(map(_is_sound_member, promotion.machines))
        and len({each.machine_id for each in promotion.machines}) == len(promotion.machines)
        and all(0 <= time_ns < 1 << 63 for time_ns in (promotion.begun_ns, promotion.until_ns))
    )


def _is_sound_member(member: PromotedMachine) -> bool:
    return (
        is_id(member.machine_id)
        and is_name(member.machine)
        and member.point.lsn > 0
        and bool(member.records)
        and len(member.boot or b"") <= BOOT_BYTES_MAX
    )


# ---- reading --------------------------------------------------------------------------------------------------------


def promotions(catalog: Catalog, *, live: bool = False) -> list[Promotion]:
    """All, or those of which some host has something to hear; oldest first. Raises IntegrityError."""
    where = " WHERE is_over = 0" if live else ""
    rows = catalog.select(f"SELECT {_COLUMNS} FROM promotions{where}")  # noqa: S608
    return sorted((_promotion(catalog, *row) for row in rows), key=lambda each: (each.begun_ns, each.id))


def promotion(catalog: Catalog, promotion_id: str) -> Promotion:
    """By its id or the beginning of it. Raises NotFoundError, BadInputError if several begin so."""
    if not re.fullmatch(r"[0-9a-f]{4,32}", promotion_id):
        raise NotFoundError(f"there is no promotion {promotion_id[:40]!r}: see `replica-store promotions`")
    found = [each for each in promotions(catalog) if each.id.startswith(promotion_id)]
    if not found:
        raise NotFoundError(f"there is no promotion {promotion_id}: see `replica-store promotions`")
    if len(found) > 1:
        raise BadInputError(f"{len(found)} promotions have an id that begins with {promotion_id}: give more of it")
    return found[0]


def sealed_promotion(vault: Vault, promotion_id: str) -> Promotion:
    """The same, for who acts on it. Raises IntegrityError, too."""
    found = promotion(vault.catalog, promotion_id)
    if shelf_of(found.id).of_generation(vault.objects, vault.sealer, found.generation) != found:
        raise IntegrityError(
            f"the catalog says of promotion {found.id[:12]} what no object of the vault says: make the catalog again "
            "with `replica-store rebuild`"
        )
    return found


def live_promotion(catalog: Catalog, machine_id: str) -> Promotion | None:
    """The newest that this machine's host has something to hear of."""
    found = [
        each
        for each in promotions(catalog, live=True)
        if (member := each.member(machine_id)) is not None and not member.is_back
    ]
    return found[-1] if found else None


def check_not_promoting(catalog: Catalog, machine_id: str, machine: str) -> None:
    """Raise RefusedError while a point is being copied back over the disks of a machine."""
    found = live_promotion(catalog, machine_id)
    if found is not None:
        raise RefusedError(
            f"a point is being copied back over the disks of machine {machine} (promotion {found.id[:12]}, "
            f"{found.state}): wait until that is over"
        )


def _promotion(catalog: Catalog, *row: object) -> Promotion:
    try:
        found = msgspec.json.decode(str(row[4]), type=Promotion)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        found = None
    columns = None if found is None else (found.id, found.state, int(found.is_over), found.generation)
    if found is None or columns != row[:4] or not is_sound(found):
        raise IntegrityError(
            f"{catalog.path}: a row of promotions cannot be: make the catalog again with `replica-store rebuild`"
        )
    return found


# ---- changing -------------------------------------------------------------------------------------------------------


def save(root: str, make: Callable[[Vault], tuple[Promotion, ...]]) -> Promotion:
    """New states of promotions, durable when this returns; the last of them. `make` may look at the vault and refuse;
    nobody else changes one meanwhile."""
    # Opened behind the lock: a rebuild puts another catalog in the place of this one.
    with lock_descriptions(root, LOCK_S_MAX), Vault.open(root, writable=True) as vault:
        with vault.catalog.transaction():
            saved = [put_promotion(vault, made) for made in make(vault)]
        for each in saved:
            shelf_of(each.id).remove_old(vault.objects, vault.sealer)
    return saved[-1]


def change_promotion(root: str, promotion_id: str, make: Callable[[Promotion], Promotion]) -> Promotion:
    """Another state of one. `make` is given what is there and may refuse."""
    return save(root, lambda vault: (make(sealed_promotion(vault, promotion_id)),))


def put_promotion(vault: Vault, made: Promotion) -> Promotion:
    """Its next generation, sealed, and its row. Inside a transaction, behind the lock of descriptions."""
    shelf = shelf_of(made.id)
    newest, _ = shelf.newest(vault.objects, vault.sealer)
    generation = max(made.generation, newest.generation if newest else 0) + 1
    made = msgspec.structs.replace(made, generation=generation)
    shelf.put(vault.objects, vault.sealer, made)
    write_promotion(vault.catalog, made)
    return made


def write_promotion(catalog: Catalog, made: Promotion) -> None:
    """Make or replace its row. Inside a transaction."""
    catalog.change(
        f"INSERT OR REPLACE INTO promotions ({_COLUMNS}) VALUES (?, ?, ?, ?, ?)",  # noqa: S608
        (made.id, made.state, int(made.is_over), made.generation, msgspec.json.encode(made).decode()),
    )


def shelf_of(promotion_id: str) -> Shelf[Promotion]:
    """The sealed objects of one promotion."""
    return Shelf(
        f"{_PREFIX}{promotion_id}-",
        b"asrfs promotion 1",
        "promotion",
        Promotion,
        lambda each: each.id == promotion_id and is_sound(each),
    )


def sealed_promotions(objects: Objects, sealer: Sealer) -> tuple[list[Promotion], list[str]]:
    """The valid state of each among the vault's objects, and a line for each object that cannot be read."""
    matches = (_NAME.fullmatch(name) for name in objects.list(_PREFIX))
    found, damages = [], []
    for promotion_id in sorted({match["id"] for match in matches if match is not None}):
        newest, unreadable = shelf_of(promotion_id).newest(objects, sealer)
        damages += unreadable
        if newest is not None:
            found.append(newest)
    return found, damages
