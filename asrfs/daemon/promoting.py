"""A point is copied back over the disks of a machine that goes on running here, when the store says so.

    PROMOTE prepare ─▶ nobody uses the disks? ─▶ drain ─▶ promoting.json: held ─▶ marker `before-promote-…` ─▶ drain
        ─▶ PROMOTED ready
    PROMOTE write ─▶ promoting.json: writing ─▶ gaps open ─▶ what was written since, brought back ─▶ boot settings, gaps
        closed ─▶ marker `promoted-…` ─▶ acknowledged ─▶ promoting.json: written ─▶ PROMOTED written
    PROMOTE release ─▶ promoting.json gone ─▶ PROMOTED released

It never goes back in the history: what the disks were is a point, and what brings them back are records behind that
(I5, I7, I9). Between the open gaps and the closed ones no point is listed, and neither guests nor anybody else get a
disk that is partly written: the file says so, and the disk server reads it before it serves.

A kill between any two steps leaves the file, and the store says the same again. Until the first byte is written this
host may take all of it back, and does where nobody asks for it any more (I8). From then on it goes on to the end, or to
that of another promotion which takes its place.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import structlog
import trio

from asrfs.daemon.agent_verbs import through_a_restart
from asrfs.errors import AsrfsError, FormatError, IntegrityError, RefusedError, foreign_line
from asrfs.model.machine import MachineConfig
from asrfs.model.promoting import (
    PROMOTING_FILE,
    Promoting,
    check_disks,
    decode_promoting,
    promoting_text,
    restored,
    with_open_gaps,
)
from asrfs.protocol.messages import Promote, Promoted
from asrfs.replication.alarms import Alarms
from asrfs.replication.disk_server import DiskServer
from asrfs.replication.outlet import Outlet
from asrfs.replication.progress import Progress
from asrfs.replication.rejoiner import EditMachine
from asrfs.replication.rewriter import Rewriter
from asrfs.storage.interface import Storage, read_whole, write_atomically

ALARM = "promoting"
AWAY_S_MAX = 60.0
"""For so long nobody may ask for it before writes go on without it."""
LOOK_EVERY_S = 1.0
RETRY_S = 5.0

T = TypeVar("T")


@dataclass(slots=True)
class Promoter:
    """`storage`: the state directory's. `check` raises RefusedError where nothing may be promoted now; `users` says who
    uses the disks; `drain` returns when the store has what was appended at the call; `mark` makes a crash point of this
    name: its LSN; `settle` waits until the store has that; `lacking`: slots of disks of which the store lacks
    something. Its methods belong to the event loop.
    """

    storage: Storage
    outlet: Outlet
    server: DiskServer
    progress: Progress
    alarms: Alarms
    rewriter: Rewriter
    threads: trio.CapacityLimiter
    machine: Callable[[], MachineConfig]
    edit_machine: EditMachine
    check: Callable[[], None]
    users: Callable[[], list[str]]
    drain: Callable[[], Awaitable[None]]
    mark: Callable[[str, str], Awaitable[int]]
    settle: Callable[[int], Awaitable[None]]
    lacking: Callable[[], frozenset[int]]
    now_ns: Callable[[], int]
    now: Promoting | None = field(init=False)
    _wanted: Promote | None = None
    _doing: Promote | None = None
    _heard: trio.Event = field(default_factory=trio.Event)
    _heard_at: float = 0.0
    _failed: str = ""
    _unable: Promoted | None = None
    _goes_on: Promote | None = None
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def __post_init__(self) -> None:
        self.now = load_promoting(self.storage)
        self._raise_alarm()

    def holds_healing_back(self) -> bool:
        """Whether what differs between host and store is this one's to bring together."""
        return self.now is not None and self.now.epoch == self.progress.epoch

    def heard(self, word: Promote) -> None:
        """The store's word; what is being done for another one ends."""
        self._heard_at = trio.current_time()
        if self._doing is not None and (self._doing.id, self._doing.wanted) == (word.id, word.wanted):
            return
        self._wanted = word
        self._scope.cancel()
        self._heard.set()

    async def run(self) -> None:
        """For ever: do what the store wants."""
        self._heard_at = max(self._heard_at, trio.current_time())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_up_unasked)
            while True:
                await self._heard.wait()
                self._heard = trio.Event()
                self._doing, self._wanted = self._wanted, None
                assert self._doing is not None
                with trio.CancelScope() as self._scope:
                    await self._obey_until_done(self._doing)
                self._doing = None

    async def _obey_until_done(self, word: Promote) -> None:
        is_over = await self._obey(word)
        while not is_over:
            await trio.sleep(RETRY_S)  # sleep: what refused it may be over then
            is_over = await self._obey(word)

    async def _obey(self, word: Promote) -> bool:
        """Whether that is all; else it is to be tried again."""
        log = structlog.get_logger("asrfs.promoting").bind(promotion=word.id)
        is_over = word.wanted != "write"
        try:
            answer = self._said_of(word)
            if answer is None:
                self._unable = None
                answer = await self._answer(word)
            log.warning("done", wanted=word.wanted, outcome=answer.outcome, lsn=answer.lsn)
            self._failed, is_over = "", True
        except (AsrfsError, OSError) as error:
            why = foreign_line(str(error)) or type(error).__name__
            log.warning("it failed", wanted=word.wanted, reason=why)
            has_begun = self.now is not None and (self.now.is_partial or self.now.phase != "held")
            attempt = word.attempt if word.wanted == "write" and not has_begun else 0
            is_known = word.wanted == "write" and why == self._failed and not attempt
            if word.wanted in ("release", "take-back") or is_known:
                return is_over  # nothing new
            code = error.exit_code if isinstance(error, AsrfsError) else 1
            self._failed = why
            answer = Promoted(id=word.id, outcome="failed", exit_code=code, error=why, attempt=attempt)
            if attempt:  # the store may cancel it now, so nothing is written before it says that it is to be
                self._unable, is_over = answer, True
        try:
            if word.id:  # else nobody asked
                await self.outlet.say(answer)
        except AsrfsError as error:  # the store says it again
            log.warning("not answered", reason=str(error))
        return is_over

    def _said_of(self, word: Promote) -> Promoted | None:
        """What was said of this attempt, or of a later one, which is not begun: a vault that was set back counts on."""
        said = self._unable
        if said is None or said.id != word.id or word.wanted != "write" or not 0 < word.attempt <= said.attempt:
            return None
        return msgspec.structs.replace(said, attempt=word.attempt)

    async def _answer(self, word: Promote) -> Promoted:
        if word.wanted == "prepare":
            return Promoted(id=word.id, outcome="ready", lsn=await self._prepare_or_take_back(word))
        if word.wanted == "write":
            if self.now is None or self.now.id != word.id:  # it was taken back meanwhile
                await self._prepare_or_take_back(word)
            elif self.now.phase == "held" and not self.now.before_lsn:  # a kill came before the point of what is there
                await self._prepare(word)
            return await self._write(word)
        if word.wanted == "release":
            await self._let_go(word.id, of_phase="written")
            return Promoted(id=word.id, outcome="released")
        await self._let_go(word.id, of_phase="held")
        return Promoted(id=word.id, outcome="taken-back")

    # ---- preparing ----

    async def _prepare_or_take_back(self, word: Promote) -> int:
        try:
            return await self._prepare(word)
        except (AsrfsError, OSError):
            if self.now is not None and self.now.id == word.id and self.now.phase == "held" and not self.now.is_broken:
                await self._remove()
            raise

    async def _prepare(self, word: Promote) -> int:
        """LSN of the point of what the disks are; nobody writes behind it. Raises AsrfsError, OSError."""
        now = self.now
        if now is None or now.id != word.id:
            self.check()
            check_disks(await self._in_thread(self.machine), word.disks, word.left)
            is_partial = now is not None and now.is_partial
            if not is_partial:
                await self._check_unused()
                await self.drain()  # so that little is left to send while nothing can be written
            now = Promoting(
                id=word.id,
                phase="held",
                epoch=self.progress.epoch,
                time_ns=self.now_ns(),
                lsn=word.lsn,
                before_lsn=now.before_lsn if now is not None and is_partial else 0,
                is_broken=is_partial,
            )
            await self._save(now)
        await through_a_restart(self.server.reread_fence)
        if now.phase == "held" and not now.is_broken:
            await self._check_unused()
        if not now.before_lsn:
            lsn = await self.mark(
                f"before-promote-{word.id[:12]}", f"what was there before LSN {word.lsn} was promoted"
            )
            now = msgspec.structs.replace(now, before_lsn=lsn)
            await self._save(now)
        await self.drain()
        return now.before_lsn

    async def _check_unused(self) -> None:
        found = await self._in_thread(self.users)
        if found:
            more = f", and {len(found) - 1} more" if len(found) > 1 else ""
            raise RefusedError(f"the disks are in use: {found[0]}{more}; stop what uses them, then try again")

    # ---- writing ----

    async def _write(self, word: Promote) -> Promoted:
        now = self.now
        assert now is not None and now.id == word.id
        if now.phase == "written":
            return Promoted(id=now.id, outcome="written", lsn=now.end_lsn, bytes_written=now.bytes_written)
        if now.epoch != self.progress.epoch:
            raise RefusedError("this host went on in a new epoch meanwhile: promote the point once more")
        if now.phase == "held":
            if not now.is_broken:
                await self._check_unused()
            await self._save(msgspec.structs.replace(now, phase="writing"))
        await through_a_restart(self.server.reread_fence)
        machine = await self._in_thread(self.edit_machine, lambda machine: with_open_gaps(machine, word.disks))
        await through_a_restart(self.server.reread_disks)
        slots = {disk.slot for disk in word.disks}
        disks = [disk for disk in machine.live_disks() if disk.slot in slots]
        await self.rewriter.rewrite(disks, word.lsn, (now.slot, now.offset), self._note)
        return await self._finish(word)

    async def _finish(self, word: Promote) -> Promoted:
        lacking = self.lacking()
        await self._in_thread(
            self.edit_machine, lambda machine: restored(machine, word.disks, word.boot, still_open=lacking)
        )
        await through_a_restart(self.server.reread_disks)
        lsn = await self.mark(f"promoted-{word.id[:12]}", f"the disks as they were at LSN {word.lsn}")
        await self.settle(lsn)
        assert self.now is not None
        now = msgspec.structs.replace(self.now, phase="written", end_lsn=lsn)
        await self._save(now)
        await through_a_restart(self.server.reread_fence)
        return Promoted(id=now.id, outcome="written", lsn=lsn, bytes_written=now.bytes_written)

    async def _note(self, slot: int, offset: int, count: int) -> None:
        assert self.now is not None
        total = self.now.bytes_written + count
        word = self._doing
        if word is not None and word.attempt and self._goes_on is not word:
            with suppress(AsrfsError):  # then with the next piece
                await self.outlet.say(Promoted(id=word.id, outcome="failed"))
                self._goes_on, self._failed = word, ""
        await self._save(msgspec.structs.replace(self.now, slot=slot, offset=offset, bytes_written=total))

    # ---- ending ----

    async def _let_go(self, promotion: str, of_phase: str) -> None:
        now = self.now
        if now is None or now.id != promotion:
            return
        if now.is_partial or now.phase != of_phase:
            raise RefusedError(f"the disks are {now.phase}: that is not over")
        await self._remove()

    async def _give_up_unasked(self) -> None:
        """Take back what nobody asks for any more, as long as nothing was written."""
        while True:
            await trio.sleep(LOOK_EVERY_S)  # sleep: a look now and then
            now = self.now
            is_ours = now is not None and now.phase == "held" and not now.is_broken
            if is_ours and trio.current_time() >= self._heard_at + AWAY_S_MAX:
                assert now is not None
                self.heard(Promote(id=now.id, wanted="take-back"))

    # ---- the file ----

    async def _save(self, promoting: Promoting) -> None:
        try:
            await self._in_thread(write_atomically, self.storage, PROMOTING_FILE, msgspec.json.encode(promoting))
        except OSError:  # it may be there all the same
            self.now = await self._in_thread(load_promoting, self.storage)
            raise
        self.now = promoting
        self._raise_alarm()

    async def _remove(self) -> None:
        await self._in_thread(_unlink, self.storage)
        self.now = None
        self._raise_alarm()
        await through_a_restart(self.server.reread_fence)
        self.progress.wake()

    def _raise_alarm(self) -> None:
        if self.now is None:
            self.alarms.clear(ALARM)
        else:
            self.alarms.set(ALARM, "critical", promoting_text(self.now))

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await trio.to_thread.run_sync(function, *arguments, limiter=self.threads)


def load_promoting(storage: Storage) -> Promoting | None:
    """What was written down. What cannot be read holds, and only another promotion ends it."""
    if not storage.exists(PROMOTING_FILE):
        return None
    try:
        return decode_promoting(read_whole(storage, PROMOTING_FILE))
    except (FormatError, IntegrityError):
        return Promoting(id="", phase="writing", epoch=0, time_ns=0)


def _unlink(storage: Storage) -> None:
    if storage.exists(PROMOTING_FILE):
        storage.unlink(PROMOTING_FILE)
        storage.sync_directory("")
