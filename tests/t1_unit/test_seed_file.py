"""Seeds in a vault: what is put is found by its digest and read back; damage and wrong machines are named."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from asrfs.errors import BadInputError, FormatError, NotFoundError, RefusedError
from asrfs.format.seed_file import chunk_digest, derive_digest_key
from asrfs.model.machine import DiskRecord
from asrfs.storage.directory import DirectoryStorage, open_path
from replica_store.vault.keys import MachineKeys
from replica_store.vault.rows import DiskRow
from replica_store.vault.seed_files import Seed, SeedFiles
from replica_store.vault.seed_need import check_need, is_over

CHUNK = 64 << 10
KEYS = MachineKeys(bytes(32), bytes(range(32)))
KEY = derive_digest_key(KEYS.index_key)
MACHINE, OTHER = "1" * 32, "2" * 32
SIZE = 200 * CHUNK + 1536


class Kept:
    """A vault's seeds, and the content of one."""

    def __init__(self, scratch: Path, rng: random.Random) -> None:
        self.root = scratch / "vault"
        self.seeds = SeedFiles(DirectoryStorage(str(self.root)))
        self.path = scratch / "image"
        with self.path.open("wb") as file:
            file.write(rng.randbytes(70 * CHUNK + 100))
            file.seek(100 * CHUNK + 4096)
            file.write(rng.randbytes(CHUNK))
            file.seek(150 * CHUNK)
            file.write(bytes(2 * CHUNK))
            file.seek(SIZE - 700)
            file.write(rng.randbytes(700))
        self.content = self.path.read_bytes()

    def put(self, disk: str = "root") -> int:
        image = open_path(str(self.path))
        try:
            with self.seeds.lock(MACHINE):
                return self.seeds.put(MACHINE, disk, image, KEYS, lambda done, total: None)
        finally:
            image.close()

    def open(self, disk: str = "root") -> Seed:
        seed = self.seeds.open(MACHINE, disk, KEYS)
        assert seed is not None
        return seed

    def digests(self, first: int, count: int) -> bytes:
        chunks = [self.content[at * CHUNK : (at + 1) * CHUNK] for at in range(first, first + count)]
        return b"".join(chunk_digest(KEY, chunk) for chunk in chunks)


@pytest.fixture
def kept(scratch: Path, rng: random.Random) -> Kept:
    return Kept(scratch, rng)


def test_chunks_are_found_and_read(kept: Kept, rng: random.Random) -> None:
    assert kept.put() == 73 * CHUNK + 1536, "whole chunks with anything in them, and the short last one"
    seed = kept.open()
    runs = [(0, 71), (99, 4), (199, 2)]
    digests = b"".join(kept.digests(*run) for run in runs)
    assert seed.equal(runs, digests) == [*range(71), 72, 73, 76], "zeros are none"
    for _ in range(200):
        first = rng.randrange(70 * CHUNK)
        length = rng.randint(1, 3 * CHUNK) if first < 66 * CHUNK else 10
        assert seed.read(first, length) == kept.content[first : first + length]
    assert seed.read(SIZE - 1536, 1536) == kept.content[-1536:]
    changed = bytearray(digests)
    changed[5 * 16] ^= 1
    assert 5 not in seed.equal(runs, bytes(changed))
    assert seed.equal([(200, 4), (1 << 40, 2)], kept.digests(200, 1) + bytes(80)) == [0], "behind the end is nothing"
    with pytest.raises(FormatError):
        seed.read(SIZE - 512, 1024)
    with pytest.raises(FormatError, match="the seal of chunk 80 is broken"):
        seed.read(80 * CHUNK, CHUNK)
    seed.close()


def test_a_second_takes_the_place_of_the_first(kept: Kept) -> None:
    kept.put()
    before = kept.open()
    kept.path.write_bytes(b"\1" * CHUNK)
    assert kept.put() == CHUNK
    seed = kept.open()
    assert seed.read(0, 100) == b"\1" * 100
    assert before.read(0, 100) == kept.content[:100], "who has it open goes on reading it"
    before.close()
    seed.close()
    with kept.seeds.lock(MACHINE):
        with pytest.raises(RefusedError, match="being given a seed"):
            kept.seeds.lock(MACHINE)
        kept.seeds.remove(MACHINE, "root")
    assert kept.seeds.open(MACHINE, "root", KEYS) is None


def test_what_writers_left_is_swept(kept: Kept) -> None:
    kept.put()
    left = kept.root / "seeds" / MACHINE / ".0123"
    left.write_bytes(b"half")
    assert kept.seeds.disks(MACHINE) == ["root"]
    kept.put("data")
    assert kept.seeds.disks(MACHINE) == ["data", "root"]
    assert not left.exists()
    assert kept.seeds.machines() == [MACHINE]
    assert kept.seeds.disks(OTHER) == []


def test_only_a_seed_of_this_machine_is_one(kept: Kept) -> None:
    kept.put()
    path = kept.root / "seeds" / MACHINE / "root.seed"
    whole = path.read_bytes()
    (kept.root / "seeds" / OTHER).mkdir()
    (kept.root / "seeds" / OTHER / "root.seed").write_bytes(whole)
    with pytest.raises(FormatError, match="not a seed of this machine"):
        kept.seeds.open(OTHER, "root", KEYS)
    for broken in (whole[:100], b"X" + whole[1:], whole[:50] + b"X" + whole[51:]):
        path.write_bytes(broken)
        with pytest.raises(FormatError):
            kept.seeds.open(MACHINE, "root", KEYS)


def rows(*changes: tuple[int, int, str, bool, bool]) -> list[DiskRow]:
    """Of `(lsn, slot, name, gap, removed)`."""
    return [
        DiskRow(
            MACHINE, lsn, DiskRecord(slot=slot, id=f"{slot:032x}", name=name, size_bytes=SIZE, gap=gap, removed=gone)
        )
        for lsn, slot, name, gap, gone in changes
    ]


def test_what_a_seed_is_good_for() -> None:
    check_need("web1", "anything", 512, [])
    gap = rows((1, 0, "root", True, False))
    check_need("web1", "root", SIZE, gap)
    assert not is_over("root", gap)
    assert not is_over("root", [])
    with pytest.raises(BadInputError, match="not a copy of this disk"):
        check_need("web1", "root", SIZE + 512, gap)
    with pytest.raises(NotFoundError, match="it has root"):
        check_need("web1", "data", SIZE, gap)
    whole = rows((1, 0, "root", True, False), (9, 0, "root", False, False))
    with pytest.raises(RefusedError, match="nothing to seed"):
        check_need("web1", "root", SIZE, whole)
    assert is_over("root", whole)
    assert not is_over("data", whole), "it may come"
    removed = rows((1, 0, "root", True, False), (9, 0, "root", True, True))
    assert is_over("root", removed)
    again = [*removed, *rows((10, 1, "root", True, False))]
    check_need("web1", "root", SIZE, again)
    assert not is_over("root", again)
