"""Keeps the file of the next segment ready, so that the writer begins it without waiting for the filesystem.

Ready means: as long as a segment, under the next segment's name, and that name is durable. The last is not for speed
alone. Records must never lie in a file whose name a power loss can change back: the file would be a spare again under a
lower number, the number would be used a second time, and its old records would be taken for new ones.

One thread makes the next file while the current one fills. `take` waits for it, or makes the file itself when
there was no room or no time before. A failed sync of the directory is final, like every failed sync.
"""

from __future__ import annotations

import errno
import threading

from asrfs.journal.segments import list_journal, segment_name
from asrfs.storage.interface import File, Storage


class NextSegment:
    """See the module. `ahead` False makes every file when it is taken."""

    def __init__(self, storage: Storage, segment_bytes: int, *, ahead: bool) -> None:
        self._storage = storage
        self._segment_bytes = segment_bytes
        self._change = threading.Condition()
        self._wanted: int | None = None
        self._ready: tuple[int, File] | None = None
        self._failed: str | None = None
        self._closing = False
        self._thread: threading.Thread | None = None
        if ahead:
            self._thread = threading.Thread(target=self._run, name="journal-next", daemon=True)
            self._thread.start()

    def want(self, number: int) -> None:
        """Begin to make the file of segment `number`."""
        if self._thread is not None:
            with self._change:
                self._wanted = number
                self._change.notify()

    def take(self, number: int) -> File:
        """The file of segment `number`, open for writing. Raises OSError and leaves nothing behind."""
        with self._change:
            self._wanted = None
            if self._failed is not None:
                raise OSError(errno.EIO, self._failed)
            ready, self._ready = self._ready, None
            if ready is not None:
                assert ready[0] == number
                return ready[1]
            return self._make(number)

    def give_back(self, number: int, file: File) -> None:
        """The taken file could not be used after all; the next `take` gets it again."""
        with self._change:
            self._ready = (number, file)

    def close(self) -> None:
        with self._change:
            self._closing = True
            self._change.notify()
        if self._thread is not None:
            self._thread.join()
        if self._ready is not None:
            self._ready[1].close()

    def _run(self) -> None:
        with self._change:
            while not self._closing:
                if self._wanted is None:
                    self._change.wait()
                    continue
                number, self._wanted = self._wanted, None
                try:
                    self._ready = (number, self._make(number))
                except OSError:
                    pass  # `take` tells the one who writes

    def _make(self, number: int) -> File:
        # A file of ours may be there that could be neither used nor removed. No rename may replace a name.
        is_there = self._storage.exists(segment_name(number))
        file = (None if is_there else self._rename_spare(number)) or self._create(number)
        try:
            self._storage.sync_directory("")
        except OSError as error:
            file.close()
            self._failed = f"the journal's directory: sync failed: {error}"
            raise OSError(errno.EIO, self._failed) from None
        return file

    def _rename_spare(self, number: int) -> File | None:
        for spare in list_journal(self._storage).spare_names():
            try:
                file = self._storage.open(spare, write=True)
            except FileNotFoundError:
                continue  # somebody removed it by hand
            try:
                if file.size() >= self._segment_bytes:
                    self._storage.rename(spare, segment_name(number))
                    return file
            except FileNotFoundError:
                pass
            except BaseException:
                file.close()
                raise
            file.close()
        return None

    def _create(self, number: int) -> File:
        try:
            file = self._storage.create(segment_name(number))
        except FileExistsError:
            file = self._storage.open(segment_name(number), write=True)
        try:
            file.allocate(self._segment_bytes)
        except BaseException:
            file.close()
            self._remove(number)
            raise
        return file

    def _remove(self, number: int) -> None:
        try:
            self._storage.unlink(segment_name(number))
        except OSError:
            pass  # the next `take` uses it; or recovery finds a segment without a header, and makes it a spare
