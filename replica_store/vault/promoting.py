"""What promotions want of hosts, and what their answers make of them.

A host hears `write` only when all of the promotion are ready, `release` only when all have written, and `take-back`
only as long as none was told to write, or all have said that they could not begin to.
"""

from __future__ import annotations

import msgspec

from asrfs.errors import IntegrityError, NotFoundError, RefusedError, foreign_line
from asrfs.protocol.frames import ProtocolError
from asrfs.protocol.messages import Promote, Promoted
from replica_store.vault.promotions import (
    PromotedMachine,
    Promotion,
    change_promotion,
    promotion,
    promotions,
    put_promotion,
    sealed_promotion,
    sealed_promotions,
)
from replica_store.vault.vault import Vault

TIME_IS_UP = "not all hosts were ready in time"


def wanted_of(found: Promotion, member: PromotedMachine) -> Promote | None:
    """What the host of one of its machines is to be told. PURE."""
    if member.is_back:
        return None
    if found.state == "cancelled":
        return Promote(id=found.id, wanted="take-back")
    if found.state in ("releasing", "done"):
        return Promote(id=found.id, wanted="release")
    return Promote(
        id=found.id,
        wanted="prepare" if found.state == "preparing" else "write",
        lsn=member.point.lsn,
        disks=member.records,
        left=member.left,
        boot=member.boot,
    )


def promotions_wanted(vault: Vault, now_ns: int) -> dict[str, Promote]:
    """By machine, of several the oldest's; but one to take back waits behind what is wanted since, which a host whose
    disks are partly written can obey, and to take back it cannot. Those whose time is up are cancelled. A row that
    nobody sealed wants nothing. Raises AsrfsError."""
    wanted: dict[str, Promote] = {}
    for row in promotions(vault.catalog, live=True):
        try:
            found = sealed_promotion(vault, row.id)
        except IntegrityError:  # whoever acts on it is told so
            continue
        if found.state == "preparing" and now_ns >= found.until_ns:
            found = change_promotion(vault.root, found.id, lambda before: expired(before, now_ns))
        for member in found.machines:
            word = wanted_of(found, member)
            older = wanted.get(member.machine_id)
            if word is not None and (older is None or older.wanted == "take-back"):
                wanted[member.machine_id] = word
    return wanted


def begin_attempt(vault: Vault, machine_id: str, promotion_id: str) -> int | None:
    """Note, durably, that a host is told to write now. The number of the attempt, that of before if it has no answer;
    None if it is not to be told. Blocks. Raises AsrfsError."""

    def told(found: Promotion) -> PromotedMachine | None:
        member = found.member(machine_id)
        return None if found.state != "writing" or member is None or member.is_back else member

    def note(before: Promotion) -> Promotion:
        member = told(before)
        if member is None or not member.is_untouched:
            return before
        return before.with_member(msgspec.structs.replace(member, attempt=member.attempt + 1))

    member = told(promotion(vault.catalog, promotion_id))
    if member is not None and member.is_untouched:
        member = told(change_promotion(vault.root, promotion_id, note))
    return None if member is None else member.attempt


def expired(before: Promotion, now_ns: int) -> Promotion:
    """PURE."""
    is_due = before.state == "preparing" and now_ns >= before.until_ns
    return before.to("cancelled", now_ns, TIME_IS_UP) if is_due else before


def note_answer(vault: Vault, machine_id: str, word: Promoted, now_ns: int) -> None:
    """Write down what a host answered, durably, unless it says nothing new. Blocks.

    Raises ProtocolError for a host that speaks of another's, AsrfsError where it cannot be written.
    """
    try:
        found = promotion(vault.catalog, word.id)
    except NotFoundError:
        return  # of a vault that this one is an older copy of
    if found.member(machine_id) is None:
        raise ProtocolError(f"promotion {word.id[:12]} asked nothing of this host")
    row = vault.catalog.machine_by_id(machine_id)
    epoch, received_lsn = 0 if row is None else row.epoch, vault.received_lsn(machine_id)

    def note(before: Promotion) -> Promotion:
        return answered(before, machine_id, word, received_lsn, now_ns, epoch)

    if note(found) != found:
        change_promotion(vault.root, found.id, note)


def answered(
    before: Promotion, machine_id: str, word: Promoted, received_lsn: int, now_ns: int, epoch: int = 0
) -> Promotion:
    """With an answer of a host whose machine is in that epoch; gone on where that was the last it waited for. PURE."""
    member = before.member(machine_id)
    assert member is not None
    if word.outcome in ("ready", "written") and not 0 < word.lsn <= received_lsn:
        text = f"its host speaks of LSN {word.lsn}, and LSN {received_lsn} is here"
        word = Promoted(id=word.id, outcome="failed", exit_code=IntegrityError.exit_code, error=text)
    if before.state == "preparing":
        return _while_preparing(before, member, word, now_ns, epoch)
    if before.state == "writing":
        return _while_writing(before, member, word, now_ns)
    if word.outcome in ("released", "taken-back") and not member.is_back:
        after = before.with_member(msgspec.structs.replace(member, is_back=True))
        if before.state == "releasing" and all(each.is_back for each in after.machines):
            return after.to("done", now_ns, "guests may use the disks")
        return after
    return before


def without(before: Promotion, machine_id: str, now_ns: int, text: str) -> Promotion:
    """The promotion gone on without one of its machines, which runs elsewhere from now on. PURE."""
    member = before.member(machine_id)
    if member is None or member.is_back or before.is_over:
        return before
    gone = msgspec.structs.replace(member, is_back=True, has_left=True, error=text, exit_code=RefusedError.exit_code)
    after = before.with_member(gone)
    left = [each for each in after.machines if not each.is_back]
    cause = f"machine {member.machine}: {text}"
    if before.state == "preparing" or (before.state == "writing" and not left):
        return after.to("cancelled", now_ns, cause)
    if before.state == "writing":
        return _releasing(after, now_ns) if _have_written(after) else after.to("writing", now_ns, cause)
    return after.to("done", now_ns, cause) if before.state == "releasing" and not left else after


def leave_promotions(vault: Vault, machine_id: str, now_ns: int, text: str) -> None:
    """A machine goes on elsewhere, so its host is asked nothing more. Inside a transaction, behind the lock of
    descriptions."""
    # By their objects: a row that cannot be, of whichever promotion, must not keep this one, and a rebuild brings back
    # what the objects say.
    for found in sealed_promotions(vault.objects, vault.sealer)[0]:
        if (after := without(found, machine_id, now_ns, text)) != found:
            put_promotion(vault, after)


def _have_written(found: Promotion) -> bool:
    return all(each.end_lsn is not None or each.is_back for each in found.machines)


def _releasing(found: Promotion, now_ns: int) -> Promotion:
    return found.to("releasing", now_ns, "all disks are what they were at the point")


def _while_preparing(before: Promotion, member: PromotedMachine, word: Promoted, now_ns: int, epoch: int) -> Promotion:
    change = msgspec.structs.replace
    if word.outcome == "ready":
        if member.before_lsn is not None:
            return before
        after = before.with_member(change(member, before_lsn=word.lsn, epoch=epoch))
        if any(each.before_lsn is None for each in after.machines):
            return after
        ready = tuple(change(each, untouched=0) for each in after.machines)
        return change(after, machines=ready).to(
            "writing", now_ns, "nobody uses the disks, and what they are is a point"
        )
    if word.outcome in ("failed", "taken-back"):
        error = foreign_line(word.error) or "it took its machine back"
        failed = change(member, error=error, exit_code=word.exit_code or 1, is_back=True)
        return before.with_member(failed).to("cancelled", now_ns, f"machine {member.machine}: {error}")
    return before


def _while_writing(before: Promotion, member: PromotedMachine, word: Promoted, now_ns: int) -> Promotion:
    change = msgspec.structs.replace
    if member.is_back or member.end_lsn is not None:
        return before
    if word.outcome == "written":
        written = change(member, end_lsn=word.lsn, bytes_written=word.bytes_written, error=None, exit_code=0)
        after = before.with_member(written)
        return _releasing(after, now_ns) if _have_written(after) else after
    if word.outcome == "failed":
        error = foreign_line(word.error) or None
        untouched = word.attempt if word.attempt and word.attempt == member.attempt else member.untouched
        code = 0 if error is None else word.exit_code or 1
        return before.with_member(change(member, error=error, exit_code=code, untouched=untouched))
    return before
