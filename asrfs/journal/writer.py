"""The tail of the journal: appends records, makes them durable, begins new segments.

Threads and the one lock. Any thread may append; `lock` covers the tail, the maps of the disks and the table of open
segments, and is never held during a datasync, except that of a write taken back. One helper thread of the journal does
every other datasync, so that waiters share it (group commit): it notes the LSN appended so far, syncs sealed segments,
then the open one, and only then raises `durable_lsn` to what it noted (I2). Names need no sync by then: a segment gets
its name durable before its first record (`next_segment.py`, which has a thread of its own).

    what fails                          what happens
    write EIO, any datasync             final: every later append and sync raises EIO; never tried again
    no space for a new segment          this append raises ENOSPC, a later one tries again
    no space inside a segment           this append raises ENOSPC, the tail stays where it was

A write that was refused may lie there whole all the same. Before anything else is written it is taken back, durably, so
that a crash never finds it in the place of what came after it; and a segment whose successor's header was refused takes
no more records, because a header may say where it begins.

A crash at any point leaves a prefix: records follow one another, and a segment is used only under a number that no
older record carries (`segments.py`).
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from crc32c import crc32c

from asrfs.format.record import (
    PAYLOAD_BYTES_MAX,
    READS_AS_ZEROS,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    Kind,
    WriteFrame,
    segment_seed,
)
from asrfs.format.segment import (
    POSITION_MASK,
    POSITION_SHIFT,
    SEGMENT_BYTES,
    SEGMENT_HEADER_BYTES,
    SegmentHeader,
    encode_segment_header,
)
from asrfs.format.segment_index import SealedSegment
from asrfs.journal.block_map import ZEROS_EXPANDED_MAX, BlockMap
from asrfs.journal.next_segment import NextSegment
from asrfs.journal.recovery import Recovered
from asrfs.journal.segments import segment_name
from asrfs.model.clock import Clock
from asrfs.model.extents import BLOCK_SHIFT
from asrfs.storage.interface import Bytes, File, Storage

ZERO_BLOCKS_MAX = 64 * 1024
"""Blocks a segment's records without payload may add to the maps; then a new segment begins, as it does when full."""
OPEN_SEGMENTS_MAX = 128
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_BODY = struct.Struct("<QQQQQIIHHI")
_CRC = struct.Struct("<I")
_PREFIX = struct.Struct("<4sI")
_WRITE = int(Kind.WRITE)

draw_salt = partial(secrets.randbits, 64)
SyncCallback = Callable[[OSError | None], None]
SealedCallback = Callable[[list[SealedSegment]], None]


class Journal:
    """Open after recovery; begins a new segment. The public integers are for reading only.

    `appended_lsn`, `durable_lsn`: see the positions of a history. `last_time_ns`: time of the last record.
    """

    def __init__(
        self,
        storage: Storage,
        machine_id: bytes,
        recovered: Recovered,
        clock: Clock,
        *,
        epoch: int | None = None,
        make_salt: Callable[[], int] = draw_salt,
        segment_bytes: int = SEGMENT_BYTES,
        zero_blocks_max: int = ZERO_BLOCKS_MAX,
        prepare_ahead: bool = True,
    ) -> None:
        assert SEGMENT_HEADER_BYTES < segment_bytes <= SEGMENT_BYTES
        self.lock = threading.Lock()
        self.epoch = recovered.epoch if epoch is None else epoch
        self.appended_lsn = recovered.last_lsn
        self.durable_lsn = recovered.last_lsn
        self.last_time_ns = recovered.last_time_ns
        self._storage = storage
        self._machine_id = machine_id
        self._make_salt = make_salt
        self._time_ns = clock.time_ns
        self._segment_bytes = segment_bytes
        self._zero_blocks_max = zero_blocks_max
        self._failed: str | None = None
        self.barred: Callable[[int], None] | None = None
        """Asked, under the lock, for the kind of each record that is to be appended; raises what forbids it."""
        # The open segment. Before there is one, the tail lies at a segment's end, so that the first append begins one.
        self._number = recovered.next_segment_number - 1
        self._tail = segment_bytes
        self._zero_blocks = 0
        self._seed = 0
        self._base = 0
        self._write_at: Callable[[Sequence[Bytes], int], None] = _closed
        # Bytes of the open segment where records were refused and may lie whole all the same.
        self._refused: set[int] = set()
        self._header = bytearray(RECORD_HEADER_BYTES)
        self._header[: len(RECORD_MAGIC)] = RECORD_MAGIC
        self._body = memoryview(self._header)[8:]
        # Open and sealed segments by number; sealed ones not yet synced.
        self._files: dict[int, File] = {}
        self._unsynced: list[tuple[int, File]] = []
        # What is known of the latter; the open one's salt and first LSN.
        self._sealed: list[SealedSegment] = []
        self._salt = 0
        self._first_lsn = 0
        self.when_sealed: SealedCallback = _ignore
        """Told, in order, of segments that are sealed and durable. Called like who waits for a sync."""
        self._syncs_sealed = prepare_ahead
        self._next = NextSegment(storage, segment_bytes, ahead=prepare_ahead)
        # The helper thread.
        self._wake = threading.Condition(self.lock)
        self._waiting: list[tuple[int, SyncCallback]] = []
        self._closing = False
        try:
            self._roll()
        except OSError as error:
            if error.errno not in _NO_SPACE:
                self._next.close()
                raise
        self._thread = threading.Thread(target=self._sync_forever, name="journal-sync", daemon=True)
        self._thread.start()

    @property
    def segment(self) -> int:
        """Number of the open segment."""
        return self._number

    @property
    def offset(self) -> int:
        """Byte of the open segment at which the next record begins."""
        return self._tail

    @property
    def failed(self) -> str | None:
        """What made this journal fail for good, or None."""
        return self._failed

    # ---- append ----

    def append(self, kind: int, slot: int, offset: int, length: int, payload: Bytes = b"") -> int:
        """Append a record; returns the position of its payload. `payload` is used only during the call.

        Not durable before a sync. Raises OSError: EIO (final), ENOSPC (this time).
        """
        with self.lock:
            return self.append_locked(kind, slot, offset, length, payload)

    def append_locked(self, kind: int, slot: int, offset: int, length: int, payload: Bytes = b"") -> int:
        """`append` for a caller that holds `lock`, so that it can change its map at the same instant."""
        if self.barred is not None:
            self.barred(kind)
        size = len(payload)
        at = self._tail
        # A position lies in its own segment, also that of a record without payload: hence the one byte.
        if at + RECORD_HEADER_BYTES + (size or 1) > self._segment_bytes or self._zero_blocks > self._zero_blocks_max:
            assert size <= min(PAYLOAD_BYTES_MAX, self._segment_bytes - SEGMENT_HEADER_BYTES - RECORD_HEADER_BYTES)
            self._roll()
            at = self._tail
        lsn = self.appended_lsn + 1
        time_ns = self._time_ns()
        if time_ns < self.last_time_ns:
            time_ns = self.last_time_ns
        header = self._header
        _BODY.pack_into(header, 8, lsn, time_ns, self.durable_lsn, offset, length, size, crc32c(payload), kind, slot, 0)
        _CRC.pack_into(header, 4, crc32c(self._body, self._seed))
        try:
            if self._refused:
                self._take_back()
            self._write_at((header, payload), at)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                self._fail(f"{segment_name(self._number)}: write at {at} failed: {error}")
            else:
                self._refused.add(at)
            raise
        start = at + RECORD_HEADER_BYTES
        self._tail = start + size
        self.appended_lsn = lsn
        self.last_time_ns = time_ns
        if not size and kind in READS_AS_ZEROS:
            blocks = (length + 4095) >> BLOCK_SHIFT
            self._zero_blocks += blocks if blocks <= ZEROS_EXPANDED_MAX else 2
        return self._base | start

    def append_framed_locked(self, writes: Sequence[tuple[int, int, WriteFrame]]) -> int | None:
        """Append WRITE records of `(slot, offset, framed payload)` for who holds `lock`.

        Returns the position of the first payload; each other one lies behind the one before and its own header. None:
        nothing was appended (no room in the segment, an error); each by itself then finds out why.
        """
        if self.barred is not None or self._refused or self._zero_blocks > self._zero_blocks_max:
            return None
        at = end = self._tail
        lsn, durable_lsn, seed = self.appended_lsn, self.durable_lsn, self._seed
        time_ns = self._time_ns()
        if time_ns < self.last_time_ns:
            time_ns = self.last_time_ns
        records: list[memoryview] = []
        for slot, offset, (whole, body, payload) in writes:
            lsn += 1
            length = len(payload)
            crc = crc32c(payload)
            _BODY.pack_into(body, 0, lsn, time_ns, durable_lsn, offset, length, length, crc, _WRITE, slot, 0)
            _PREFIX.pack_into(whole, 0, RECORD_MAGIC, crc32c(body, seed))
            records.append(whole)
            end += RECORD_HEADER_BYTES + length
        if end > self._segment_bytes:
            return None
        try:
            self._write_at(records, at)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                self._fail(f"{segment_name(self._number)}: write at {at} failed: {error}")
            else:
                for record in records:
                    self._refused.add(at)
                    at += len(record)
            return None
        self._tail = end
        self.appended_lsn = lsn
        self.last_time_ns = time_ns
        return self._base | (at + RECORD_HEADER_BYTES)

    # ---- read back ----

    def read_locked(self, position: int, length: int) -> bytes:
        """`length` journaled bytes at `position`, for a caller that holds `lock`. Raises OSError."""
        piece = self._file_of(position).read_at(length, position & POSITION_MASK)
        if len(piece) != length:
            raise _short(position, len(piece))
        return piece

    def read_into_locked(self, position: int, buffer: memoryview) -> None:
        """As `read_locked`, as many bytes as `buffer` has, into it."""
        have = self._file_of(position).read_into(buffer, position & POSITION_MASK)
        if have != len(buffer):
            raise _short(position, have)

    def drop_through(self, segment: int, maps: Iterable[BlockMap]) -> None:
        """Segments up to `segment` are wholly in the images: forget them. Afterwards their files are not used here.

        The open segment is never dropped. Raises nothing.
        """
        with self.lock:
            segment = min(segment, self._number - 1)
        for block_map in maps:
            with self.lock:
                dropped = block_map.drop_through(segment)
            while dropped:  # each takes a millisecond to free: requests come between
                dropped.pop()
        with self.lock:
            unsynced = {number for number, _ in self._unsynced}
            for number in [n for n in self._files if n <= segment and n not in unsynced]:
                self._files.pop(number).close()

    # ---- durability ----

    def sync(self) -> None:
        """Return when everything appended before the call is durable. Raises OSError(EIO) if it never will be."""
        done = threading.Event()
        result: list[OSError | None] = []

        def finish(error: OSError | None) -> None:
            result.append(error)
            done.set()

        self.request_sync(finish)
        done.wait()
        if result[0] is not None:
            raise result[0]

    def request_sync(self, callback: SyncCallback) -> None:
        """Call `callback(None)` once everything appended so far is durable, or `callback(OSError)`.

        It is called from the helper thread, or before this returns when there is nothing to wait for. It must be
        quick and must not raise.
        """
        error = None
        with self.lock:
            if self._failed is not None:
                error = OSError(errno.EIO, self._failed)
            elif self._closing:
                error = OSError(errno.EIO, "the journal is closed")
            elif self.durable_lsn < self.appended_lsn:
                self._waiting.append((self.appended_lsn, callback))
                self._wake.notify()
                return
        callback(error)

    def close(self) -> None:
        """Finish the syncs that were requested, end the thread, close the files. Does not sync by itself."""
        with self.lock:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._next.close()
        with self.lock:
            self._fail("the journal is closed")
            self._write_at = _closed
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _sync_forever(self) -> None:
        while True:
            with self.lock:
                while not self._waiting and not self._closing:
                    self._wake.wait()
                waiting, self._waiting = self._waiting, []
                durable = self.durable_lsn
            if not waiting:
                return
            # The commit before this one may have covered some who came while it ran.
            error = self._commit() if any(lsn > durable for lsn, _ in waiting) else None
            for lsn, callback in waiting:
                callback(error if lsn > durable else None)

    def _commit(self) -> OSError | None:
        """Make durable what is appended now: sealed segments, then the open one. Their names are durable already."""
        with self.lock:
            if self._failed is not None:
                return OSError(errno.EIO, self._failed)
            target = self.appended_lsn
            sealed, known = list(self._unsynced), list(self._sealed)
            number = self._number
            files = [*sealed, (number, self._files[number])] if number in self._files else sealed
        place = ""
        try:
            for number, file in files:
                place = segment_name(number)
                file.datasync()
        except OSError as error:
            with self.lock:
                self._fail(f"{place}: sync failed: {error}")
                return OSError(errno.EIO, self._failed)
        with self.lock:
            del self._unsynced[: len(sealed)]
            del self._sealed[: len(known)]
            self.durable_lsn = max(self.durable_lsn, target)  # an epoch may have begun meanwhile
        if known:
            self.when_sealed(known)
        return None

    # ---- segments ----

    def _fail(self, why: str) -> None:
        if self._failed is None:
            self._failed = why
            self.barred = self._refuse

    def _refuse(self, _kind: int) -> None:
        raise OSError(errno.EIO, self._failed)

    def _roll(self, epoch: int | None = None, after_lsn: int | None = None) -> None:
        """Seal the open segment and begin the next one. Raises OSError; then nothing was begun, and the next tries."""
        number = self._number + 1
        salt = self._make_salt()
        epoch, last_lsn = epoch or self.epoch, after_lsn or self.appended_lsn
        first_lsn = last_lsn + 1
        header = SegmentHeader(epoch, number, first_lsn, self.durable_lsn, self.last_time_ns, self._machine_id, salt)
        try:
            if self._refused:
                self._take_back()
            file = self._next.take(number)
            try:
                file.write_at((encode_segment_header(header),), 0)
            except OSError:
                self._next.give_back(number, file)
                self._tail = self._segment_bytes
                raise
        except OSError as error:
            if error.errno not in _NO_SPACE:
                self._fail(f"{segment_name(number)}: cannot be begun: {error}")
            raise
        if self._number in self._files:
            self._unsynced.append((self._number, self._files[self._number]))
            place = (self._number, self._salt, self._first_lsn, self.appended_lsn, self.last_time_ns, self._tail)
            self._sealed.append(SealedSegment(*place))
            if self._syncs_sealed:  # also when nobody asks: what a restart must write again stays little
                self._waiting.append((self.appended_lsn, _ignore))
                self._wake.notify()
        self._files[number] = file
        self._number = number
        self.epoch, self.appended_lsn = epoch, last_lsn
        self._tail = SEGMENT_HEADER_BYTES
        self._salt, self._first_lsn = salt, first_lsn
        self._zero_blocks = 0
        self._seed = segment_seed(number, salt)
        self._base = number << POSITION_SHIFT
        self._write_at = file.write_at
        self._next.want(number + 1)

    def _take_back(self) -> None:
        """Make sure that no record is found where one was refused."""
        file = self._files[self._number]
        for at in self._refused:
            file.write_at((bytes(RECORD_HEADER_BYTES),), at)
        try:
            file.datasync()
        except OSError as error:  # final even for want of space: asked again, the kernel may say yes to what it gave up
            self._fail(f"{segment_name(self._number)}: sync failed: {error}")
            raise OSError(errno.EIO, self._failed) from error
        self._refused.clear()

    def _file_of(self, position: int) -> File:
        number = position >> POSITION_SHIFT
        return self._files.get(number) or self._open_sealed(number)

    def _open_sealed(self, number: int) -> File:
        """A segment from before the last start, opened when a read first wants it."""
        busy = {self._number, *(n for n, _ in self._unsynced)}
        if len(self._files) - len(busy) >= OPEN_SEGMENTS_MAX:
            oldest = next(n for n in self._files if n not in busy)
            self._files.pop(oldest).close()
        file = self._files[number] = self._storage.open(segment_name(number))
        return file


def _closed(_buffers: Sequence[Bytes], _at: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _ignore(_: object) -> None:
    pass


def _short(position: int, have: int) -> OSError:
    end = (position & POSITION_MASK) + have
    return OSError(errno.EIO, f"{segment_name(position >> POSITION_SHIFT)}: ends at {end}")
