"""Holding the writes of a machine for the short while in which machines of a group cut a point together.

    open ──begin──▶ held ──release, deadline──▶ draining ──all kept are done──▶ open
                                                      (at once, where nothing was kept)

`begin` appends the marker and bars every later change in one step under the journal's lock. So what was appended before
is in the cut, nothing behind the marker is appended or acknowledged while it is held, and that needs no drain of its
own: a request is wholly before the marker or not begun. Reads, syncs and records that are no change of a guest's (FILL,
DISK, MARKER) go on. A sync that is answered meanwhile speaks only of what stands before the marker.

A change that comes meanwhile is kept, unanswered and in order, and done after the release by the thread that lives
here; until that has done the last one, later ones wait, so that none overtakes. Nothing is asked of a write while
nothing is held.

Members of a group wait for each other while they hold, so what can be done before is: `arm` checks everything and has
the thread look at the clock so often that no hold that begins meanwhile can outlast its deadline unseen. Then neither
the begin of a hold nor its end wakes anybody, unless there is something to be done.

The deadline is this process's own, on monotonic time: whoever asked for the hold may die. If this process dies, the
kernel gives every request that was kept to the next one, which holds nothing and knows of no hold.

The bar also serves to fence a machine that was superseded (I6), or whose disks are being brought to another point: its
changes are refused, and everything else goes on.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple

from asrfs.disk.interface import HeldError
from asrfs.errors import BadInputError, RefusedError, TemporaryError
from asrfs.format.record import CHANGES, Kind
from asrfs.journal.writer import Journal
from asrfs.model.clock import Clock
from asrfs.model.machine import NO_SLOT
from asrfs.storage.interface import Bytes

HOLD_S_MAX = 60.0
ARMED_S_MAX = 300.0
"""How long it stays ready for a hold that nobody begins."""
KEPT_BYTES_MAX = 32 << 20
"""Above this nothing more is taken from the kernel until the release, reads neither."""
_MARKER = int(Kind.MARKER)

log = logging.getLogger(__name__)


class Held(NamedTuple):
    """The marker at the end of the cut. Not durable yet."""

    lsn: int
    time_ns: int
    epoch: int


class _Armed(NamedTuple):
    """A hold that may begin at any time until `until`."""

    id: str
    marker: Bytes
    seconds_max: float
    not_after: float | None
    until: float


class Released(NamedTuple):
    """`holding`: nothing behind the marker had been acknowledged when the release came. `seconds`: how long until it
    was released, by whatever."""

    holding: bool
    seconds: float


class _State(Enum):
    OPEN = "open"
    HELD = "held"
    DRAINING = "draining"


class WriteHold:
    """One for a journal. Methods may be called from any thread."""

    def __init__(self, journal: Journal, clock: Clock) -> None:
        self._journal = journal
        self._monotonic = clock.monotonic
        self._change = threading.Condition(journal.lock)
        self._state = _State.OPEN
        self._closed = False
        self._is_fenced = False
        self._passes: threading.Thread | None = None
        """Whose changes are no guest's, so that the fence is not for them."""
        self._id = ""
        self._begun = 0.0
        self._deadline = 0.0
        self._released: tuple[str, Released] = ("", Released(False, 0.0))
        self._kept: deque[Callable[[], None]] = deque()
        self._kept_bytes = 0
        self._thread: threading.Thread | None = None
        self._looks_at = math.inf
        """When the thread looks at the clock next without being woken."""
        self._armed: _Armed | None = None

    def fence(self, is_fenced: bool) -> None:
        """From now on changes are refused with EROFS, for as long as this is not taken back."""
        with self._change:
            if self._is_fenced != is_fenced:
                self._is_fenced = is_fenced
                self._bar_or_not()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Changes of this thread pass the fence meanwhile; of one thread at a time.

        Raises RefusedError where nothing is fenced: then guests write, too.
        """
        with self._change:
            if not self._is_fenced or self._passes is not None:
                raise RefusedError("the disks are not held for this")
            self._passes = threading.current_thread()
        try:
            yield
        finally:
            with self._change:
                self._passes = None

    # ---- whoever cuts a point -----------------------------------------------------------------------------------

    def arm(self, hold_id: str, marker: Bytes, seconds_max: float, not_after: float | None = None) -> None:
        """Do ahead what can be, for `begin_armed`. What was armed before is not any more. Raises as `begin` does."""
        _check_duration(seconds_max)
        with self._change:
            self._check_open()
            self._armed = _Armed(hold_id, marker, seconds_max, not_after, self._monotonic() + ARMED_S_MAX)
            self._change.notify_all()

    def begin_armed(self, hold_id: str) -> Held:
        """`begin` with what it was armed with, once."""
        with self._change:
            armed = self._armed
            if armed is None or armed.id != hold_id or self._monotonic() >= armed.until:
                raise RefusedError("the disk server was not made ready for this point")
            self._armed = None
            return self._begin_locked(hold_id, armed.marker, armed.seconds_max, armed.not_after)

    def begin(self, hold_id: str, marker: Bytes, seconds_max: float, not_after: float | None = None) -> Held:
        """Append the marker and hold every change behind it, for `seconds_max` from now at the most.

        Raises RefusedError while writes are held already or when it is later than `not_after` (monotonic: what was made
        quiet for it is so no more), OSError where the marker cannot be appended: nothing is held.
        """
        _check_duration(seconds_max)
        with self._change:
            return self._begin_locked(hold_id, marker, seconds_max, not_after)

    def release(self, hold_id: str) -> Released:
        """Let go, and say whether it was held until now. A hold that is not known was let go by somebody's death."""
        with self._change:
            if self._state is _State.HELD and self._id == hold_id:
                self._release_locked(in_time=self._monotonic() < self._deadline)
            elif self._armed is not None and self._armed.id == hold_id:
                self._armed = None
            known, released = self._released
            self._released = ("", released)  # said once: what is asked for again has long been given up
            return released if known == hold_id else Released(False, 0.0)

    def end(self) -> None:
        """Let go of whatever is held, hold nothing any more, and return when all that was kept is done."""
        with self._change:
            self._closed = True
            if self._state is _State.HELD:
                self._release_locked(in_time=False)
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join()

    # ---- the session --------------------------------------------------------------------------------------------

    def keep(self, request: Callable[[], None], size: int) -> bool:
        """Keep a request of `size` bytes that met HeldError, to be called after the release. False: it is over, do it.

        Waits while too much is kept already, or while what was kept is being done.
        """
        with self._change:
            while self._state is _State.DRAINING or (
                self._state is _State.HELD and self._kept and self._kept_bytes + size > KEPT_BYTES_MAX
            ):
                self._change.wait()
            if self._state is _State.OPEN:
                return False
            self._kept.append(request)
            self._kept_bytes += size
            return True

    # ---- parts --------------------------------------------------------------------------------------------------

    def _begin_locked(self, hold_id: str, marker: Bytes, seconds_max: float, not_after: float | None) -> Held:
        self._check_open()
        if not_after is not None and self._monotonic() >= not_after:
            raise RefusedError("it is too late for this point: what was frozen for it has been thawed")
        journal = self._journal
        journal.append_locked(_MARKER, NO_SLOT, 0, 0, marker)
        journal.barred = self._bar
        self._state = _State.HELD
        self._id = hold_id
        self._begun = self._monotonic()
        self._deadline = self._begun + seconds_max
        if self._deadline < self._looks_at:
            self._change.notify_all()
        return Held(journal.appended_lsn, journal.last_time_ns, journal.epoch)

    def _bar(self, kind: int) -> None:
        """Asked by the journal, under its lock, before each record."""
        if kind not in CHANGES:
            return
        if self._is_fenced:
            if threading.current_thread() is self._passes:
                return
            raise OSError(errno.EROFS, "this side of the machine takes no writes: it was superseded, or is rewritten")
        if not (self._state is _State.DRAINING and threading.current_thread() is self._thread):
            raise HeldError

    def _check_open(self) -> None:
        """Whether writes may be held now. The thread waits for what it is for, so it is made before anything depends on
        it."""
        if self._closed:
            raise RefusedError("the disk server is ending: no writes are held any more")
        if self._is_fenced:
            raise RefusedError("this side of the machine was superseded: it has no writes to hold")
        if self._state is not _State.OPEN:
            raise RefusedError(f"writes are being held already, for point {self._id}")
        if self._thread is None:
            self._start()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="hold", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise TemporaryError(f"writes cannot be held: {error}") from None
        self._thread = thread

    def _release_locked(self, *, in_time: bool) -> None:
        self._released = (self._id, Released(in_time, self._monotonic() - self._begun))
        if self._kept:
            self._state = _State.DRAINING
            self._change.notify_all()
        else:
            self._open_locked()

    def _open_locked(self) -> None:
        self._kept_bytes = 0
        self._state = _State.OPEN
        self._bar_or_not()

    def _bar_or_not(self) -> None:
        if self._journal.failed is None:
            is_open = self._state is _State.OPEN and not self._is_fenced
            self._journal.barred = None if is_open else self._bar

    def _run(self) -> None:
        while True:
            with self._change:
                while self._state is _State.OPEN:
                    if self._closed:
                        return
                    self._look_again_after(self._round_s())
                while self._state is _State.HELD:
                    left = self._deadline - self._monotonic()
                    if left <= 0:
                        log.warning("writes were let go at the deadline of %s", self._id)
                        self._release_locked(in_time=False)
                    else:
                        self._look_again_after(left)
                is_draining = self._state is _State.DRAINING
            if is_draining:
                self._drain()

    def _round_s(self) -> float:
        """For how long nothing can come to its deadline that is not held yet."""
        if self._armed is not None and self._monotonic() >= self._armed.until:
            self._armed = None
        return self._armed.seconds_max if self._armed is not None else math.inf

    def _look_again_after(self, seconds: float) -> None:
        """Wait, under the lock, for so long or until woken."""
        self._looks_at = self._monotonic() + seconds
        self._change.wait(seconds if seconds < math.inf else None)

    def _drain(self) -> None:
        try:
            while self._kept:  # nothing is added any more
                self._kept.popleft()()
        except BaseException:
            log.exception("a request that was held failed: the next disk server tries it again")
            os._exit(1)
        with self._change:
            self._open_locked()
            self._change.notify_all()


def _check_duration(seconds_max: float) -> None:
    if not 0 < seconds_max <= HOLD_S_MAX:
        raise BadInputError(f"writes are held for more than nothing and at most {HOLD_S_MAX:g} s")
