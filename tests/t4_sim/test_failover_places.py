"""The directories of a failover and their lock, whose last holder takes both away."""

from __future__ import annotations

import os
import random
import shutil
import threading
from pathlib import Path

import pytest

from asrfs.errors import RefusedError
from replica_store.failover import places
from replica_store.vault.operations import Places

THREADS = 4
ROUNDS = 60


@pytest.fixture
def where(scratch: Path) -> Places:
    directory = scratch / "vault/failover/0123456789ab"
    return Places(directory=str(directory), state=str(directory / "state"), mount=str(directory / "disks"))


def fill(where: Places) -> None:
    places.make(where)
    for name in ("machine.log", "a.log", "z.log", "state/machine.json"):
        Path(where.directory, name).write_text("something")


def test_nobody_else_works_on_it_before_all_of_it_is_gone(where: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []

    def refused(path: str) -> None:
        if not path.endswith("/lock"):
            removed.append(os.path.basename(path))
            with pytest.raises(RefusedError, match="is being worked on by process"):
                places.take_lock(where)

    unlink, rmtree = os.unlink, shutil.rmtree
    with places.take_lock(where):
        fill(where)
        with monkeypatch.context() as patched:
            patched.setattr(os, "unlink", lambda path: (refused(path), unlink(path)))
            patched.setattr(shutil, "rmtree", lambda path: (refused(path), rmtree(path)))
            places.remove(where)
    assert sorted(removed) == ["a.log", "disks", "machine.json", "machine.log", "state", "tree", "z.log"]
    assert not os.path.exists(where.directory)


def test_a_lock_alone_leaves_no_directory_and_one_of_something_stays(where: Places) -> None:
    with places.take_lock(where):
        assert os.listdir(where.directory) == ["lock"]
    assert not os.path.exists(where.directory)
    with places.take_lock(where):
        fill(where)
    assert sorted(os.listdir(where.directory))[1:3] == ["disks", "lock"]


def test_who_removes_it_while_others_ask_for_it(where: Places, rng: random.Random) -> None:
    holders, turns, failures = [0], [0], []
    start = threading.Barrier(THREADS)

    def work(seed: int) -> None:
        mine = random.Random(seed)
        start.wait()
        for _ in range(ROUNDS):
            try:
                with places.take_lock(where):
                    holders[0] += 1
                    if holders[0] != 1:
                        failures.append("two have the lock")
                    fill(where)
                    turns[0] += 1
                    holders[0] -= 1
                    if mine.random() < 0.7:
                        places.remove(where)
            except RefusedError:
                continue
            except Exception as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(rng.randrange(1 << 30),)) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and turns[0] >= ROUNDS
    with places.take_lock(where):
        places.remove(where)
    assert not os.path.exists(where.directory)
