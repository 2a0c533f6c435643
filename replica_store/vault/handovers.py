"""What planned failovers want of hosts, and what these have answered.

    asked ──▶ handed over at LSN n │ failed: the cause          both durable before the failover goes on
    cancelled, and nothing of it remains ──▶ the host is to take its machine back ──▶ it has

A host is asked to take its machine back only when nobody else runs it any more, and is told so in each session until it
says that it has (I6). What is asked for is sealed: no row alone has a host stop writing.
"""

from __future__ import annotations

import msgspec

from asrfs.errors import IntegrityError, NotFoundError, foreign_line
from asrfs.protocol.frames import ProtocolError
from asrfs.protocol.messages import HandedOver, Handover
from replica_store.vault.operations import (
    HandoverAsked,
    Operation,
    asking,
    change,
    operation,
    sealed_operation,
)
from replica_store.vault.vault import Vault


def wanted_of(found: Operation, now_ns: int) -> Handover | None:
    """What the host of its machine is to be told."""
    asked = found.handover
    if asked is None:
        return None
    if found.state == "preparing" and not asked.is_answered and now_ns < asked.until_ns:
        return Handover(id=found.id, wanted="hand-over", seconds_max=asked.seconds_max)
    if found.state == "cancelled" and not found.remains and not asked.is_back:
        return Handover(id=found.id, wanted="take-back")
    return None


def handovers_wanted(vault: Vault, now_ns: int) -> dict[str, Handover]:
    """By machine, of several failovers the oldest's. A row that nobody sealed wants nothing. Raises AsrfsError."""
    wanted: dict[str, Handover] = {}
    for found in asking(vault.catalog):
        if found.machine_id in wanted or wanted_of(found, now_ns) is None:
            continue
        try:
            word = wanted_of(sealed_operation(vault, found.id), now_ns)
        except IntegrityError:  # whoever acts on it is told so
            continue
        if word is not None:
            wanted[found.machine_id] = word
    return wanted


def note_answer(vault: Vault, machine_id: str, word: HandedOver, now_ns: int) -> None:
    """Write down what a host answered, durably, unless it says nothing new. Blocks.

    Raises ProtocolError for a host that speaks of another's failover, AsrfsError where it cannot be written.
    """
    try:
        found = operation(vault.catalog, word.id)
    except NotFoundError:
        return  # of a vault that this one is an older copy of
    if found.machine_id != machine_id or found.handover is None:
        raise ProtocolError(f"failover {word.id[:12]} asked nothing of this host")
    received_lsn = vault.received_lsn(machine_id)
    if answered(found, word, received_lsn, now_ns) != found:
        change(vault.root, found.id, lambda _, before: answered(before, word, received_lsn, now_ns))


def answered(before: Operation, word: HandedOver, received_lsn: int, now_ns: int) -> Operation:
    """The failover with the host's answer. PURE."""
    asked = before.handover
    assert asked is not None
    is_open = before.state == "preparing" and not asked.is_answered
    if word.outcome == "handed-over":
        return _handed_over(before, asked, word, received_lsn, now_ns) if is_open else before
    text = foreign_line(word.error) or "it took its machine back"
    if is_open:
        failed = msgspec.structs.replace(
            asked,
            error=f"its host says: {text}",
            is_back=True,
            chunks_compared=word.chunks_compared,
            chunks_different=word.chunks_different,
        )
        after = before.to(before.state, now_ns, f"the host did not hand the machine over: {text}")
        return msgspec.structs.replace(after, handover=failed)
    if asked.is_back or before.state == "committed":
        return before
    after = before.to(before.state, now_ns, "the host has taken its machine back")
    return msgspec.structs.replace(after, handover=msgspec.structs.replace(asked, is_back=True))


def _handed_over(
    before: Operation, asked: HandoverAsked, word: HandedOver, received_lsn: int, now_ns: int
) -> Operation:
    """What is claimed must be possible: records that are here, and a comparison that found nothing."""
    is_proven = 0 < word.lsn <= received_lsn and word.chunks_compared > 0 and word.chunks_different == 0
    if not is_proven:
        text = f"its host says that it handed over LSN {word.lsn}, and LSN {received_lsn} is here"
        after = before.to(before.state, now_ns, text)
        return msgspec.structs.replace(after, handover=msgspec.structs.replace(asked, error=text))
    handed = msgspec.structs.replace(asked, lsn=word.lsn, chunks_compared=word.chunks_compared)
    after = before.to(
        before.state, now_ns, f"the host handed over LSN {word.lsn}: {word.chunks_compared} chunks are equal"
    )
    return msgspec.structs.replace(after, handover=handed)
