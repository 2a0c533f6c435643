"""Seeds: `seeds/MACHINE/DISK.seed`, copies of disks that were brought by hand, until the first copy of each is done.

No part of a history: what a seed is good for has come as records once they are acknowledged, so a seed that is gone or
damaged costs traffic and nothing else. It is written whole under a hidden name, synced, and renamed, so that a crash
leaves a seed or none. Who writes or removes has the lock of the machine's seeds; reading needs nobody's leave.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from asrfs.errors import FormatError, NoSpaceError
from asrfs.format.log_object import SALT_BYTES
from asrfs.format.seed_file import (
    CHUNK_DIGEST_BYTES,
    NO_CHUNK,
    SEALED_CHUNK_BYTES,
    SEED_HEADER_BYTES,
    SEED_VERSION,
    SeedHeader,
    SeedSealer,
    chunk_digest,
    decode_seed_header,
    derive_digest_key,
    encode_seed_header,
)
from asrfs.model.extents import CHUNK_BYTES
from asrfs.model.names import id_bytes, is_name
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import File
from replica_store.vault.keys import MachineKeys
from replica_store.vault.lock import VaultLock

SEEDS_DIRECTORY = "seeds"
SUFFIX = ".seed"
_LOCK_FILE = ".lock"
_BATCH_CHUNKS = 64
_ZEROS = bytes(CHUNK_BYTES)

Progress = Callable[[int, int], None]


class Seed:
    """An open seed. Calls block and raise OSError; close it."""

    def __init__(self, file: File, header: SeedHeader, keys: MachineKeys, where: str) -> None:
        self.size_bytes = header.size_bytes
        self._file = file
        self._header = header
        self._sealer = SeedSealer(header, keys.payload_key)
        self._where = where

    def equal(self, runs: Iterable[tuple[int, int]], digests: bytes) -> list[int]:
        """Which of these chunks, given as runs of `(first, count)` and the digest of each, are the same here, counted
        from 0 in the order they are given."""
        step, at, found = CHUNK_DIGEST_BYTES, 0, []
        for first, count in runs:
            known = min(count, max(0, self._header.chunks - first))
            here = self._file.read_at(known * step, self._header.digest_place(first)) if known else b""
            wanted = digests[at * step : (at + len(here) // step) * step]
            for i in range(len(wanted) // step):
                digest = wanted[i * step : (i + 1) * step]
                if digest != NO_CHUNK and digest == here[i * step : (i + 1) * step]:
                    found.append(at + i)
            at += count
        return found

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the disk. Raises FormatError where it has none or they are damaged."""
        end = offset + length
        pieces = []
        for chunk in range(offset // CHUNK_BYTES, -(-end // CHUNK_BYTES)):
            begin = chunk * CHUNK_BYTES
            content = self._chunk(chunk)
            pieces.append(content[max(0, offset - begin) : end - begin])
        content = b"".join(pieces)
        if len(content) != length:
            raise FormatError(f"{self._where}: has no {length} bytes from {offset} on")
        return content

    def _chunk(self, chunk: int) -> bytes:
        length = self._header.chunk_bytes(chunk)
        if length <= 0:
            return b""
        sealed = self._file.read_at(length + SEALED_CHUNK_BYTES - CHUNK_BYTES, self._header.chunk_place(chunk))
        return self._sealer.open(chunk, sealed, self._where)

    def close(self) -> None:
        self._file.close()


class SeedFiles:
    """`storage` is rooted at the vault's directory. Errors are OSError, as from the system, if nothing else is said."""

    def __init__(self, storage: DirectoryStorage) -> None:
        self._storage = storage

    def lock(self, machine_id: str) -> VaultLock:
        """Become the one that writes and removes seeds of a machine. Raises RefusedError when another is."""
        self._storage.make_directory(f"{SEEDS_DIRECTORY}/{machine_id}")
        path = self._storage.path(f"{SEEDS_DIRECTORY}/{machine_id}/{_LOCK_FILE}")
        return VaultLock(path, "being given a seed", "try again when that is done")

    def machines(self) -> list[str]:
        """Ids of those that have seeds, or had some."""
        try:
            return self._storage.names(SEEDS_DIRECTORY)
        except FileNotFoundError:
            return []

    def disks(self, machine_id: str) -> list[str]:
        """Names of a machine's disks that have a seed."""
        try:
            names = self._storage.names(f"{SEEDS_DIRECTORY}/{machine_id}")
        except FileNotFoundError:
            return []
        disks = [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]
        return [disk for disk in disks if is_name(disk)]

    def open(self, machine_id: str, disk: str, keys: MachineKeys) -> Seed | None:
        """None if there is no seed of that disk. Raises FormatError."""
        path = _path(machine_id, disk)
        try:
            file = self._storage.open(path)
        except FileNotFoundError:
            return None
        where = self._storage.path(path)
        try:
            header = decode_seed_header(file.read_at(SEED_HEADER_BYTES, 0), id_bytes(machine_id), where)
        except BaseException:
            file.close()
            raise
        return Seed(file, header, keys, where)

    def put(self, machine_id: str, disk: str, image: File, keys: MachineKeys, progress: Progress) -> int:
        """Keep `image` as the seed of a disk, in place of the one there was; bytes of content in it. Under the lock.

        `progress` is told bytes read and bytes to read. Raises NoSpaceError at once if it cannot have room.
        """
        self.sweep(machine_id)
        extents = list(image.data_extents())
        total = sum(length for _, length in extents)
        if total > self._storage.free_bytes():
            raise NoSpaceError(f"the seed has {total} bytes of content, and the vault has less room than that")
        header = SeedHeader(id_bytes(machine_id), SEED_VERSION, image.size(), secrets.token_bytes(SALT_BYTES))
        temporary = f"{SEEDS_DIRECTORY}/{machine_id}/.{secrets.token_hex(8)}"
        try:
            file = self._storage.create(temporary)
            try:
                content_bytes = _Writer(file, header, keys).write(image, extents, lambda done: progress(done, total))
                file.datasync()
            finally:
                file.close()
            self._storage.rename(temporary, _path(machine_id, disk))
        except BaseException:
            with suppress(OSError):
                self._storage.unlink(temporary)
            raise
        for directory in (f"{SEEDS_DIRECTORY}/{machine_id}", SEEDS_DIRECTORY, ""):
            self._storage.sync_directory(directory)
        return content_bytes

    def remove(self, machine_id: str, disk: str) -> None:
        """Nothing happens if it is not there. Under the lock."""
        with suppress(FileNotFoundError):
            self._storage.unlink(_path(machine_id, disk))

    def sweep(self, machine_id: str) -> None:
        """Remove what writers that died left. Under the lock."""
        directory = f"{SEEDS_DIRECTORY}/{machine_id}"
        for name in self._storage.names(directory):
            if name.startswith(".") and name != _LOCK_FILE:
                self._storage.unlink(f"{directory}/{name}")


class _Writer:
    """Writes the file of one seed, batch after batch."""

    def __init__(self, file: File, header: SeedHeader, keys: MachineKeys) -> None:
        self._file = file
        self._header = header
        self._sealer = SeedSealer(header, keys.payload_key)
        self._digest_key = derive_digest_key(keys.index_key)

    def write(self, image: File, extents: Iterable[tuple[int, int]], step: Callable[[int], None]) -> int:
        """Bytes of content. `step` is told bytes read. Raises FormatError for an image that ends early."""
        self._file.truncate(self._header.file_bytes)
        done = content_bytes = 0
        for first, count in _batches(extents, self._header):
            length = min(count * CHUNK_BYTES, self._header.size_bytes - first * CHUNK_BYTES)
            content = image.read_at(length, first * CHUNK_BYTES)
            if len(content) != length:
                raise FormatError(f"the image ended while it was read, at byte {first * CHUNK_BYTES + len(content)}")
            content_bytes += self._put(first, content)
            done += length
            step(done)
        self._file.write_at([encode_seed_header(self._header)], 0)
        return content_bytes

    def _put(self, first: int, content: bytes) -> int:
        """Chunks that follow one another; bytes of content in them."""
        digests: list[bytes] = []
        run: list[bytes] = []
        run_first, kept = first, 0
        for at in range(0, len(content), CHUNK_BYTES):
            chunk, piece = first + at // CHUNK_BYTES, content[at : at + CHUNK_BYTES]
            if piece == (_ZEROS if len(piece) == CHUNK_BYTES else bytes(len(piece))):
                digests.append(NO_CHUNK)
                self._write_run(run_first, run)
                run, run_first = [], chunk + 1
                continue
            digests.append(chunk_digest(self._digest_key, piece))
            run.append(self._sealer.seal(chunk, piece))
            kept += len(piece)
        self._write_run(run_first, run)
        if kept:
            self._file.write_at([b"".join(digests)], self._header.digest_place(first))
        return kept

    def _write_run(self, first: int, sealed: Sequence[bytes]) -> None:
        if sealed:
            self._file.write_at(sealed, self._header.chunk_place(first))


def _batches(extents: Iterable[tuple[int, int]], header: SeedHeader) -> Iterator[tuple[int, int]]:
    """Runs `(first, count)` of the chunks that these extents touch, each once."""
    at = 0
    for offset, length in extents:
        first, end = max(at, offset // CHUNK_BYTES), min(-(-(offset + length) // CHUNK_BYTES), header.chunks)
        for begin in range(first, end, _BATCH_CHUNKS):
            yield begin, min(_BATCH_CHUNKS, end - begin)
        at = max(at, end)


def _path(machine_id: str, disk: str) -> str:
    return f"{SEEDS_DIRECTORY}/{machine_id}/{disk}{SUFFIX}"
