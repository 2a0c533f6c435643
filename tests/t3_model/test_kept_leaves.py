"""I9 with kept digests: whatever is kept, of this history or of another one, what is compared is what the disk is."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asrfs.errors import IntegrityError
from asrfs.model.digest_tree import LEAF_BYTES, LeafDigester, node_digests, regions_of
from asrfs.protocol.messages import Compare
from replica_store.points import kept_leaves
from replica_store.points.changed_since import Changed
from replica_store.points.digests import Comparer
from tests.fakes.history_steps import FRAME_BYTES, STEPS
from tests.fakes.kept_histories import EVENTS, check_kept, check_region, small_regions
from tests.fakes.memory_history import MemoryHistory


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=40),
    seed=st.integers(0, 2**32 - 1),
    frame_bytes=st.sampled_from(FRAME_BYTES),
)
def test_i9_kept_digests_are_those_of_the_disk_at_every_lsn(steps: list[str], seed: int, frame_bytes: int) -> None:
    check_kept(steps, seed, frame_bytes)


def test_kept_digests_are_used_and_strange_ones_are_there(rng: random.Random) -> None:
    events: Counter[str] = Counter()
    for _ in range(20):
        events += check_kept(rng.choices(STEPS, k=40), rng.getrandbits(32), rng.choice(FRAME_BYTES))
    assert all(events[event] > 20 for event in EVENTS), events


def test_i9_a_disk_that_grows_has_no_kept_end() -> None:
    """What lay behind the end when digests were made is no part of them, whatever is written there later."""
    history = MemoryHistory(frame_bytes=4096)
    with small_regions():
        comparer = Comparer(history)
        for size in (20 * 4096 + 512, 40 * 4096, 22 * 4096, 40 * 4096):
            history.disk(0, "a", size)
            history.write(0, 0, bytes([size % 251]) * 4096)
            history.write(0, size - 4096 - size % 4096, bytes([size % 241]) * 4096)
            history.seal()
            (disk,) = history.disks_at(history.id, history.lsn)
            for region in regions_of(size):
                for _ in range(2):
                    check_region(history, comparer, disk, region, history.lsn, by_kept=True)


@pytest.mark.parametrize("room", ["enough", "little", "none"])
def test_damage_is_found_by_a_proof_and_then_by_everybody(room: str, rng: random.Random) -> None:
    """Also where what it found cannot be kept."""
    history = MemoryHistory(frame_bytes=4096)
    history.disk(0, "root", 10 * LEAF_BYTES)
    for leaf in range(5):
        history.write(0, 2 * leaf * LEAF_BYTES, rng.randbytes(4096))
        history.seal()
    comparer, content = Comparer(history), history.state_at(history.lsn)[0]
    (region,) = regions_of(len(content))

    def differs(*, by_kept: bool) -> bool:
        digester = LeafDigester(region)
        digester.add(0, content)
        digests = node_digests(digester.finish())
        asked = Compare(
            number=1, slot=0, disk_id="0" * 32, size_bytes=len(content), first=0, digests=digests, by_kept=by_kept
        )
        return comparer.answer(history.id, asked).differs != b"\0"

    assert not differs(by_kept=True)
    before = history.frames_read
    assert not differs(by_kept=True)
    assert history.frames_read == before, "what is kept is not read"
    row = history.objects_of(history.id, history.lsn)[2]
    sound = history.stored(row)
    history.damage(row, len(sound) - 100)
    history.leaves.free, history.leaves.refuses = (1 << 40 if room != "little" else 1 << 20), room == "none"
    assert not differs(by_kept=True), "kept digests know nothing of it"
    assert differs(by_kept=False), "a proof reads what is stored"
    assert differs(by_kept=True), "what it found is kept"
    history._objects[row.name] = sound
    assert not differs(by_kept=True), "what could not be read is tried again"


@pytest.mark.parametrize("why", ["its index is damaged", "there is too much of it"])
def test_what_was_written_since_need_not_be_known(
    why: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then everything is digested, which may need no index of a single object: a map checkpoint says the state."""
    history = MemoryHistory(frame_bytes=4096)
    history.disk(0, "root", 4 * LEAF_BYTES)
    history.write(0, 0, rng.randbytes(4096))
    history.seal()
    comparer = Comparer(history)
    _check_all(history, comparer)
    history.write(0, LEAF_BYTES, rng.randbytes(4096))
    history.seal()
    if why == "there is too much of it":
        monkeypatch.setattr(kept_leaves, "RECORDS_MAX", 0)
    else:

        def refuse(*_: object) -> Changed:
            raise IntegrityError("its index is damaged")

        monkeypatch.setattr(kept_leaves, "changed_between", refuse)
    before = history.frames_read
    _check_all(history, comparer)
    assert history.frames_read > before + 1, "both frames were read"


def _check_all(history: MemoryHistory, comparer: Comparer) -> None:
    (disk,) = history.disks_at(history.id, history.lsn)
    (region,) = regions_of(disk.size_bytes)
    check_region(history, comparer, disk, region, history.lsn, by_kept=True)
