"""A directory of the real filesystem for a `JournalWorld`, which can be killed there but cannot lose power."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from asrfs.storage.directory import DirectoryStorage
from tests.fakes.crash_storage import CrashStorage


class RealStorage(DirectoryStorage):
    """`as_double` for the type."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.replaces_nothing_in: set[str] = set()
        self.after_operation: Callable[[str, str], None] | None = None

    @property
    def as_double(self) -> CrashStorage:
        return cast(CrashStorage, self)

    def below(self, directory: str) -> DirectoryStorage:
        self.make_directory(directory)
        return DirectoryStorage(self.path(directory))

    def killed(self) -> RealStorage:
        """What a process leaves is there, for the next one."""
        return self

    def keep_failing(self, before: CrashStorage) -> None:
        """The system below goes on as it did."""
