"""Writing a disk as it was to a file: raw and sparse, or qcow2 by way of a raw temporary and `qemu-img`.

The output appears under its name complete and durable or not at all: it is made beside it under a hidden name, synced
and then given its name; without `force` in a way that cannot replace a file that appeared meanwhile. What is there
and is not a plain file (a device, a directory) is never replaced.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from asrfs.errors import AsrfsError, NoSpaceError, NotFoundError, RefusedError
from asrfs.model.extents import BLOCK_BYTES
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import File
from replica_store.points.point_disk import PointDisk, Window

ExportFormat = Literal["raw", "qcow2"]
Progress = Callable[[int, int], None]
"""Called with stored bytes done and their total."""

_WINDOW_BYTES = 64 << 20
_QEMU_TERMINATE_SECONDS = 10.0
_LINK_UNSUPPORTED = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True, slots=True)
class Exported:
    """`data_bytes` were written; the rest of `size_bytes` are holes."""

    size_bytes: int
    data_bytes: int


def check_output(output: Path, format_name: ExportFormat, *, force: bool) -> None:
    """Raise, before long work begins, what `export_disk` would raise at its end."""
    parent = _parent(output)
    if not parent.is_dir():
        raise NotFoundError(f"there is no directory {parent}: make it first")
    if output.name in ("", ".", ".."):
        raise RefusedError(f"{output} is a directory: name a file")
    _check_free(output, force=force)
    if format_name == "qcow2":
        _qemu_img()


def export_disk(
    disk: PointDisk,
    output: Path,
    *,
    format_name: ExportFormat = "raw",
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write `disk` to `output`. Raises RefusedError if it exists (unless `force`), NoSpaceError, IntegrityError."""
    check_output(output, format_name, force=force)
    storage = DirectoryStorage(str(_parent(output)))
    with _one_line(output), _temporary(storage) as raw:
        data_bytes = _write_raw(disk, storage, raw, progress)
        if format_name == "raw":
            _publish(storage, raw, output, force=force)
        else:
            with _temporary(storage) as converted:
                _convert(storage, raw, converted)
                _publish(storage, converted, output, force=force)
    return Exported(disk.size_bytes, data_bytes)


def export_disks(
    disks: Mapping[Path, PointDisk],
    *,
    format_name: ExportFormat = "raw",
    force: bool = False,
    progress: Progress | None = None,
) -> dict[Path, Exported]:
    """Several disks that were cut together (`builder.open_disks`), each to its own file; checks all names first."""
    for output in disks:
        check_output(output, format_name, force=force)
    return {
        output: export_disk(disk, output, format_name=format_name, force=force, progress=progress)
        for output, disk in disks.items()
    }


def _write_raw(disk: PointDisk, storage: DirectoryStorage, name: str, progress: Progress | None) -> int:
    total = disk.state.layers.bytes_max
    done = written = 0
    file = storage.open(name, write=True)
    try:
        file.truncate(disk.size_bytes)
        for window in disk.windows(_WINDOW_BYTES):
            written += _write_window(file, window, disk.size_bytes)
            done += len(window.buffer)
            if progress is not None:
                progress(done, total)
        if progress is not None and done < total:
            progress(total, total)  # what lies under newer content was counted, too
        file.datasync()
    finally:
        file.close()
    return written


def _write_window(file: File, window: Window, size_bytes: int) -> int:
    """Write what is not zero, neighbours in one call. Returns the bytes written."""
    offsets, lengths = window.offsets, window.lengths
    ends = offsets + lengths
    whole_blocks = bool(np.all((offsets % BLOCK_BYTES == 0) & ((ends % BLOCK_BYTES == 0) | (ends == size_bytes))))
    if whole_blocks:
        # Piece by piece into blocks: where each lies on the disk, in the buffer, and how long it is.
        counts = -(-lengths // BLOCK_BYTES)
        piece = np.repeat(np.arange(len(offsets)), counts)
        within = (np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)) * BLOCK_BYTES
        block_at = offsets[piece] + within
        place = (np.cumsum(lengths) - lengths)[piece] + within
        size = np.minimum(lengths[piece] - within, BLOCK_BYTES)
        keep = _nonzero_blocks(window.buffer)
        block_at, place, size = block_at[keep], place[keep], size[keep]
    else:
        block_at, place, size = offsets, np.cumsum(lengths) - lengths, lengths
    if not len(block_at):
        return 0
    # The buffer is in the order of the disk, so neighbours there are neighbours in it.
    breaks = block_at[1:] != (block_at + size)[:-1]
    heads = np.flatnonzero(np.concatenate(([True], breaks))).tolist()
    tails = np.flatnonzero(np.concatenate((breaks, [True]))).tolist()
    for head, tail in zip(heads, tails, strict=True):
        first, last = int(place[head]), int(place[tail] + size[tail])
        file.write_at([window.buffer[first:last]], int(block_at[head]))
    return int(size.sum())


def _nonzero_blocks(buffer: memoryview) -> npt.NDArray[np.bool_]:
    """For each block of a buffer whether it holds anything but zeros. Only the last may be short.

    The disk's short last block has the highest offset, so it is the last of its window.
    """
    words = np.frombuffer(buffer, np.uint64)
    whole = len(words) - len(words) % (BLOCK_BYTES // 8)
    marks: npt.NDArray[np.bool_] = np.any(words[:whole].reshape(-1, BLOCK_BYTES // 8), axis=1)
    return marks if whole == len(words) else np.append(marks, words[whole:].any())


def _convert(storage: DirectoryStorage, raw: str, converted: str) -> None:
    command = [_qemu_img(), "convert", "-f", "raw", "-O", "qcow2", storage.path(raw), storage.path(converted)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            _, complaint = process.communicate()
        except BaseException:
            process.terminate()
            try:
                process.wait(_QEMU_TERMINATE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if process.returncode != 0:
        reason = " ".join(complaint.decode(errors="replace").split())[-300:]
        if os.strerror(errno.ENOSPC) in reason:
            raise NoSpaceError(f"the filesystem of {storage.root} is full: make room and export again")
        raise AsrfsError(f"qemu-img could not convert to qcow2: {reason}")
    file = storage.open(converted)
    try:
        file.datasync()
    finally:
        file.close()


def _publish(storage: DirectoryStorage, temporary: str, output: Path, *, force: bool) -> None:
    _check_free(output, force=force)
    if force:
        storage.rename(temporary, output.name)
    else:
        try:
            storage.link(temporary, output.name)
        except FileExistsError:
            raise RefusedError(_exists(output)) from None
        except OSError as error:
            if error.errno not in _LINK_UNSUPPORTED:
                raise
            storage.rename(temporary, output.name)
    storage.sync_directory("")


@contextmanager
def _temporary(storage: DirectoryStorage) -> Iterator[str]:
    """A new hidden file, closed, that is gone afterwards."""
    name = f".asrfs-export-{secrets.token_hex(8)}.partial"
    storage.create(name).close()
    try:
        yield name
    finally:
        if storage.exists(name):
            storage.unlink(name)


@contextmanager
def _one_line(output: Path) -> Iterator[None]:
    """Turn the system's errors into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"the filesystem of {output} is full: make room and export again") from None
        if error.errno == errno.EFBIG:
            raise AsrfsError(f"the filesystem of {output} cannot hold a file of the disk's size: use another") from None
        raise AsrfsError(f"cannot write {output}: {error.strerror or error}") from None


def _check_free(output: Path, *, force: bool) -> None:
    try:
        mode = os.lstat(output).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise AsrfsError(f"cannot write {output}: {error.strerror}") from None
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise RefusedError(f"{output} exists and is not a plain file: name another")
    if not force:
        raise RefusedError(_exists(output))


def _exists(output: Path) -> str:
    return f"{output} exists: name another file or use --force"


def _parent(output: Path) -> Path:
    return Path(os.path.abspath(output)).parent


def _qemu_img() -> str:
    path = shutil.which("qemu-img")
    if path is None:
        raise AsrfsError("qcow2 needs the program qemu-img: install the Debian package qemu-utils, or use --format raw")
    return path
