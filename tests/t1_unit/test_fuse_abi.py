"""Layouts of the kernel's FUSE protocol: sizes and places as `linux/fuse.h` has them."""

from __future__ import annotations

import struct

from asrfs.fuse import abi


def init_request(flags: int, minor: int = 45) -> bytes:
    """What Linux sends at mounting: `fuse_in_header`, `fuse_init_in`."""
    body = struct.pack("<IIIII44x", 7, minor, 131072, flags & 0xFFFFFFFF, flags >> 32)
    return struct.pack("<IIQQIIIHH", 40 + len(body), 26, 2, 0, 0, 0, 0, 0, 0) + body


def test_sizes_of_the_layouts() -> None:
    assert abi.IN_HEADER.size == 40
    assert abi.OUT_HEADER.size == 16
    assert abi.WRITE_REPLY.size == 24
    assert abi.REQUEST.size <= abi.WRITE_HEADER_BYTES == 80
    attributes = abi.Attributes(2, 512, 0o100600, 1, 0)
    assert len(abi.encode_attributes(attributes)) == 104
    assert len(abi.encode_entry(attributes)) == 128
    assert len(abi.encode_open(1)) == 16
    assert len(abi.encode_statfs(4096, 1)) == 80


def test_init_agrees_on_both_words_of_flags() -> None:
    request = abi.decode_init(init_request(abi.INIT_EXT | abi.HAS_RESEND | abi.MAX_PAGES))
    assert request is not None
    assert (request.major, request.minor, request.max_readahead) == (7, 45, 131072)
    assert request.flags == abi.INIT_EXT | abi.HAS_RESEND | abi.MAX_PAGES
    reply = abi.encode_init(request, abi.HAS_RESEND | abi.INIT_EXT, max_background=128, congestion_threshold=96)
    assert len(reply) == 16 + 64
    assert struct.unpack_from("<IiQ", reply) == (80, 0, 2)
    fields = struct.unpack_from("<IIIIHHIIHHIIH", reply, 16)
    assert fields == (7, 40, 131072, 1 << 30, 128, 96, 1 << 20, 1, 256, 0, 1 << 7, 0, 0)


def test_second_word_of_flags_counts_only_where_it_is_announced() -> None:
    request = abi.decode_init(init_request(abi.HAS_RESEND | abi.MAX_PAGES, minor=31))
    assert request is not None
    assert request.flags == abi.MAX_PAGES
    reply = abi.encode_init(request, 0, max_background=1, congestion_threshold=1)
    assert struct.unpack_from("<II", reply, 16) == (7, 31)


def test_other_request_is_no_init() -> None:
    assert abi.decode_init(struct.pack("<IIQQIIIHH", 40, 3, 2, 1, 0, 0, 0, 0, 0)) is None


def test_errors_and_notifications() -> None:
    assert struct.unpack("<IiQ", abi.encode_error(9, 5)) == (16, -5, 9)
    assert struct.unpack("<IiQ", abi.encode_resend()) == (16, 7, 0)


def test_entries_of_a_directory_are_padded_and_cut_at_whole_ones() -> None:
    entries = [(1, 1, True, b"."), (2, 1, True, b".."), (3, 2, False, b"nine-long")]
    body = abi.encode_directory(entries, 0, 4096)
    assert len(body) == 32 + 32 + 40
    assert struct.unpack_from("<QQII", body, 64) == (2, 3, 9, 8)
    assert body[64 + 24 :] == b"nine-long".ljust(16, b"\0")
    assert abi.encode_directory(entries, 0, 71) == body[:64]
    assert abi.encode_directory(entries, 2, 4096) == body[64:]
    assert abi.encode_directory(entries, 3, 4096) == b""
