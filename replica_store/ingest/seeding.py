"""What a session does with seeds: says which chunks the store has, and completes log objects that came without them.

Blocks; runs in a thread. A seed is opened for each call: one that was replaced or removed meanwhile is at worst not
what was said, which the object's digest shows, and then the host sends everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

from asrfs.errors import AsrfsError, RefusedError
from asrfs.format.log_object import ObjectHeader, check_digest
from asrfs.format.object_index import Index
from asrfs.format.omission import pieces_of, restored
from asrfs.model.digest_tree import bitmap_of, numbers_of
from asrfs.model.machine import DiskRecord
from asrfs.model.names import is_name
from asrfs.protocol.messages import ChunksOfDisk, Match, Matched
from asrfs.protocol.session import ObjectReceived
from replica_store.vault.seed_files import Seed
from replica_store.vault.vault import Vault


class SeedUselessError(RefusedError):
    """What a host left out cannot be made here after all: it has to send it."""


def match(vault: Vault, machine_id: str, wanted: Match) -> Matched:
    """Which of the chunks are in seeds. A seed that cannot be read is none."""
    return Matched(number=wanted.number, equal=tuple(_equal(vault, machine_id, disk) for disk in wanted.disks))


def _equal(vault: Vault, machine_id: str, wanted: ChunksOfDisk) -> bytes:
    if not is_name(wanted.name):
        return b""
    try:
        seed = vault.seeds.open(machine_id, wanted.name, vault.keys_of(machine_id))
        if seed is None:
            return b""
        try:
            numbers = seed.equal(wanted.runs, wanted.digests)
        finally:
            seed.close()
    except (AsrfsError, OSError):
        return b""
    return bitmap_of(numbers, sum(count for _, count in wanted.runs))


def complete(
    vault: Vault,
    machine_id: str,
    received: ObjectReceived,
    header: ObjectHeader,
    index: Index,
    disks: Iterable[DiskRecord],
    where: str,
) -> memoryview:
    """The whole object, as its host made it. `disks`: all records of the machine's disks up to its end, in order.

    Raises SeedUselessError.
    """
    keys = vault.session_keys(machine_id, header.epoch, header.session_salt)
    machine_keys = vault.keys_of(machine_id)
    names = {disk.slot: disk.name for disk in disks}
    seeds: dict[int, Seed] = {}
    with ExitStack() as opened:

        def content_of(frame: int) -> bytes:
            return b"".join(
                _seed(piece.slot).read(piece.offset, piece.length) for piece in pieces_of(header, index, frame)
            )

        def _seed(slot: int) -> Seed:
            if slot not in seeds:
                seed = vault.seeds.open(machine_id, names[slot], machine_keys) if slot in names else None
                if seed is None:
                    raise SeedUselessError(f"{where}: there is no seed of the disk in slot {slot}")
                opened.callback(seed.close)
                seeds[slot] = seed
            return seeds[slot]

        try:
            whole = restored(
                received.content,
                header,
                numbers_of(received.begin.omitted),
                content_of,
                payload_key=keys.payload,
                level=received.begin.level,
                where=where,
            )
            check_digest(whole, where)
        except (AsrfsError, OSError) as error:
            raise SeedUselessError(
                f"what was left out of LSN {header.first_lsn} cannot be made here: {error}"
            ) from None
    return whole
