"""Reading everything back: every byte of every log object, and whether catalog and objects say the same.

For each object: digest, header, index, every frame opened; digests and LSNs chain without a gap; disks and points of
the catalog are those of the records. What is wrong is localised as closely as seals and tables allow and reported, and
the scrub goes on. It changes nothing and may run beside ingest: it looks at what was received when it began, and at
what the catalog said then, since what comes later may complete points of before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from asrfs.errors import AsrfsError, IntegrityError
from asrfs.format.log_object import (
    DIGEST_BYTES,
    NO_DIGEST,
    OBJECT_HEADER_BYTES,
    FrameTable,
    ObjectHeader,
    ObjectKeys,
    check_digest,
    decode_object_header,
)
from asrfs.format.object_index import Index, decode_index
from asrfs.format.record import CARRIES_EXTENT_BYTES
from asrfs.model.marker import completed
from replica_store.vault.contents import entry_of
from replica_store.vault.objects import ObjectMissingError
from replica_store.vault.rows import DiskRow, Entry, MachineRow, ObjectRow, PointRow, parse_log_name
from replica_store.vault.survey import log_names
from replica_store.vault.tail_keeping import tail_names
from replica_store.vault.tails import Tail, TailRows, point_of_tail, tails
from replica_store.vault.vault import Vault, check_header

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong. `offset`: where in the file, if that is known; LSNs: the records it touches.

    `points`: names or ids of the listed points at or after the first of them, which may need what is damaged. `tail`:
    the epoch of the tail it is in; else it is in the history.
    """

    machine: str
    where: str
    offset: int | None
    first_lsn: int
    last_lsn: int
    text: str
    points: tuple[str, ...] = ()
    tail: int | None = None


@dataclass(slots=True)
class Scrubbed:
    """What was read. `uncatalogued`: log objects that no history refers to, such as an interrupted put; not damage."""

    machines: int = 0
    objects: int = 0
    frames: int = 0
    bytes: int = 0
    uncatalogued: list[str] = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)


class _Broken(IntegrityError):
    """Damage found at a place."""

    def __init__(self, text: str, offset: int | None, first_lsn: int, last_lsn: int) -> None:
        super().__init__(text)
        self.offset = offset
        self.lsns = (first_lsn, last_lsn)


def scrub(vault: Vault, machines: Sequence[MachineRow], progress: Progress = lambda done, total: None) -> Scrubbed:
    """Read the histories of these machines. `progress` is told bytes read and bytes to read."""
    report = Scrubbed(machines=len(machines))
    for text in vault.catalog.check():
        report.damages.append(Damage("", vault.catalog.path, None, 0, 0, f"{vault.catalog.path}: {text}"))
    plan = [_cataloged(vault, machine) for machine in machines]
    total = sum(row.length for each in plan for row in each.objects)
    for each in plan:
        _scrub_machine(vault, each, report, lambda: progress(report.bytes, total))
    return report


@dataclass(frozen=True, slots=True)
class _Cataloged:
    """What the catalog has of a machine's history, all of one moment."""

    machine: MachineRow
    objects: Sequence[ObjectRow]
    disks: Sequence[DiskRow]
    points: Sequence[PointRow]


def _cataloged(vault: Vault, machine: MachineRow) -> _Cataloged:
    with vault.catalog.snapshot():
        return _Cataloged(
            machine,
            vault.objects_of(machine.id, vault.received_lsn(machine.id)),
            vault.catalog.disk_rows(machine.id),
            vault.catalog.points(machine.id),
        )


def _scrub_machine(vault: Vault, cataloged: _Cataloged, report: Scrubbed, step: Callable[[], None]) -> None:
    """One history in order, then the catalog's disks and points against what the records said."""
    machine = cataloged.machine
    points = vault.points(machine.id)
    said = _Said()
    lsn, digest, whole = 0, NO_DIGEST, True
    for row in cataloged.objects:
        try:
            if row.first_lsn != lsn + 1:
                raise _broken(row, f"LSN {lsn + 1}..{row.first_lsn - 1} is missing from the catalog", None)
            said.add(_scrub_object(vault, row, digest, report))
        except AsrfsError as error:
            whole = False
            report.damages.append(_damage(machine, vault.where(row), row, error, points))
        lsn, digest = row.last_lsn, row.digest
        report.objects += 1
        report.bytes += row.length
        step()
    if whole:
        _compare_catalog(vault, cataloged, said, report)
    report.uncatalogued += _uncatalogued(vault, machine)
    for tail in tails(vault.catalog, machine.id):
        _scrub_tail(vault, machine, tail, report)


def _scrub_tail(vault: Vault, machine: MachineRow, tail: Tail, report: Scrubbed) -> None:
    """What lies beside the history, from where it leaves it."""
    point = point_of_tail(vault.catalog, tail)
    lsn, digest = tail.branch_lsn, tail.branch_digest
    own = TailRows(vault.catalog, tail).own()
    for row in own:
        try:
            if row.first_lsn != lsn + 1:
                raise _broken(row, f"LSN {lsn + 1}..{row.first_lsn - 1} is missing from the catalog", None)
            _scrub_object(vault, row, digest, report)
        except AsrfsError as error:
            points = [point] if point is not None else []
            report.damages.append(replace(_damage(machine, vault.where(row), row, error, points), tail=tail.epoch))
        lsn, digest = row.last_lsn, row.digest
        report.objects += 1
        report.bytes += row.length
    known = {row.name for row in own}
    beside = [name for name, each in tail_names(vault.objects, machine.id, tail.epoch) if each.last_lsn <= lsn]
    report.uncatalogued += [vault.objects.where(name) for name in beside if name not in known]


def _uncatalogued(vault: Vault, machine: MachineRow) -> list[str]:
    """Log objects beside the history. Those beyond its end are about to be catalogued, or to be adopted."""
    names = log_names(vault.objects, machine.id)  # before the catalog, which is ahead of it then
    received = vault.received_lsn(machine.id)
    catalogued = {row.name for row in vault.objects_of(machine.id, received)}
    beside = [name for name in names if name not in catalogued]
    return [
        vault.objects.where(name)
        for name in beside
        if (parsed := parse_log_name(name)) is not None and parsed.first_lsn <= received
    ]


def _scrub_object(vault: Vault, row: ObjectRow, previous_digest: bytes, report: Scrubbed) -> Entry:
    """Everything about one object. Raises AsrfsError, _Broken where the place is known."""
    where = vault.where(row)
    try:
        content = vault.objects.read(row.name)
    except ObjectMissingError:
        raise _broken(row, f"{where}: the log object of LSN {row.first_lsn}..{row.last_lsn} is missing", None) from None
    try:
        digest = check_digest(content, where)
    except IntegrityError as error:
        raise _localised(vault, row, content, where, error) from None
    header = decode_object_header(content, where)
    check_header(header, row, where)
    if digest != row.digest:
        raise _broken(row, f"{where}: another log object of LSN {row.first_lsn}..{row.last_lsn} lies here", None)
    if header.previous_digest != previous_digest:
        raise _broken(row, f"{where}: LSN {row.first_lsn} does not continue what is before it", None)
    index = decode_index(header, content, _keys(vault, row, header), where)
    table = FrameTable(header, content, where)
    _open_frames(content, header, index, table, _keys(vault, row, header))
    report.frames += header.frame_count
    return entry_of(header, index, digest, row.nonce, where)


def _localised(vault: Vault, row: ObjectRow, content: bytes, where: str, error: IntegrityError) -> IntegrityError:
    """Where in an object whose digest is wrong the damage lies: header, table, index, a frame, or the digest itself."""
    try:
        header = decode_object_header(content, where)
        check_header(header, row, where)
    except IntegrityError as found:
        return _broken(row, str(found), 0)
    if len(content) != header.object_length:
        return _broken(row, str(error), min(len(content), header.object_length))
    try:
        table = FrameTable(header, content, where)
    except IntegrityError as found:
        return _broken(row, str(found), OBJECT_HEADER_BYTES)
    keys = _keys(vault, row, header)
    try:
        index = decode_index(header, content, keys, where)
    except IntegrityError as found:
        return _broken(row, f"{found} (the index or the frame table before it)", header.index_offset)
    try:
        _open_frames(content, header, index, table, keys)
    except IntegrityError as found:
        return found
    return _broken(row, f"{error} (everything but the digest is sound)", header.object_length - DIGEST_BYTES)


def _open_frames(content: bytes, header: ObjectHeader, index: Index, table: FrameTable, keys: ObjectKeys) -> None:
    """Raise _Broken with offset and LSNs of the first frame that cannot be opened."""
    view = memoryview(content)
    for i in range(header.frame_count):
        offset, length = table.extent(i)
        try:
            table.open_frame(i, view[offset : offset + length], keys.payload)
        except IntegrityError as error:
            first, last = _records_in_frame(header, index, i)
            raise _Broken(str(error), offset, first, last) from None


def _records_in_frame(header: ObjectHeader, index: Index, i: int) -> tuple[int, int]:
    """First and last LSN with payload in frame i."""
    start, end = i * header.frame_raw_bytes, (i + 1) * header.frame_raw_bytes
    lsns = [
        lsn
        for n, (lsn, kind) in enumerate(zip(index.lsn.tolist(), index.kind.tolist(), strict=True))
        if kind in CARRIES_EXTENT_BYTES
        and int(index.payload_position[n]) < end
        and int(index.payload_position[n]) + int(index.length[n]) > start
    ]
    return (lsns[0], lsns[-1]) if lsns else (header.first_lsn, header.last_lsn)


class _Said:
    """What the records of a history say of disks and points."""

    def __init__(self) -> None:
        self.disks: list[DiskRow] = []
        self._newest: dict[int, DiskRow] = {}
        self._points: dict[int, PointRow] = {}

    @property
    def points(self) -> Iterable[PointRow]:
        return self._points.values()

    def add(self, entry: Entry) -> None:
        """The next log object's: points first, since a last word may stand right behind the point it completes."""
        self._points |= {point.lsn: point for point in entry.points}
        for last_word in entry.completions:
            self._complete(last_word)
        for disk in entry.disks:
            newest = self._newest.get(disk.record.slot)
            if newest is None or newest.record != disk.record:
                self._newest[disk.record.slot] = disk
                self.disks.append(disk)

    def _complete(self, last_word: PointRow) -> None:
        """Once, and only a point that said it was unfinished."""
        point = self._points.get(last_word.marker.completes or 0)
        if point is not None and point.marker.unfinished and point.id == last_word.id:
            self._points[point.lsn] = replace(point, marker=completed(point.marker, last_word.marker))


def _compare_catalog(vault: Vault, cataloged: _Cataloged, said: _Said, report: Scrubbed) -> None:
    machine = cataloged.machine
    points = [replace(row, protected=False) for row in cataloged.points]
    differing_disks = {row.lsn for row in set(cataloged.disks) ^ set(said.disks)}
    differing_points = {row.lsn for row in set(points) ^ set(said.points)}
    for what, differing in (("disks", differing_disks), ("points", differing_points)):
        if differing:
            text = (
                f"{vault.catalog.path}: the {what} of machine {machine.name} differ from its records at LSN "
                f"{min(differing)}: make the catalog again with `replica-store rebuild`"
            )
            report.damages.append(Damage(machine.name, vault.catalog.path, None, min(differing), max(differing), text))


def _damage(machine: MachineRow, where: str, row: ObjectRow, error: AsrfsError, points: Sequence[PointRow]) -> Damage:
    offset = error.offset if isinstance(error, _Broken) else None
    first, last = error.lsns if isinstance(error, _Broken) else (row.first_lsn, row.last_lsn)
    needing = tuple(point.name or point.id for point in points if point.lsn >= first)
    return Damage(machine.name, where, offset, first, last, str(error), needing)


def _broken(row: ObjectRow, text: str, offset: int | None) -> _Broken:
    return _Broken(text, offset, row.first_lsn, row.last_lsn)


def _keys(vault: Vault, row: ObjectRow, header: ObjectHeader) -> ObjectKeys:
    return vault.session_keys(row.machine_id, row.epoch, header.session_salt)
