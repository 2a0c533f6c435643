"""Writing tails, so that the objects alone bring them back; what a tail is, `tails.py` says.

    log objects under `machines/ID/tail/` ─▶ rows ─▶ … ─▶ `whole-…` sealed, put ─▶ row says whole ─▶ (caller) host told

Each object is durable before its row (I3), and the word that a tail is whole before the row that says so, in the order
in which a crash leaves nothing that was told untrue. Objects without a row are taken in before more come.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace

import msgspec

from asrfs.errors import IntegrityError
from asrfs.format.log_object import check_digest
from replica_store.vault.catalog import Catalog
from replica_store.vault.chain import Found, best_chain
from replica_store.vault.keys import MachineKeys, Sealer
from replica_store.vault.objects import Objects
from replica_store.vault.rows import Entry, LogName, ObjectRow, parse_log_name, tail_prefix
from replica_store.vault.survey import Surveyed, Unreadable, survey
from replica_store.vault.tails import Tail, TailRows, append_to_tail, ends_at, put_tail, tail_of
from replica_store.vault.vault import Vault

_SEAL = b"asrfs whole tail 1"


class WholeTail(msgspec.Struct, frozen=True, kw_only=True):
    """Sealed beside the objects of a tail: its host has nothing behind `last_lsn`, where an object of this digest
    ends."""

    machine_id: str
    epoch: int
    last_lsn: int
    last_digest: bytes


def make_whole(vault: Vault, tail: Tail) -> None:
    """Its host has nothing more; durable when this returns. Raises NoSpaceError, TemporaryError."""
    last = TailRows(vault.catalog, tail).last_own()
    assert last is not None, "a tail has records"
    said = WholeTail(machine_id=tail.machine_id, epoch=tail.epoch, last_lsn=last.last_lsn, last_digest=last.digest)
    sealed = vault.sealer.seal_book(_SEAL, msgspec.msgpack.encode(said))
    name = f"{tail_prefix(tail.machine_id)}whole-{tail.epoch:08x}-{secrets.token_hex(4)}.obj"
    vault.objects.put(name, [sealed])
    with vault.catalog.transaction():
        put_tail(vault.catalog, replace(tail, is_whole=True))


def adopt_tail(vault: Vault, machine_id: str, epoch: int) -> Tail | None:
    """The tail of this epoch with what a crash left out of the catalog; None where there is nothing of one. Raises
    IntegrityError for a damaged object."""
    catalog, objects = vault.catalog, vault.objects
    tail = tail_of(catalog, machine_id, epoch)
    if tail is not None and tail.is_whole:
        return tail
    last = TailRows(catalog, tail).last_own() if tail is not None else None
    names = [name for name, each in tail_names(objects, machine_id, epoch) if each.last_lsn > _lsn(last)]
    surveyed = _readable(survey(objects, machine_id, vault.keys_of(machine_id), names))
    if tail is None:
        found = _first_tail(catalog, machine_id, epoch, surveyed)
        tail, chain = found if found is not None else (None, [])
    else:
        chain = _chain(surveyed, _lsn(last), last.digest if last else tail.branch_digest)
    if tail is None:
        return None
    objects.settle(tail_prefix(machine_id))
    for entry in chain:
        check_digest(objects.read(entry.row.name), objects.where(entry.row.name))
    with catalog.transaction():
        put_tail(catalog, tail)
        append_to_tail(catalog, tail, chain)
        tail = _settled(catalog, objects, vault.sealer, tail)
    return tail


def rebuild_tails(
    catalog: Catalog, objects: Objects, sealer: Sealer, machine_id: str, keys: MachineKeys
) -> tuple[int, list[str]]:
    """All tails of a machine whose history has been made again: how many log objects they have, and what is damaged."""
    count, damages = 0, []
    objects.settle(tail_prefix(machine_id))
    for epoch in sorted({name.epoch for _, name in tail_names(objects, machine_id)}):
        damages += _whole_words(objects, sealer, machine_id, epoch)[1]
        names = [name for name, _ in tail_names(objects, machine_id, epoch)]
        read = list(survey(objects, machine_id, keys, names))
        found = _first_tail(catalog, machine_id, epoch, _readable(read))
        end = found[1][-1].row.last_lsn if found is not None else 0
        damages += [each.text for each in read if isinstance(each, Unreadable) and each.name.last_lsn > end]
        cut_off = [each.entry.row for each in _readable(read) if each.entry.row.first_lsn > end + (found is not None)]
        if cut_off:
            first_lsn, where = min(row.first_lsn for row in cut_off), objects.where(tail_prefix(machine_id))
            damages.append(
                f"{where}: what is before LSN {first_lsn} of the tail of epoch {epoch} is missing or damaged, so "
                f"{len(cut_off)} later log objects are not in the catalog"
            )
        if found is None:
            continue
        tail, chain = found
        with catalog.transaction():
            put_tail(catalog, tail)
            append_to_tail(catalog, tail, chain)
            _settled(catalog, objects, sealer, tail)
        count += len(chain)
    return count, damages


def tail_names(objects: Objects, machine_id: str, epoch: int | None = None) -> list[tuple[str, LogName]]:
    """Names of the log objects of a machine's tails, or of the one of this epoch."""
    parsed = ((name, parse_log_name(name)) for name in sorted(objects.list(tail_prefix(machine_id))))
    return [
        (name, each)
        for name, each in parsed
        if each is not None and each.is_tail and each.machine_id == machine_id and epoch in (None, each.epoch)
    ]


def _first_tail(
    catalog: Catalog, machine_id: str, epoch: int, surveyed: Sequence[Surveyed]
) -> tuple[Tail, list[Entry]] | None:
    """The tail that begins with one of these: the longest, where the history has what it goes on from."""
    best: tuple[Tail, list[Entry]] | None = None
    branches = {(each.entry.row.first_lsn - 1, each.previous_digest) for each in surveyed}
    for lsn, digest in sorted(branches):
        if not ends_at(catalog, machine_id, epoch, lsn, digest):
            continue
        chain = _chain(surveyed, lsn, digest)
        if best is None or chain[-1].row.last_lsn > best[1][-1].row.last_lsn:
            best = Tail(machine_id, epoch, lsn, digest), chain
    return best


def _chain(surveyed: Sequence[Surveyed], lsn: int, digest: bytes) -> list[Entry]:
    by_digest = {each.entry.row.digest: each.entry for each in surveyed}
    found = [Found(each.entry.row, each.previous_digest) for each in surveyed]
    return [
        replace(by_digest[link.digest], row=replace(by_digest[link.digest].row, is_tail=True))
        for link in best_chain(found, lsn, digest)
    ]


def _settled(catalog: Catalog, objects: Objects, sealer: Sealer, tail: Tail) -> Tail:
    """Whole, if that was said of what is here. Inside a transaction."""
    last = TailRows(catalog, tail).last_own()
    words, _ = _whole_words(objects, sealer, tail.machine_id, tail.epoch)
    if last is not None and any((said.last_lsn, said.last_digest) == (last.last_lsn, last.digest) for said in words):
        tail = replace(tail, is_whole=True)
        put_tail(catalog, tail)
    return tail


def _whole_words(objects: Objects, sealer: Sealer, machine_id: str, epoch: int) -> tuple[list[WholeTail], list[str]]:
    """What was said of this tail, and a line for each word that cannot be read: its host mends that if it comes
    again."""
    words, damages = [], []
    for name in objects.list(f"{tail_prefix(machine_id)}whole-{epoch:08x}-"):
        where = objects.where(name)
        try:
            said = msgspec.msgpack.decode(sealer.open_book(_SEAL, objects.read(name), where), type=WholeTail)
        except IntegrityError as error:
            damages.append(str(error))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            damages.append(f"{where}: cannot be read: {error}")
        else:
            words += [said] * ((said.machine_id, said.epoch) == (machine_id, epoch))
    return words, damages


def _readable(read: Iterable[Surveyed | Unreadable]) -> list[Surveyed]:
    return [each for each in read if isinstance(each, Surveyed)]


def _lsn(last: ObjectRow | None) -> int:
    return last.last_lsn if last is not None else 0
