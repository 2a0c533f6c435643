"""What host and store say to each other. Fields are checked for type by the decoder, for sense by the receiver."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from asrfs.errors import FOREIGN_CHARACTERS_MAX
from asrfs.format.seed_file import CHUNK_DIGEST_BYTES
from asrfs.model.boot import BOOT_BYTES_MAX
from asrfs.model.configuration import ADDRESS_CHARACTERS_MAX, PORT_MAX, HostConfiguration
from asrfs.model.digest_tree import REGION_LEAVES_BYTES_MAX, REGION_NODES_MAX, TREE_DIGEST_BYTES, Region
from asrfs.model.extents import CHUNK_BYTES
from asrfs.model.machine import SLOT_MAX, DiskRecord
from asrfs.model.names import NAME_BYTES_MAX
from asrfs.model.quantities import FILE_BYTES_MAX, SECTOR_BYTES
from asrfs.protocol.frames import Bytes, FrameType, ProtocolError

PROTOCOL_VERSION = 1
OBJECT_CHUNK_BYTES = 1 << 20
COMPARES_MAX = 64
"""Of one session, unanswered: no store allows more."""
MATCHES_MAX = 16
"""Of one session, unanswered."""
MATCH_CHUNKS_MAX = 8192
"""Of one MATCH: bounds what answering it costs."""
OMITTED_BYTES_MAX = 128
"""Bits for so many frames that may be left out of a log object: bounds what completing one costs."""
HANDOVER_S_MAX = 7 * 24 * 3600
FETCHES_MAX = 4
"""Of one session, unanswered."""
FETCHED_BYTES_MAX = 512 << 10
FETCHED_EXTENTS_MAX = 4096

Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
"""LSNs and times: what the store's catalog can hold. The peer's word goes there, so the decoder takes no other."""
Chunk = Annotated[int, msgspec.Meta(ge=0, le=FILE_BYTES_MAX // CHUNK_BYTES)]
Port = Annotated[int, msgspec.Meta(ge=0, le=PORT_MAX)]
Address = Annotated[str, msgspec.Meta(max_length=ADDRESS_CHARACTERS_MAX)]
RefusalCode = Literal["authentication", "fenced", "diverged", "state", "corrupt", "space", "busy", "seed"]


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """Host's first word. `acknowledged_lsn`, `last_digest`: what it holds for acknowledged; the digest may be empty.

    `takes_configuration`: it knows CONFIGURE; a host of before that would end the session. `group_port` 0: it listens
    to no group; `group_address` empty: others reach it at the address this connection comes from. `rejoin`: it shares
    no history with the store any more and wants to go on in a new epoch, above `epoch`, whatever each of them has;
    `order` says that two such HELLOs want the same. `takes_handover`: it knows HANDOVER; `takes_promotion`: it knows
    PROMOTE. `tail_lsn` other than 0: it knows that it was superseded, and offers its records of `epoch` up to there,
    behind those that are acknowledged.
    """

    protocol: int
    machine_id: str
    machine_name: str
    epoch: int
    appended_lsn: Number
    durable_lsn: Number
    acknowledged_lsn: Number
    last_digest: str
    takes_configuration: bool = False
    group_port: Port = 0
    group_address: Address = ""
    rejoin: bool = False
    order: Annotated[str, msgspec.Meta(max_length=32)] = ""
    takes_handover: bool = False
    takes_promotion: bool = False
    tail_lsn: Number = 0


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    """Store's answer. The host goes on at `acknowledged_lsn + 1`, sealing with keys derived from `session_salt`.

    `acknowledged_time_ns`: time of record `acknowledged_lsn`, 0 for none. The host compares it with that of its own.
    `takes_stretches`: it knows log objects of version 2; a store of before that would call one damaged.
    `compares`: how many COMPAREs may be unanswered at once; 0: it cannot compare, and would end the session.
    `takes_matches`: it knows MATCH, and log objects that come without frames of which it has the content.
    `epoch` is higher than the host's only for one that rejoins, and lower only where the store was set back.
    `disks`: to who rejoins, those that the history has now. `takes_fetches`: it knows FETCH. `is_tail`: what the host
    offered is wanted, behind `acknowledged_lsn`; it is kept beside the history, as a tail, and the session ends by
    REFUSED.
    """

    protocol: int
    store_id: str
    session_salt: bytes
    epoch: int
    acknowledged_lsn: Number
    acknowledged_time_ns: Number
    last_digest: str
    takes_stretches: bool = False
    compares: Annotated[int, msgspec.Meta(ge=0, le=COMPARES_MAX)] = 0
    takes_matches: bool = False
    disks: tuple[DiskRecord, ...] = ()
    takes_fetches: bool = False
    is_tail: bool = False


class KeptTail(msgspec.Struct, frozen=True, kw_only=True):
    """The store has all of a host's tail, the last record of which is `lsn` of `time_ns`. `is_point`: it is listed."""

    lsn: Number
    time_ns: Number
    is_point: bool = False


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """Store ends the session. `text` is one line for people. `tail`: of a host that offered one, if it is kept."""

    code: RefusalCode
    text: str
    tail: KeptTail | None = None


class ObjectBegin(msgspec.Struct, frozen=True, kw_only=True):
    """A log object follows in OBJECT_BYTES frames, `length` bytes of it.

    `omitted`: bit n is set for each frame n that is left out, because a MATCHED said that the store has the chunks in
    it; `level`: of zstd for the frames, None where they are not packed.
    """

    first_lsn: Number
    last_lsn: Number
    length: int
    omitted: Annotated[bytes, msgspec.Meta(max_length=OMITTED_BYTES_MAX)] = b""
    level: Annotated[int, msgspec.Meta(ge=-100, le=22)] | None = None


class Acknowledge(msgspec.Struct, frozen=True, kw_only=True):
    """Every record up to `lsn` is durable at the store (I3)."""

    lsn: Number
    digest: str


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """Sent by both sides when nothing else is. The host's positions tell the store how far behind it is."""

    appended_lsn: Number = 0
    durable_lsn: Number = 0
    durable_time_ns: Number = 0


class Goodbye(msgspec.Struct, frozen=True, kw_only=True):
    """The host ends the session on purpose."""

    reason: str


class Configure(msgspec.Struct, frozen=True, kw_only=True):
    """The store says what it wants of the host: all of it, in place of what it said before."""

    configuration: HostConfiguration


class Compare(msgspec.Struct, frozen=True, kw_only=True):
    """The host asks which nodes of a region of a disk differ from what the store has of it (`model/digest_tree.py`).

    `digests`: of the nodes from node `first` on of the disk of `size_bytes` in `slot`, incarnation `disk_id`. `lsn`: as
    the disk was there; 0: as it is at the newest record received. `number` comes back in the answer.
    """

    number: Number
    slot: Annotated[int, msgspec.Meta(ge=0, le=SLOT_MAX)]
    disk_id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    size_bytes: Annotated[int, msgspec.Meta(ge=1, le=FILE_BYTES_MAX)]
    first: Number
    digests: Annotated[
        bytes, msgspec.Meta(min_length=TREE_DIGEST_BYTES, max_length=REGION_NODES_MAX * TREE_DIGEST_BYTES)
    ]
    lsn: Number = 0
    by_kept: bool = False


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """Store's answer: as of record `lsn`, `differs` has a bit for each node that differs, and `leaves` the digests of
    all leaves of those nodes.

    `exit_code` other than 0: there is no answer, `text` says why.
    """

    number: Number
    lsn: Number = 0
    differs: Annotated[bytes, msgspec.Meta(max_length=-(-REGION_NODES_MAX // 8))] = b""
    leaves: Annotated[bytes, msgspec.Meta(max_length=REGION_LEAVES_BYTES_MAX)] = b""
    exit_code: Annotated[int, msgspec.Meta(ge=0, le=6)] = 0
    text: Annotated[str, msgspec.Meta(max_length=FOREIGN_CHARACTERS_MAX)] = ""


class ChunksOfDisk(msgspec.Struct, frozen=True, kw_only=True):
    """Chunks of 64 KiB of the machine's disk `name`: runs of `(first, count)`, and the digest of each
    (`format/seed_file.py`), one after the other."""

    name: Annotated[str, msgspec.Meta(max_length=NAME_BYTES_MAX)]
    runs: Annotated[tuple[tuple[Chunk, Chunk], ...], msgspec.Meta(max_length=MATCH_CHUNKS_MAX)]
    digests: Annotated[bytes, msgspec.Meta(max_length=MATCH_CHUNKS_MAX * CHUNK_DIGEST_BYTES)]


class Match(msgspec.Struct, frozen=True, kw_only=True):
    """The host asks which of these chunks the store has in a seed. `number` comes back in the answer."""

    number: Number
    disks: Annotated[tuple[ChunksOfDisk, ...], msgspec.Meta(min_length=1, max_length=SLOT_MAX)]


class Matched(msgspec.Struct, frozen=True, kw_only=True):
    """Store's answer: for each disk that was asked about, bit n is set if the store has its nth chunk; empty: there is
    no seed of that disk."""

    number: Number
    equal: tuple[Annotated[bytes, msgspec.Meta(max_length=MATCH_CHUNKS_MAX // 8)], ...]


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """A planned failover asks the host to hand the machine over, or to take it back.

    `id`: of the failover. `wanted`: `hand-over`: fence the disks, bring everything to the store, compare, answer;
    `take-back`: write again, if the disks are fenced for this failover. `seconds_max`: who has not handed over by then
    gives it up. Said again until it is answered, in each session.
    """

    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    wanted: Literal["hand-over", "take-back"]
    seconds_max: Annotated[int, msgspec.Meta(ge=0, le=HANDOVER_S_MAX)] = 0


class HandedOver(msgspec.Struct, frozen=True, kw_only=True):
    """Host's answer. `outcome` `handed-over`: no guest has written behind record `lsn`, none can until the store says
    `take-back`, and the store's disks at that record are the host's: of so many chunks none differs.

    `failed`: it is fenced no more, or never was, and `error` says why; `taken-back`: it is fenced for this failover no
    more.
    """

    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    outcome: Literal["handed-over", "failed", "taken-back"]
    lsn: Number = 0
    chunks_compared: Number = 0
    chunks_different: Number = 0
    error: Annotated[str, msgspec.Meta(max_length=FOREIGN_CHARACTERS_MAX)] = ""


Extent = tuple[Number, Annotated[int, msgspec.Meta(ge=1, le=FILE_BYTES_MAX)]]
"""Offset and length in bytes."""


class Promote(msgspec.Struct, frozen=True, kw_only=True):
    """A point is to be copied back over the disks of the machine that runs on this host.

    `id`: of the promotion. `wanted`: `prepare`: see that nobody uses the disks, let nobody write to them, make a point
    of what they are, answer; `write`: bring them to record `lsn` of the history, by FETCH, as records behind it;
    `release`: let guests use them again; `take-back`: the same, of disks that nothing was written to. Said again in
    each session until it is answered.

    `disks`: those that are written, as they were at that record; `left`: slots of those that stay as they are. `boot`:
    the document that holds there for the machine, None where it stays as it is. `attempt`: of `write`, raised only when
    the host has said that nothing was written for the one before; 0 from a store that does not count.
    """

    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    wanted: Literal["prepare", "write", "release", "take-back"]
    lsn: Number = 0
    disks: Annotated[tuple[DiskRecord, ...], msgspec.Meta(max_length=SLOT_MAX)] = ()
    left: Annotated[tuple[int, ...], msgspec.Meta(max_length=SLOT_MAX)] = ()
    boot: Annotated[bytes, msgspec.Meta(max_length=BOOT_BYTES_MAX)] | None = None
    attempt: Number = 0


class Promoted(msgspec.Struct, frozen=True, kw_only=True):
    """Host's answer. `outcome` `ready`: nobody writes behind record `lsn`, which the store has, and which is a point;
    `written`: at record `lsn`, which the store has, the disks are what they were at the point; `released` and
    `taken-back`: guests may use them.

    `failed`: it could not, and `error` says why, `exit_code` of which kind. Of `prepare`, nothing has changed. Of
    `write`, something may have been written, and the host tries it again; no `error` says that it goes on. With an
    `attempt`, nothing was written up to that one, and nothing is before there is another.
    """

    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    outcome: Literal["ready", "written", "released", "taken-back", "failed"]
    lsn: Number = 0
    bytes_written: Number = 0
    exit_code: Annotated[int, msgspec.Meta(ge=0, le=6)] = 0
    error: Annotated[str, msgspec.Meta(max_length=FOREIGN_CHARACTERS_MAX)] = ""
    attempt: Number = 0


class Fetch(msgspec.Struct, frozen=True, kw_only=True):
    """The host asks, of the disk in `slot` with `size_bytes`, incarnation `disk_id`, for the content at record `lsn` of
    what was written behind that record, from byte `offset` on. `number` comes back in the answer."""

    number: Number
    slot: Annotated[int, msgspec.Meta(ge=0, le=SLOT_MAX)]
    disk_id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    size_bytes: Annotated[int, msgspec.Meta(ge=1, le=FILE_BYTES_MAX)]
    lsn: Number
    offset: Number


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """Store's answer: the bytes of `extents`, one after the other, in `content`, and `zeros`, all in `[offset, next)`.
    Nothing else there was written; `next` is where to go on, or the disk's size. `total`: bytes that there are in all.

    `exit_code` other than 0: there is no answer, `text` says why.
    """

    number: Number
    next: Number = 0
    extents: Annotated[tuple[Extent, ...], msgspec.Meta(max_length=FETCHED_EXTENTS_MAX)] = ()
    zeros: Annotated[tuple[Extent, ...], msgspec.Meta(max_length=FETCHED_EXTENTS_MAX)] = ()
    content: Annotated[bytes, msgspec.Meta(max_length=FETCHED_BYTES_MAX)] = b""
    total: Number = 0
    exit_code: Annotated[int, msgspec.Meta(ge=0, le=6)] = 0
    text: Annotated[str, msgspec.Meta(max_length=FOREIGN_CHARACTERS_MAX)] = ""


Message = (
    Hello
    | Welcome
    | Refused
    | ObjectBegin
    | Acknowledge
    | Heartbeat
    | Goodbye
    | Configure
    | Compare
    | Compared
    | Match
    | Matched
    | Handover
    | HandedOver
    | Promote
    | Promoted
    | Fetch
    | Fetched
)

TYPE_OF: dict[type[msgspec.Struct], FrameType] = {
    Hello: FrameType.HELLO,
    Welcome: FrameType.WELCOME,
    Refused: FrameType.REFUSED,
    ObjectBegin: FrameType.OBJECT_BEGIN,
    Acknowledge: FrameType.ACKNOWLEDGE,
    Heartbeat: FrameType.HEARTBEAT,
    Goodbye: FrameType.GOODBYE,
    Configure: FrameType.CONFIGURE,
    Compare: FrameType.COMPARE,
    Compared: FrameType.COMPARED,
    Match: FrameType.MATCH,
    Matched: FrameType.MATCHED,
    Handover: FrameType.HANDOVER,
    HandedOver: FrameType.HANDED_OVER,
    Promote: FrameType.PROMOTE,
    Promoted: FrameType.PROMOTED,
    Fetch: FrameType.FETCH,
    Fetched: FrameType.FETCHED,
}
_DECODERS: dict[FrameType, msgspec.msgpack.Decoder[Any]] = {
    frame_type: msgspec.msgpack.Decoder(cls) for cls, frame_type in TYPE_OF.items()
}
_encoder = msgspec.msgpack.Encoder()


def region_of(compare: Compare) -> Region:
    """What a COMPARE asks about. Raises ProtocolError for what no disk has."""
    region = Region(compare.size_bytes, compare.first, len(compare.digests) // TREE_DIGEST_BYTES)
    if compare.size_bytes % SECTOR_BYTES or len(compare.digests) % TREE_DIGEST_BYTES or not region.is_possible():
        raise ProtocolError(f"no disk of {compare.size_bytes} bytes has {region.nodes} nodes from {region.first} on")
    return region


def check_match(match: Match) -> None:
    """Raise ProtocolError unless each chunk has a digest, and there are not too many."""
    total = 0
    for disk in match.disks:
        chunks = sum(count for _, count in disk.runs)
        total += chunks
        is_sound = bool(disk.runs) and all(count for _, count in disk.runs) and total <= MATCH_CHUNKS_MAX
        if not is_sound or len(disk.digests) != chunks * CHUNK_DIGEST_BYTES:
            raise ProtocolError(f"{len(disk.digests)} bytes of digests came for {chunks} chunks of a disk")


def check_fetched(answer: Fetched, asked: Fetch) -> None:
    """Raise ProtocolError unless the answer has what was asked for: extents in order, inside it, with their bytes."""
    if answer.exit_code:
        return
    end = 0
    is_sound = asked.offset < answer.next <= asked.size_bytes
    is_sound &= sum(length for _, length in answer.extents) == len(answer.content)
    for offset, length in sorted((*answer.extents, *answer.zeros)):
        is_sound &= max(end, asked.offset) <= offset and not (offset | length) % SECTOR_BYTES
        end = offset + length
    if not is_sound or end > answer.next:
        raise ProtocolError(f"the store gave {len(answer.content)} bytes for no extents that could be of that disk")


def encode_message(message: Message) -> bytes:
    return _encoder.encode(message)


def decode_message(frame_type: FrameType, payload: Bytes) -> Message:
    """Raises ProtocolError for bytes that are not a message of that type."""
    try:
        message: Message = _DECODERS[frame_type].decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"a {frame_type.name} message cannot be read: {error}") from None
    return message
