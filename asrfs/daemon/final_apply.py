"""Applies everything the journal holds when the disk server has ended: the images are plain and current afterwards.

Holds the disk server's lock meanwhile, because it recovers the journal as a disk server would. Blocks.
"""

from __future__ import annotations

from asrfs.consistency.points import PointLog
from asrfs.daemon.agent_images import StateImages
from asrfs.daemon.state import POINTS_FILE, StateDirectory
from asrfs.errors import RefusedError
from asrfs.format.record import RecordHeader
from asrfs.journal.reader import JournalReader
from asrfs.journal.recovery import recover
from asrfs.model.names import id_bytes
from asrfs.replication.applier import Applier
from asrfs.replication.positions_file import PositionsFile
from asrfs.storage.directory import DirectoryStorage


def apply_everything(state: StateDirectory) -> int:
    """Fold the whole journal into the images; the LSN reached. The caller is the agent and holds its lock.

    Raises RefusedError while a disk server runs, IntegrityError for a corrupt journal, OSError.
    """
    lock = state.take_lock("disk_server")
    if lock is None:
        raise RefusedError(f"the disk server still runs as process {state.lock_holder('disk_server')}: stop it first")
    journal = DirectoryStorage(state.journal)
    machine_id = id_bytes(state.load_machine().id)
    positions = PositionsFile(state.load_positions(), state.save_positions)
    images = StateImages(state, positions, beside_server=False)
    points = PointLog(DirectoryStorage(state.root), POINTS_FILE)
    reader = JournalReader(journal, machine_id)
    try:
        recovered = recover(journal, positions.current, machine_id)

        def on_marker(header: RecordHeader, payload: bytes) -> None:
            points.add_marker(header, payload, recovered.epoch)

        applier = Applier(reader, positions, images, on_marker)
        while (cursor := applier.apply_span(recovered.last_lsn)).lsn < recovered.last_lsn:
            pass
        return cursor.lsn
    finally:
        reader.close()
        images.close()
        lock.close()
