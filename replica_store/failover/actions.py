"""What a person can ask of a failover. Each is durable before it is reported, and may be asked again after any death.

    test       preparing ─▶ serving ─▶ cleaned            beside the machine, whose state it does not touch
    unplanned  preparing ─▶ commit-pending ─▶ committed   the machine is failed-over, then committed
                   ▲  change-point │ cancel ─▶ cancelled
    planned    asked, handed over or cancelled, then as unplanned at what was handed over
    failback   as planned, of a machine that came here from where it was failed over to

A state is written down before what it means is done, where that takes something away (cancelled, cleaned), and after,
where it promises something (serving, commit-pending, committed). What an ended one left is marked by `remains`; whoever
comes next takes it away.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import time
from collections.abc import Callable

import msgspec

from asrfs.errors import AsrfsError, BadInputError, RefusedError
from asrfs.model.clock import Clock
from asrfs.model.protection_states import ProtectionEvent
from asrfs.model.quantities import NS_PER_SECOND, format_duration, format_size
from asrfs.protocol.messages import HANDOVER_S_MAX
from replica_store.failover import handing_over, leaving, mounts, network, places, processes, undoing
from replica_store.failover.choice import (
    RESERVE_BYTES,
    Chosen,
    check_in_history,
    check_may_begin,
    check_space,
    choose,
    free_bytes,
)
from replica_store.failover.due import cause_to_end
from replica_store.failover.preparation import Stopwatch, Told, bring_back, prepare
from replica_store.failover.wanted import Wanted, is_same
from replica_store.vault.epochs import raise_epoch
from replica_store.vault.operations import (
    ENDED,
    HANDED_OVER,
    Kind,
    Operation,
    OperationState,
    Step,
    begin,
    change,
    holder,
    operations,
    sealed_operation,
)
from replica_store.vault.promoting import leave_promotions
from replica_store.vault.protection import check_event
from replica_store.vault.returning import close_side
from replica_store.vault.vault import Vault, lock_descriptions

TTL_S_MAX = 366 * 24 * 3600.0
SPACE_LIMIT_MIN = 64 << 20
"""Less than the journal of a machine that does nothing."""
_LOCK_S_MAX = 10.0


class Failovers:
    """The failovers of the vault at `root`. `told`: called with the name of each step before it begins; `begun_s`: how
    long ago the command began that is carried out. `seconds_max`: from now on, for making a machine ready; what is not
    ready by then is taken back."""

    def __init__(
        self,
        root: str,
        clock: Clock,
        told: Told = lambda step: None,
        begun_s: float = 0.0,
        seconds_max: float = math.inf,
    ) -> None:
        self._root = os.path.abspath(root)
        self._clock = clock
        self._told = told
        self._begun_s = begun_s
        self._until = time.monotonic() + seconds_max

    # ---- beginning --------------------------------------------------------------------------------------------

    def test(self, wanted: Wanted) -> Operation:
        """A recovered machine beside the protected one, isolated, with an end. Raises AsrfsError; then nothing is
        left."""
        if not 0 < wanted.ttl_s <= TTL_S_MAX:
            raise BadInputError("--ttl is more than nothing and at most 366 days")
        limit = wanted.space_limit_bytes
        if limit is not None and limit < SPACE_LIMIT_MIN:
            raise BadInputError(f"--space-limit is at least {format_size(SPACE_LIMIT_MIN)}")
        return self._begin("test", wanted)

    def unplanned(self, wanted: Wanted) -> Operation:
        """The machine goes on from a point, commit pending. One that died while it began is carried on with."""
        return self._begin_or_resume("unplanned", wanted)

    def planned(self, wanted: Wanted) -> Operation:
        """The machine goes on from what its host hands over, commit pending, and nothing is lost. One that died while
        it began is carried on with. Raises AsrfsError; then the host has its machine again, or will."""
        return self._hand_over("planned", wanted)

    def failback(self, wanted: Wanted) -> Operation:
        """The same for a machine that runs at the other site since it was failed over, and comes home. Raises
        RefusedError for one that runs at home."""
        return self._hand_over("failback", wanted)

    def _hand_over(self, kind: Kind, wanted: Wanted) -> Operation:
        if wanted.selector != "latest":
            raise BadInputError("a planned failover goes to `--point latest`: it loses nothing")
        if not 0 < wanted.handover_s <= HANDOVER_S_MAX:
            raise BadInputError(f"--timeout is more than nothing and at most {format_duration(HANDOVER_S_MAX)}")
        return self._begin_or_resume(kind, wanted)

    def _begin_or_resume(self, kind: Kind, wanted: Wanted) -> Operation:
        with Vault.open(self._root) as vault:
            holding = holder(operations(vault.catalog, vault.machine(wanted.machine).id))
        if holding is not None and is_same(holding, kind, wanted):
            return self.resume(holding.id)
        return self._begin(kind, wanted)

    def _begin(self, kind: Kind, wanted: Wanted) -> Operation:
        watch = Stopwatch(self._told, [Step("start", self._begun_s)])
        operation_id = secrets.token_hex(16)
        with watch.step("resolve"):
            namespace = network.namespace_of(operation_id) if kind == "test" else None
            where = places.choose_places(self._root, operation_id, wanted.state, wanted.mount, namespace)
            with Vault.open(self._root) as vault:
                chosen = choose(vault, wanted.machine, wanted.selector, accept_damage=wanted.accept_damage)
                if kind != "test":
                    check_in_history(chosen)
                self._check_room(vault, kind, chosen, wanted, where.state)
                check_may_begin(vault, kind, wanted.machine)
            if kind in HANDED_OVER:
                handing_over.check_present(self._root, wanted.machine, self._clock)
        now_ns = self._clock.time_ns()
        made = Operation(
            id=operation_id,
            machine_id=chosen.machine.id,
            machine=chosen.machine.name,
            kind=kind,
            state="preparing",
            point=chosen.point,
            places=where,
            begun_ns=now_ns,
            expires_ns=now_ns + int(wanted.ttl_s * NS_PER_SECOND) if kind == "test" else None,
            space_limit_bytes=wanted.space_limit_bytes,
            check_command=wanted.check_command,
            data_loss_s=chosen.data_loss_s,
            disks=chosen.disk_names,
            warnings=chosen.warnings,
            handover=handing_over.asked(self._clock, wanted.handover_s) if kind in HANDED_OVER else None,
            boots=wanted.boots,
            plan=wanted.plan,
        ).to("preparing", now_ns, f"{kind} failover to {wanted.selector} was asked for")

        def check(vault: Vault) -> Operation:
            others = operations(vault.catalog)
            places.check_not_taken(where, others)
            check_may_begin(vault, kind, wanted.machine)
            return made

        with places.take_lock(where):
            try:
                begun = begin(self._root, check)
            except BaseException:
                shutil.rmtree(where.directory, ignore_errors=True)
                raise
            try:
                if kind in HANDED_OVER:
                    begun, chosen = self._take_over(begun, watch)
                return self._prepare(begun, chosen, watch)
            except BaseException as error:
                self._give_up(begun, error)
                raise

    def _take_over(self, begun: Operation, watch: Stopwatch) -> tuple[Operation, Chosen]:
        """Wait for what the host hands over; that is what is gone on from."""
        with watch.step("handover"):
            found = handing_over.wait_answer(self._root, begun.id, self._clock)
        assert found.handover is not None and found.handover.lsn is not None
        with watch.step("point"), Vault.open(self._root) as vault:
            chosen = choose(vault, found.machine, f"lsn:{found.handover.lsn}", accept_damage=True)

        def use(vault: Vault, before: Operation) -> Operation:
            if before.state != "preparing" or before.handover is None:
                raise RefusedError(f"failover {before.id[:12]} is {before.state} meanwhile")
            return msgspec.structs.replace(
                before,
                point=msgspec.structs.replace(chosen.point, selector=before.point.selector),
                disks=chosen.disk_names,
                warnings=chosen.warnings,
                data_loss_s=0.0,
                handover=msgspec.structs.replace(before.handover, is_used=True, epoch=chosen.point.epoch),
            )

        return change(self._root, begun.id, use), chosen

    def _check_room(self, vault: Vault, kind: Kind, chosen: Chosen, wanted: Wanted, directory: str) -> None:
        if kind != "test":
            check_space(vault, chosen, directory)
            return
        needed = max(wanted.space_limit_bytes or 0, RESERVE_BYTES)
        if (free := free_bytes(directory)) < needed:
            raise RefusedError(
                f"{directory} has {format_size(free)} free, and {format_size(needed)} are needed: make space or choose "
                "another place with --state"
            )

    def _prepare(self, begun: Operation, chosen: Chosen, watch: Stopwatch) -> Operation:
        is_test = begun.kind == "test"
        epoch = chosen.machine.epoch if is_test else chosen.machine.epoch + 1
        with processes.within(self._until - time.monotonic()), processes.giving_way(is_test):
            ready = prepare(self._root, begun, chosen, epoch, watch, examined=is_test)
        state: OperationState = "serving" if is_test else "commit-pending"
        self._told("report")

        def finish(vault: Vault, before: Operation) -> Operation:
            if before.state != "preparing":
                raise RefusedError(f"failover {begun.id[:12]} is {before.state} meanwhile")
            text = f"it serves LSN {begun.point.lsn}, {sum(step.seconds for step in ready.steps):.2f} s after"
            return msgspec.structs.replace(
                before.to(state, self._clock.time_ns(), text),
                steps=ready.steps,
                rto_s=ready.rto_s,
                examined=ready.examined,
                checked=ready.checked,
                booted=ready.booted,
            )

        return change(self._root, begun.id, finish)

    def _give_up(self, begun: Operation, error: BaseException) -> None:
        """What could not be prepared is taken back. What cannot be taken back now is, by whoever comes next."""
        ended: OperationState = "cleaned" if begun.kind == "test" else "cancelled"
        try:
            now, text = self._clock.time_ns(), str(error) or type(error).__name__
            after = change(self._root, begun.id, lambda vault, before: before.to(ended, now, f"it failed: {text}"))
            undoing.tidy(self._root, after)
        except (AsrfsError, OSError):
            return

    # ---- going on ---------------------------------------------------------------------------------------------

    def resume(self, text: str) -> Operation:
        """Carry on with one that was interrupted, or start again what a ready one lacks, as after a restart."""
        found = self._find(text)
        with places.take_lock_of(found):
            found = self._find(found.id)
            if found.state in ENDED:
                return undoing.tidy(self._root, found) if found.remains else found
            if found.state == "returned":
                raise RefusedError(f"failover {found.id[:12]} is returned: resume is refused; allowed: cleanup")
            if found.state == "preparing":
                return self._carry_on(found)
            found = self._back(found)
            return self._commit(found) if found.epoch is not None and found.state != "committed" else found

    def _back(self, found: Operation) -> Operation:
        """Start what is missing of it, and note how it runs. The caller has its lock."""
        with processes.within(self._until - time.monotonic()), processes.giving_way(found.kind == "test"):
            after = bring_back(self._root, found)
        if after.booted == found.booted:
            return found
        return change(self._root, found.id, lambda vault, before: msgspec.structs.replace(before, booted=after.booted))

    def _carry_on(self, found: Operation) -> Operation:
        watch = Stopwatch(self._told, [Step("start", self._begun_s)])
        if found.handover is not None and not found.handover.is_used:
            try:
                found, chosen = self._take_over(found, watch)
            except BaseException as error:
                self._give_up(found, error)
                raise
            return self._prepare(found, chosen, watch)
        with Vault.open(self._root) as vault:
            chosen = choose(vault, found.machine, found.point.place, accept_damage=True)
        return self._prepare(found, chosen, watch)

    def change_point(self, text: str, selector: str, *, accept_damage: bool = False) -> Operation:
        """Another point for a failover that is not committed; what was written since it began is given up."""
        found = self._find(text)
        with places.take_lock_of(found):
            watch = Stopwatch(self._told, [Step("start", self._begun_s)])
            with watch.step("resolve"), Vault.open(self._root) as vault:
                self._allow(vault, self._find(found.id), ProtectionEvent.CHANGE_POINT)
                chosen = choose(vault, found.machine, selector, accept_damage=accept_damage)
                check_in_history(chosen)
                check_space(vault, chosen, found.places.state, mounts.allocated_bytes(found.places.state))
            now = self._clock.time_ns()

            def move(vault: Vault, before: Operation) -> Operation:
                self._allow(vault, before, ProtectionEvent.CHANGE_POINT)
                text = f"another point was asked for: {selector}, LSN {chosen.point.lsn}"
                return msgspec.structs.replace(
                    before.to("preparing", now, text),
                    point=chosen.point,
                    disks=chosen.disk_names,
                    data_loss_s=chosen.data_loss_s,
                    warnings=chosen.warnings,
                )

            return self._prepare(change(self._root, found.id, move), chosen, watch)

    def commit(self, text: str) -> Operation:
        """For good: the machine's old side can add nothing any more, from before this returns."""
        found = self._find(text)
        with places.take_lock_of(found):
            return self._commit(self._find(found.id))

    def _commit(self, found: Operation) -> Operation:
        def intend(vault: Vault, before: Operation) -> Operation:
            self._allow(vault, before, ProtectionEvent.COMMIT)
            if before.state != "commit-pending":
                raise RefusedError(
                    f"failover {before.id[:12]} is {before.state}: commit is refused; allowed: "
                    f"`replica-store failover resume {before.id[:12]}`, change-point, cancel"
                )
            row = vault.machine(before.machine)
            if before.epoch is None:
                _check_host_rests(before, row.epoch)
            return msgspec.structs.replace(before, epoch=before.epoch or row.epoch + 1)

        found = change(self._root, found.id, intend)
        self._told("epoch")
        with lock_descriptions(self._root, _LOCK_S_MAX), Vault.open(self._root, writable=True) as vault:
            # After a death once more: somebody may have been told the one before.
            epoch = raise_epoch(vault, found.machine_id)
        self._told("committed")
        now = self._clock.time_ns()

        def finish(vault: Vault, before: Operation) -> Operation:
            after = before.to("committed", now, f"it was committed: epoch {epoch}")
            leave_promotions(vault, found.machine_id, now, f"it was failed over for good ({found.id[:12]})")
            return close_side(vault, msgspec.structs.replace(after, epoch=epoch))

        return change(self._root, found.id, finish)

    # ---- ending -----------------------------------------------------------------------------------------------

    def cancel(self, text: str) -> Operation:
        """Take a failover back that is not committed: the machine is where it was. What was written since is given
        up."""
        cancelled = self._end(text, "cancelled", "it was cancelled", self._allow_cancel)
        return handing_over.wait_back(self._root, cancelled, self._clock)

    def cleanup(self, text: str, cause: str = "it was cleaned up", *, gives_up: bool = False) -> Operation:
        """End a test failover, or what a machine that came back has left where it ran; nothing of it is left but its
        report. Raises RefusedError, also where that might be the only copy of something, unless one `gives_up` that."""
        if (found := self._find(text)).state == "returned":
            leaving.check_left_behind(found, gives_up=gives_up)

        def allow(vault: Vault, before: Operation) -> None:
            if before.kind != "test" and before.state != "returned":
                raise RefusedError(
                    f"failover {before.id[:12]} is no test, it is {before.state}: cleanup is refused; allowed: "
                    + ("nothing that ends it" if before.state == "committed" else "cancel, commit")
                )

        return self._end(text, "cleaned", cause, allow)

    def _end(
        self, text: str, state: OperationState, cause: str, allow: Callable[[Vault, Operation], None]
    ) -> Operation:
        found = self._find(text)
        with places.take_lock_of(found):
            now = self._clock.time_ns()
            if (found := self._find(found.id)).state == state == "cleaned" and not found.remains:
                return found

            def decide(vault: Vault, before: Operation) -> Operation:
                if before.state == state and before.remains:
                    return before  # this was asked for, and died
                allow(vault, before)
                return before if before.state == state else before.to(state, now, cause)

            ended = change(self._root, found.id, decide)
            self._told("undo")
            return undoing.tidy(self._root, ended)

    def _allow_cancel(self, vault: Vault, before: Operation) -> None:
        self._allow(vault, before, ProtectionEvent.CANCEL)

    def _allow(self, vault: Vault, found: Operation, event: ProtectionEvent) -> None:
        """Raise RefusedError where the table, or what has begun, does not let it be."""
        if found.kind == "test":
            raise RefusedError(f"failover {found.id[:12]} is a test: {event} is refused; allowed: cleanup")
        machine = vault.machine(found.machine)
        check_event(vault, machine, event)
        holding = holder(operations(vault.catalog, machine.id))
        if holding is None or holding.id != found.id:
            raise RefusedError(f"failover {found.id[:12]} is {found.state}: {event} is refused; allowed: nothing")
        if event is ProtectionEvent.CHANGE_POINT and found.handover is not None and not found.handover.is_used:
            raise RefusedError(
                f"the host has not handed over to failover {found.id[:12]}: {event} is refused; allowed: resume, cancel"
            )
        if found.epoch is not None and event is not ProtectionEvent.COMMIT:
            raise RefusedError(f"the commit of failover {found.id[:12]} has begun: {event} is refused; allowed: commit")

    # ---- what is due ------------------------------------------------------------------------------------------

    def sweep(self) -> list[Operation]:
        """Do what is due: tests whose time or space is up, and what ended ones left.

        Whatever somebody works on just now is left alone; so is what fails, until the next time. Those that were ended.
        """
        ended = []
        for each in self._remaining():
            try:
                if each.state in ENDED:
                    with places.take_lock_of(each):
                        if (found := self._find(each.id)).remains:
                            ended.append(undoing.tidy(self._root, found))
                elif (cause := cause_to_end(each, self._clock.time_ns())) is not None:
                    if each.kind == "test":
                        ended.append(self.cleanup(each.id, cause))
                    else:
                        ended.append(self._end(each.id, "cancelled", cause, self._allow_cancel))
            except (AsrfsError, OSError):
                continue
        return ended

    def is_anything_due(self) -> bool:
        """Whether `sweep` would try something."""
        return any(
            each.state in ENDED or cause_to_end(each, self._clock.time_ns()) is not None for each in self._remaining()
        )

    def _remaining(self) -> list[Operation]:
        with Vault.open(self._root) as vault:
            return [each for each in operations(vault.catalog) if each.remains]

    def _find(self, text: str) -> Operation:
        with Vault.open(self._root) as vault:
            return sealed_operation(vault, text)


def _check_host_rests(found: Operation, epoch: int) -> None:
    """Raise RefusedError where the host goes on by itself since it handed over: committing would lose what it wrote."""
    handover = found.handover
    if handover is not None and (handover.is_back or epoch != (handover.epoch or found.point.epoch)):
        raise RefusedError(
            f"the host of machine {found.machine} has taken its machine back since it handed over: commit is refused; "
            "allowed: cancel"
        )
