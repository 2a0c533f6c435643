"""What is noted of a history: every event into a digest, the faults that struck, and what did not hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import trio

from tests.fakes.crash_state import Inode
from tests.fakes.crash_storage import CrashStorage


class Watch:
    """Where `is_recording`, every event is kept, and all bytes there are at the end go into the digest."""

    def __init__(self, *, is_recording: bool = False) -> None:
        self.faults: Counter[str] = Counter()
        self.events: list[str] = []
        self.violations: list[AssertionError] = []
        self.is_recording = is_recording
        self._digest = blake2b(digest_size=16)

    def note(self, *words: object) -> None:
        if self.is_recording:
            line = f"{trio.current_time():.6f} {words}"
            self._digest.update(line.encode())
            self.events.append(line)

    def note_bytes(self, name: str, content: bytes | bytearray) -> None:
        self._digest.update(f"{name} {len(content)} ".encode())
        self._digest.update(content)

    def digest(self) -> str:
        return self._digest.hexdigest()

    def fired(self, fault: str, times: int = 1) -> None:
        if times:
            self.faults[fault] += times

    @contextmanager
    def checking(self) -> Iterator[None]:
        """What does not hold in here is remembered, even if the product swallows the exception."""
        try:
            yield
        except AssertionError as error:
            self.violations.append(error)
            raise

    def count_lack_of_space(self, storage: CrashStorage, fault: str) -> None:
        """Have the fault fire whenever the storage has not the room that is wanted."""
        real = storage.room_for

        def room_for(inode: Inode, size: int) -> int:
            room = real(inode, size)
            if room < size:
                self.fired(fault)
            return room

        storage.room_for = room_for  # type: ignore[method-assign]
