"""Log objects: what is packed comes back, and any flipped bit, wrong key or wrong length is a FormatError."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from asrfs.errors import FormatError
from asrfs.format import log_object as lo
from asrfs.format import object_encoder, object_index
from asrfs.format.object_encoder import ZSTD_LEVEL, ObjectEncoder
from asrfs.format.record import Kind

MACHINE = bytes(range(16))
SALT = bytes(32)
KEYS = lo.derive_keys(b"i" * 32, b"p" * 32, MACHINE, 1, SALT)


def make_index(rows: Sequence[tuple[int, int, int, int, bytes]], first_lsn: int = 1) -> object_index.Index:
    """Index of rows `(kind, slot, offset, length, note)`."""
    positions, at_payload, at_notes = [], 0, 0
    for kind, _, _, length, note in rows:
        if kind in (Kind.WRITE, Kind.FILL):
            positions.append(at_payload)
            at_payload += length
        else:
            positions.append(at_notes if note else 0)
            at_notes += len(note)
    return object_index.Index(
        first_lsn=first_lsn,
        time_ns=np.arange(1000, 1000 + len(rows), dtype=np.uint64),
        offset=np.array([row[2] for row in rows], np.uint64),
        length=np.array([row[3] for row in rows], np.uint64),
        payload_position=np.array(positions, np.uint64),
        note_length=np.array([len(row[4]) for row in rows], np.uint32),
        kind=np.array([row[0] for row in rows], np.uint16),
        slot=np.array([row[1] for row in rows], np.uint16),
        notes=b"".join(row[4] for row in rows),
    )


def make_object(index: object_index.Index, payloads: Sequence[bytes], *, compress: bool = True) -> bytes:
    _, content = ObjectEncoder().encode(
        machine_id=MACHINE,
        epoch=1,
        session_salt=SALT,
        previous_digest=lo.NO_DIGEST,
        index=index,
        payloads=payloads,
        keys=KEYS,
        level=ZSTD_LEVEL if compress else None,
    )
    return bytes(content)


def raw_payload(content: bytes, keys: lo.ObjectKeys = KEYS) -> bytes:
    header = lo.decode_object_header(content, "x")
    table = lo.FrameTable(header, content, "x")
    out = []
    for i in range(header.frame_count):
        at, length = table.extent(i)
        out.append(table.open_frame(i, content[at : at + length], keys.payload))
    return b"".join(out)


ROWS = [
    (Kind.DISK, 0, 0, 0, b"a disk"),
    (Kind.WRITE, 0, 4096, 4096, b""),
    (Kind.ZERO, 0, 0, 1 << 40, b""),
    (Kind.MARKER, 0xFFFF, 0, 0, b"a marker"),
    (Kind.FILL, 1, 8192, 8192, b""),
]


@pytest.mark.parametrize("compress", [True, False])
def test_all_kinds_come_back(compress: bool) -> None:
    payloads = [b"\x5a" * 4096, bytes(range(256)) * 32]
    content = make_object(make_index(ROWS, 7), payloads, compress=compress)
    header = lo.decode_object_header(content, "x")
    index = object_index.decode_index(header, content[: header.frames_offset], KEYS, "x")
    assert (header.first_lsn, header.last_lsn, header.object_length) == (7, 11, len(content))
    assert [int(kind) for kind in index.kind] == [row[0] for row in ROWS]
    assert [int(length) for length in index.length] == [row[3] for row in ROWS]
    assert (index.note(0), index.note(3)) == (b"a disk", b"a marker")
    assert raw_payload(content) == b"".join(payloads)
    assert lo.check_digest(content, "x") == content[-32:]


@settings(max_examples=30)
@given(st.lists(st.sampled_from([512, 4096, 12288, 131072, 200704]), min_size=1, max_size=12), st.integers(0, 99))
def test_payloads_of_any_sizes_come_back(lengths: list[int], seed: int) -> None:
    noise = random.Random(seed)
    payloads = [noise.randbytes(n) if i % 2 else bytes([i]) * n for i, n in enumerate(lengths)]
    rows = [(Kind.WRITE, 0, 0, n, b"") for n in lengths]
    content = make_object(make_index(rows), payloads)
    assert raw_payload(content) == b"".join(payloads)


def test_every_flipped_bit_of_the_frame_is_found() -> None:
    content = make_object(make_index(ROWS), [b"\x5a" * 4096, bytes(8192)])
    for at in range(0, len(content), 7):
        bad = bytearray(content)
        bad[at] ^= 1 << (at % 8)
        with pytest.raises(FormatError):
            lo.check_digest(bytes(bad), "x")


def test_seals_bind_the_header() -> None:
    """A frame of another object of the same session does not open in this one, even at the same LSN and length."""
    index = make_index([(Kind.WRITE, 0, 0, 4096, b"")])
    content = make_object(index, [b"a" * 4096])
    header = lo.decode_object_header(content, "x")
    other = header._replace(last_time_ns=header.last_time_ns + 1)
    forged = lo.encode_object_header(other) + content[lo.OBJECT_HEADER_BYTES :]
    with pytest.raises(FormatError, match="seal is broken"):
        object_index.decode_index(other, forged, KEYS, "x")
    with pytest.raises(FormatError, match="seal is broken"):
        raw_payload(forged)


def test_the_index_key_opens_no_payload_and_the_other_way_round() -> None:
    content = make_object(make_index([(Kind.WRITE, 0, 0, 4096, b"")]), [b"a" * 4096])
    swapped = lo.ObjectKeys(index=KEYS.payload, payload=KEYS.index)
    with pytest.raises(FormatError):
        object_index.decode_index(lo.decode_object_header(content, "x"), content, swapped, "x")
    with pytest.raises(FormatError):
        raw_payload(content, swapped)


def test_sessions_machines_and_epochs_have_their_own_keys() -> None:
    keys = {
        lo.derive_keys(b"i" * 32, b"p" * 32, machine, epoch, salt).payload
        for machine in (MACHINE, bytes(16))
        for epoch in (1, 2)
        for salt in (SALT, b"s" * 32)
    }
    assert len(keys) == 8


def test_a_decompression_bomb_is_not_inflated() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(256 << 20))
    with pytest.raises(FormatError, match="compressed size"):
        lo.unpack(bomb, 131072, "x")


def test_wrong_order_of_times_is_refused() -> None:
    index = make_index([(Kind.ZERO, 0, 0, 4096, b""), (Kind.ZERO, 0, 0, 4096, b"")])
    index.time_ns[:] = [5, 4]
    content = make_object(index, [])
    with pytest.raises(FormatError, match="contradict"):
        object_index.decode_index(lo.decode_object_header(content, "x"), content, KEYS, "x")


def test_payload_positions_must_be_where_the_payload_is() -> None:
    index = make_index([(Kind.WRITE, 0, 0, 4096, b""), (Kind.WRITE, 0, 4096, 4096, b"")])
    index.payload_position[:] = [4096, 0]
    content = make_object(index, [b"a" * 4096, b"b" * 4096])
    with pytest.raises(FormatError, match="contradict"):
        object_index.decode_index(lo.decode_object_header(content, "x"), content, KEYS, "x")


@settings(max_examples=300)
@given(st.binary(max_size=600))
def test_any_bytes_raise_only_format_errors(content: bytes) -> None:
    with pytest.raises(FormatError):
        lo.check_digest(lo.OBJECT_MAGIC + content, "x")


@settings(max_examples=200)
@given(st.data())
def test_a_header_with_a_right_checksum_and_wild_fields_is_refused_or_sound(data: st.DataObject) -> None:
    """Fuzz behind the checksum: a hostile host can compute it too."""
    fields = [
        data.draw(st.binary(min_size=16, max_size=16)),
        data.draw(st.integers(1, 2)), data.draw(st.integers(0, 2**32 - 1)),
        SALT, *(data.draw(st.sampled_from([0, 1, 2, 7, 2**32, 2**63, 2**64 - 1])) for _ in range(4)),
        SALT, data.draw(st.sampled_from([0, 1, 131072, 2**40, 2**64 - 1])),
        *(data.draw(st.sampled_from([0, 1, 17, 131072, 2**26, 2**32 - 1])) for _ in range(4)),
        data.draw(st.sampled_from([0, 1, 131088, 2**63])), data.draw(st.sampled_from([0, 1, 2**16, 2**16 + 1])),
    ]  # fmt: skip
    content = lo.encode_object_header(lo.ObjectHeader._make(fields))
    try:
        header = lo.decode_object_header(content, "x")
    except FormatError:
        return
    assert header.object_length <= lo.OBJECT_BYTES_MAX
    assert 0 < header.record_count <= lo.RECORDS_MAX
    assert header.is_stretch or not header.stretch_count
    with pytest.raises(FormatError):
        lo.check_digest(content + bytes(64), "x")


def test_frames_are_cut_evenly() -> None:
    with mock.patch.object(object_encoder, "FRAME_RAW_BYTES", 8):
        pieces = list(map(bytes, ObjectEncoder()._frames([b"a" * 10, b"b" * 25, b"", b"c" * 5])))
    assert [len(piece) for piece in pieces] == [8, 8, 8, 8, 8]
    assert b"".join(pieces) == b"a" * 10 + b"b" * 25 + b"c" * 5
    assert all(len(first) == 8 for first, _ in pairwise(pieces))


@given(sizes=st.lists(st.integers(0, 40), max_size=30), frame=st.integers(1, 24))
def test_frames_are_the_payloads_end_to_end(sizes: list[int], frame: int) -> None:
    payloads = [bytes([i]) * size for i, size in enumerate(sizes)]
    with mock.patch.object(object_encoder, "FRAME_RAW_BYTES", frame):
        frames = list(ObjectEncoder()._frames(payloads))
    assert b"".join(frames) == b"".join(payloads)
    assert all(len(each) == frame for each in frames[:-1])
    assert not frames or 0 < len(frames[-1]) <= frame


def test_memory_that_is_used_again_leaves_nothing_of_what_it_held() -> None:
    encoder, digests = ObjectEncoder(), []
    for _ in range(2):
        for payload in (b"x" * 300_000, random.Random(1).randbytes(200_000), b"y"):
            index = make_index([(Kind.WRITE, 0, 0, len(payload), b"")], 7)
            digest, content = encoder.encode(
                machine_id=MACHINE,
                epoch=1,
                session_salt=SALT,
                previous_digest=lo.NO_DIGEST,
                index=index,
                payloads=[payload],
                keys=KEYS,
            )
            assert lo.check_digest(content, "x") == digest
            assert raw_payload(bytes(content)) == payload
            assert bytes(content) == make_object(index, [payload]), "an object says the same wherever it was made"
            encoder.give_back(content)
            digests.append(digest)
    assert digests[:3] == digests[3:]
