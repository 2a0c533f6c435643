"""A journal that goes on in a new epoch, where this side of the machine and another one have parted.

    all durable ─▶ new segment: the new epoch, its first LSN, where the old epoch ended ─▶ header durable

LSNs may jump there, over those that the other side has used. What the new header says of the end of the old epoch was
durable before it, so recovery and readers go over that place by the header alone, and notice if something is missing.
A kill before the header is durable leaves the old epoch, in which the journal just goes on.
"""

from __future__ import annotations

import errno

from asrfs.journal.segments import segment_name
from asrfs.journal.writer import Journal


class EpochJournal(Journal):
    """A journal whose epoch can be raised."""

    def begin_epoch(self, epoch: int, after_lsn: int) -> None:
        """Go on in a new segment of `epoch`, with LSNs above everything appended and above `after_lsn`.

        Durable when it returns. Nothing happens where this epoch, or a later one, has begun already. Raises OSError.
        """
        self.sync()  # so that little is left to be synced under the lock
        with self.lock:
            if self._failed is not None:
                raise OSError(errno.EIO, self._failed)
            if self.epoch < epoch:
                self._sync_locked()
                self._roll(epoch, max(self.appended_lsn, after_lsn))
                self._sync_locked()

    def _sync_locked(self) -> None:
        """Make everything durable at this instant: nothing comes between one epoch and the next."""
        open_segment = [(number, file) for number, file in self._files.items() if number == self._number]
        for number, file in [*self._unsynced, *open_segment]:
            try:
                file.datasync()
            except OSError as error:
                self._fail(f"{segment_name(number)}: sync failed: {error}")
                raise OSError(errno.EIO, self._failed) from error
        self.durable_lsn = self.appended_lsn
