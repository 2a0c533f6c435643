"""What has happened to a plan that is carried out, as a file: a line of what is carried out, then a line an event.

Durable when `append` returns. A last line that was cut off by a crash never was: what it would have said had no
consequence yet. The plan itself is in it, so one that is changed meanwhile changes nothing that runs.
"""

from __future__ import annotations

import os

import msgspec

from asrfs.errors import IntegrityError, NotFoundError, RefusedError
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import File, read_whole, write_atomically
from replica_store.failover.plan import Kind, Plan, check_plan
from replica_store.failover.plan_run import Event, PlanRun


class Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first line: what is carried out, and what was asked for beside: `ttl_s` is of tests."""

    format: int = 1
    id: str
    kind: Kind
    plan: Plan
    accept_damage: bool = False
    ttl_s: float = 24 * 3600.0
    boots: bool = True


class PlanJournal:
    """One run. Not for several writers at once: who carries out a plan holds its lock."""

    def __init__(self, path: str, head: Head, events: list[Event], whole_bytes: int) -> None:
        self.head = head
        self._path = path
        self._events = events
        self._end = whole_bytes
        self._file: File | None = None

    @classmethod
    def create(cls, path: str, head: Head) -> PlanJournal:
        """A run that has not begun. Raises RefusedError if there is one of that name."""
        storage = DirectoryStorage(os.path.dirname(path))
        if storage.exists(os.path.basename(path)):
            raise RefusedError(f"{path} is there already")
        line = msgspec.json.encode(head) + b"\n"
        write_atomically(storage, os.path.basename(path), line)
        return cls(path, head, [], len(line))

    @classmethod
    def open(cls, path: str) -> PlanJournal:
        """Raises NotFoundError, IntegrityError."""
        try:
            content = read_whole(DirectoryStorage(os.path.dirname(path)), os.path.basename(path))
        except FileNotFoundError:
            raise NotFoundError(f"there is no run of a plan at {path}") from None
        whole = content[: content.rfind(b"\n") + 1]
        first, *rest = whole.splitlines() or [b""]
        try:
            head = msgspec.json.decode(first, type=Head)
            check_plan(head.plan)
            events = [msgspec.json.decode(line, type=Event) for line in rest]
            PlanRun.replay(head.plan, head.kind, events)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise IntegrityError(f"{path} cannot be read: {error}") from None
        except RefusedError as error:
            raise IntegrityError(f"{path} says what cannot have been: {error}") from None
        return cls(path, head, events, len(whole))

    @property
    def events(self) -> tuple[Event, ...]:
        """In the order in which they happened."""
        return tuple(self._events)

    @property
    def run_id(self) -> str:
        return self.head.id

    @property
    def run(self) -> PlanRun:
        """What has happened so far."""
        return PlanRun.replay(self.head.plan, self.head.kind, self._events)

    def append(self, event: Event) -> None:
        """Raises OSError; then it is not known whether it is there, and nothing more may be done."""
        if self._file is None:
            storage = DirectoryStorage(os.path.dirname(self._path))
            self._file = storage.open(os.path.basename(self._path), write=True)
            self._file.truncate(self._end)  # what a crash left of a line
        line = msgspec.json.encode(event) + b"\n"
        self._file.write_at([line], self._end)
        self._file.datasync()
        self._end += len(line)
        self._events.append(event)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
