"""I9: the image recovered at LSN n is the initial content plus records 1..n, byte for byte, on every disk.

Random histories of several disks become real log objects; every LSN is read back and compared with the bytes the model
had there.
"""

from __future__ import annotations

import random
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asrfs.errors import BadInputError, IntegrityError, NotFoundError
from asrfs.format.log_object import OBJECT_HEADER_BYTES
from asrfs.model.extents import BLOCK_BYTES
from replica_store.points.builder import build_states, disks_of, find_disk, open_disks, resolve
from replica_store.points.exporter import export_disks
from replica_store.points.point_disk import DiskState, FrameCache, PointDisk
from tests.fakes.history_steps import FRAME_BYTES, STEPS, check_every_lsn
from tests.fakes.memory_history import MemoryHistory, random_history


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=60),
    seed=st.integers(0, 2**32 - 1),
    frame_bytes=st.sampled_from(FRAME_BYTES),
)
def test_i9_every_lsn_of_a_random_history_is_exact(steps: list[str], seed: int, frame_bytes: int) -> None:
    assert check_every_lsn(steps, seed, frame_bytes)


def test_i9_disks_are_cut_together_and_exports_are_exact(scratch: Path, rng: random.Random) -> None:
    sizes = {"root": 700 * 4096, "data": 300 * 4096 + 512, "tiny": 512}
    history = random_history(rng.randrange(1 << 30), records=600, disks=sizes)
    frames = FrameCache(history)
    for lsn in (3, *sorted(rng.sample(range(4, history.lsn), 4)), history.lsn):
        cut = resolve(history, history.name, f"lsn:{lsn}")
        opened = open_disks(history, cut, list(sizes), frames)
        outputs = {scratch / f"{name}-{lsn}.img": opened[name] for name in sizes}
        done = export_disks(outputs)
        for (output, _), content in zip(outputs.items(), history.state_at(lsn).values(), strict=True):
            assert output.read_bytes() == content
            nonzero = sum(
                min(BLOCK_BYTES, len(content) - at)
                for at in range(0, len(content), BLOCK_BYTES)
                if any(content[at : at + BLOCK_BYTES])
            )
            assert done[output].data_bytes == nonzero
            assert output.stat().st_blocks * 512 <= nonzero + 4 * BLOCK_BYTES, "zero blocks are holes"


def test_i9_a_state_is_continued_from_an_earlier_one(rng: random.Random) -> None:
    history = random_history(rng.randrange(1 << 30), records=300, disks={"root": 64 * 4096, "data": 9 * 4096 + 512})
    frames = FrameCache(history)
    for slot in (0, 1):
        known: DiskState | None = None
        for before, lsn in pairwise([0, *sorted(rng.sample(range(2, history.lsn + 1), 12))]):
            disk = next(disk for disk in history.disks_at(history.id, lsn) if disk.slot == slot)
            assert known is None or known.lsn == before
            base = {slot: known} if known is not None else {}
            known = build_states(history, history.id, lsn, [disk], base=base)[slot]
            assert PointDisk(known, frames).read(0, disk.size_bytes) == history.state_at(lsn)[slot]


def test_a_disk_made_again_under_its_name_shows_nothing_of_the_old_one() -> None:
    history = MemoryHistory()
    history.disk(0, "root", 8192)
    history.write(0, 0, b"\1" * 8192)
    gone = history.disk(0, "root", 8192, removed=True)
    again = history.disk(1, "root", 4096)
    history.write(1, 0, b"\2" * 4096)
    history.seal()
    frames = FrameCache(history)

    def root_at(lsn: int) -> PointDisk:
        return open_disks(history, resolve(history, "web1", f"lsn:{lsn}"), ["root"], frames)["root"]

    assert root_at(2).read(0, 8192) == b"\1" * 8192
    with pytest.raises(NotFoundError, match="has no disk 'root'"):
        root_at(gone)
    assert root_at(again).read(0, 4096) == bytes(4096)
    assert root_at(again + 1).read(0, 4096) == b"\2" * 4096
    cut = resolve(history, "web1", "latest")
    with pytest.raises(NotFoundError, match="it has root"):
        find_disk(disks_of(history, cut), "data", cut)


def test_a_disk_that_shrank_and_grew_has_zeros_where_it_was_cut() -> None:
    history = MemoryHistory()
    history.disk(0, "root", 16384)
    history.write(0, 0, b"\1" * 16384)
    history.disk(0, "root", 6144)
    history.disk(0, "root", 12288)
    history.seal()
    disk = open_disks(history, resolve(history, "web1", "latest"), ["root"], FrameCache(history))["root"]
    assert disk.read(0, 12288) == b"\1" * 6144 + bytes(6144)
    for offset, length in ((-1, 1), (0, 12289), (12288, 1)):
        with pytest.raises(BadInputError):
            disk.read(offset, length)


def test_each_frame_is_opened_once_by_a_whole_pass(rng: random.Random) -> None:
    """However scattered the writes are; a pass in order of offset would open each frame for nearly every block."""
    history = MemoryHistory(frame_bytes=8192)
    history.disk(0, "root", 2048 * 4096)
    blocks = list(range(2048))
    rng.shuffle(blocks)
    for i, block in enumerate(blocks):
        history.write(0, block * 4096, rng.randbytes(4096))
        if i % 100 == 99:
            history.seal()
    history.seal()
    frames = FrameCache(history, 4 * 8192)
    disk = open_disks(history, resolve(history, "web1", "latest"), ["root"], frames)["root"]
    history.frames_read = 0
    for _ in disk.windows(64 * 4096):
        pass
    assert 1024 <= history.frames_read <= 1024 + 2048 // 64


def test_reads_of_many_threads_are_exact_and_share_frames(rng: random.Random) -> None:
    history = random_history(rng.randrange(1 << 30), records=400, disks={"root": 256 * 4096})
    frames = FrameCache(history)
    disk = open_disks(history, resolve(history, "web1", "latest"), ["root"], frames)["root"]
    content = history.state_at(history.lsn)[0]
    wrong: list[int] = []
    history.frames_read = 0

    def read_all(step: int) -> None:
        for at in range(0, len(content), step):
            length = min(step, len(content) - at)
            if disk.read(at, length) != content[at : at + length]:
                wrong.append(at)

    threads = [threading.Thread(target=read_all, args=(step,)) for step in (4096, 5120, 65536, 131072)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (
        history.frames_read
        == frames.frames_opened
        <= sum(history.object_head(row)[0].frame_count for row in history.objects_of(history.id, history.lsn))
    )


def test_damage_is_found_and_named() -> None:
    history = MemoryHistory(frame_bytes=4096)
    history.disk(0, "root", 8192)
    history.write(0, 0, random.Random(1).randbytes(8192))
    history.seal()
    row = history.objects_of(history.id, 2)[0]
    header, _, table = history.object_head(row)
    assert header.frames_offset > OBJECT_HEADER_BYTES
    history.damage(row, table.extent(1)[0])
    disk = open_disks(history, resolve(history, "web1", "latest"), ["root"], FrameCache(history))["root"]
    assert disk.read(0, 4096) == history.state_at(2)[0][:4096]
    with pytest.raises(IntegrityError, match=r"frame 1 of LSN 1\.\.2"):
        disk.read(4096, 1)
    history.damage(row, OBJECT_HEADER_BYTES + 20)
    with pytest.raises(IntegrityError, match=row.name):
        open_disks(history, resolve(history, "web1", "latest"), ["root"], FrameCache(history))
