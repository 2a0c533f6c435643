"""How a point is made for which something is quiesced. One call, one process of its own; nothing here knows trio.

    pre hooks ─▶ find, refuse, open ─▶ watchdog ─▶ sync ─▶ freeze ─▶ marker ─▶ thaw ─▶ post hooks ─▶ last word
        └────────────┴───────────────────┴───────── fails ──┴─▶ thaw ─▶ crash marker, saying why ──┘

A marker that claims more than a crash is appended only before the deadline, which the disk server looks at under the
lock of its journal, and nobody of ours thaws before the deadline; whoever else does is found out when we thaw, and
the last word takes the claim back. Post hooks run whatever happened, in the end also by whoever finds that we were
killed (`consistency.maker`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import msgspec

from asrfs.consistency.freezing import FrozenTogether, OpenFilesystem
from asrfs.consistency.hook_sequence import HookSequence
from asrfs.errors import AsrfsError, RefusedError, TemporaryError, foreign_line
from asrfs.model.clock import Clock
from asrfs.model.marker import FAILED_CHARACTERS_MAX, Consistency, MarkerRecord
from asrfs.model.policy import OnFailure


class PointOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What point is wanted. `deadline_s`: for how long filesystems may be frozen.

    `is_external`: somebody else appends the marker, between being told `held` and saying that it is done.
    """

    id: str
    machine: str
    consistency: Consistency
    name: str | None = None
    note: str | None = None
    on_failure: OnFailure = "crash"
    deadline_s: float = 10.0
    is_external: bool = False


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The point with its last word, and its place; without a place where no point was made.

    `post_failures`: what went wrong after the instant, which changes nothing of the point.
    """

    marker: MarkerRecord
    lsn: int | None = None
    time_ns: int | None = None
    post_failures: tuple[str, ...] = ()


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """Told to who appends the marker: `marker` is what may be said of the instant now; `deadline` on monotonic time."""

    marker: MarkerRecord
    deadline: float | None = None


class Place(Protocol):
    """The world around the procedure. All calls block."""

    def open_filesystems(self) -> list[OpenFilesystem]:
        """What is to be frozen, open. Raises AsrfsError that says why it may not be."""

    def together(self, filesystems: Sequence[OpenFilesystem]) -> FrozenTogether: ...

    def watch(self, filesystems: Sequence[OpenFilesystem]) -> Watch:
        """Start the watchdog. Raises TemporaryError."""

    def mark(self, payload: MarkerRecord, not_after: float | None) -> tuple[int, int]:
        """Append a marker and have it durable: `(lsn, time_ns)`. RefusedError after `not_after`; AsrfsError."""

    def wait_external(self, held: Held) -> bool:
        """Tell that everything is held, and wait; whether the marker was appended in time."""


class Watch(Protocol):
    def freezing(self, deadline: float) -> None: ...

    def thawed(self) -> None: ...


class Procedure:
    """One point."""

    def __init__(self, order: PointOrder, hooks: Callable[[], HookSequence], place: Place, clock: Clock) -> None:
        self._order = order
        self._make_hooks = hooks
        self._hooks: HookSequence | None = None
        self._place = place
        self._clock = clock
        self._filesystems: list[OpenFilesystem] = []
        self._frozen: FrozenTogether | None = None
        self._watch: Watch | None = None
        self._failed: str | None = None
        self._made: Consistency = order.consistency
        self._freezing_since: float | None = None
        self._deadline: float | None = None
        self._freeze_ms: float | None = None
        self._hold_ms: float | None = None

    def run(self) -> Outcome:
        """Raises AsrfsError if no marker could be appended at all; all is thawed and post hooks have run then, too."""
        lsn = time_ns = None
        post_failures: list[str] = []
        try:
            self._quiesce()
            if self._failed is None or self._made != "crash":
                lsn, time_ns = self._mark_quiesced()
            self._thaw()
            if lsn is None and self._failed is not None and not self._order.is_external:
                lsn, time_ns = self._mark_crash()
        finally:
            self._thaw()
            if self._hooks is not None:
                post_failures = self._hooks.end(self._failed)
                if self._hooks.lost and self._made != "crash":
                    self._fall_back(f"{self._hooks.lost}, so it may have let go too early")
        last_word = self._marker()
        if lsn is not None and not self._order.is_external:
            with suppress(AsrfsError):  # the point stays without its last word
                self._place.mark(msgspec.structs.replace(last_word, unfinished=False, completes=lsn), None)
        finished = msgspec.structs.replace(last_word, unfinished=False)
        return Outcome(marker=finished, lsn=lsn, time_ns=time_ns, post_failures=tuple(post_failures))

    # ---- before the instant -----------------------------------------------------------------------------------

    def _quiesce(self) -> None:
        try:
            if self._order.consistency == "application":
                self._run_hooks()
            if self._failed is None or self._made == "filesystem":
                self._freeze()
        except (AsrfsError, OSError) as error:
            self._fall_back(str(error))

    def _run_hooks(self) -> None:
        self._hooks = self._make_hooks()
        if not self._hooks.is_quieting:
            self._made, self._failed = "filesystem", "no pre or hold hook is set up: see `asrfs hooks add`"
        if failed := self._hooks.begin():
            self._fall_back(failed)

    def _freeze(self) -> None:
        self._filesystems = self._place.open_filesystems()
        if not self._filesystems:
            if self._made == "filesystem":
                raise RefusedError("no filesystem of these disks is mounted on this host, so none could be frozen")
            return
        self._watch = self._place.watch(self._filesystems)
        together = self._place.together(self._filesystems)
        together.sync()
        self._freezing_since = self._clock.monotonic()
        self._deadline = self._freezing_since + self._order.deadline_s
        self._watch.freezing(self._deadline)
        self._frozen = together
        together.freeze(self._deadline)
        self._freeze_ms = _ms(self._clock.monotonic() - self._freezing_since)

    def _fall_back(self, why: str) -> None:
        """From here on it can be a crash point only."""
        self._made = "crash"
        said = f"{self._failed}; {why}" if self._failed else why
        self._failed = foreign_line(said)[:FAILED_CHARACTERS_MAX]

    # ---- the instant ------------------------------------------------------------------------------------------

    def _mark_quiesced(self) -> tuple[int | None, int | None]:
        """The marker's place, None if it is not appended: then `_failed` says why."""
        if self._failed is not None and self._order.on_failure == "none":
            return None, None
        if self._hooks is not None and (failed := self._hooks.still_holding()):
            self._fall_back(failed)
            return None, None
        try:
            if self._order.is_external:
                if not self._place.wait_external(Held(marker=self._marker(), deadline=self._deadline)):
                    self._fall_back("the marker was not appended in time")
                return None, None
            return self._place.mark(self._marker(), self._deadline)
        except AsrfsError as error:
            self._fall_back(str(error))
            return None, None

    def _mark_crash(self) -> tuple[int | None, int | None]:
        if self._order.on_failure == "none":
            return None, None
        return self._place.mark(self._marker(), None)

    def _marker(self) -> MarkerRecord:
        order = self._order
        return MarkerRecord(
            id=order.id,
            consistency=self._made,
            name=order.name,
            note=order.note,
            hold_ms=self._hold_ms,
            wanted=order.consistency if self._made != order.consistency else None,
            failed=self._failed,
            freeze_ms=self._freeze_ms,
            hooks=tuple(self._hooks.results) if self._hooks is not None else (),
            unfinished=True,
        )

    # ---- after the instant ------------------------------------------------------------------------------------

    def _thaw(self) -> None:
        """Thaw and let the watchdog go; done twice, nothing happens."""
        frozen, self._frozen = self._frozen, None
        if frozen is not None:
            self._note_thaw(frozen.thaw())
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.thawed()
        for each in self._filesystems:
            each.close()
        self._filesystems = []

    def _note_thaw(self, problem: str | None) -> None:
        """A claim holds only if all was frozen, and every hook held, until we thawed."""
        assert self._freezing_since is not None and self._deadline is not None
        now = self._clock.monotonic()
        self._hold_ms = _ms(now - self._freezing_since)
        if self._made == "crash":
            return
        if now >= self._deadline:
            limit = f"{self._order.deadline_s:g} s, the freeze_deadline"
            problem = f"the marker was not durable after {limit}, so filesystems were thawed before"
        if problem is None and self._hooks is not None:
            problem = self._hooks.still_holding()
        if problem is not None:
            self._fall_back(problem)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def no_point(outcome: Outcome) -> TemporaryError:
    """What to tell who wanted a point and gets none."""
    return TemporaryError(f"no point was made: {outcome.marker.failed}")
