"""The directories of a failover and their lock, whose last holder takes both away."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from asrfs.errors import RefusedError
from replica_store.failover import places
from replica_store.vault.operations import Places

THREADS = 4
ROUNDS = 40
"""Turns of each, however often it is refused in between."""


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


def test_who_removes_it_as_another_comes(where: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two steps of making sure that there is a directory."""
    os.makedirs(where.directory)
    mkdir = os.mkdir

    def removed_then(path: str, mode: int = 0o777) -> None:
        try:
            mkdir(path, mode)
        except FileExistsError:
            if os.path.isdir(where.directory):
                os.rmdir(where.directory)
            raise

    monkeypatch.setattr(os, "mkdir", removed_then)
    with places.take_lock(where) as lock:
        assert isinstance(lock, places.FailoverLock) and lock.is_in_place()


def test_what_is_no_directory_is_not_waited_for(where: Places) -> None:
    directory = Path(where.directory)
    directory.parent.mkdir(parents=True)
    for put_there in (lambda: directory.symlink_to("nothing"), directory.touch):
        put_there()
        with pytest.raises(OSError, match=str(directory)):
            places.take_lock(where)
        directory.unlink()
    directory.parent.rmdir()
    directory.parent.symlink_to("nothing")
    with pytest.raises(OSError, match=str(directory.parent)):
        places.take_lock(where)


def test_what_is_written_while_it_is_removed_is_not_forgotten(where: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    late = Path(where.directory, "late.log")
    unlink = os.unlink

    def unlinked_then(path: str) -> None:
        unlink(path)
        if path.endswith("/lock"):
            late.write_text("something")

    with places.take_lock(where):
        fill(where)
        with monkeypatch.context() as patched:
            patched.setattr(os, "unlink", unlinked_then)
            with pytest.raises(OSError, match="not empty"):
                places.remove(where)
    assert os.listdir(where.directory) == ["late.log"]
    with places.take_lock(where):
        places.remove(where)
    assert not os.path.exists(where.directory)
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", unlinked_then)
        places.take_lock(where).close()
    assert os.listdir(where.directory) == ["late.log"], "who only had the lock has nothing to do with it"


@pytest.mark.parametrize("case", ["there", "going", "gone"])
def test_the_directory_is_of_who_has_the_lock_next(where: Places, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Who is there, in the middle of going, or has gone, when the one before would remove it."""
    others: list[places.FailoverLock] = []
    unlink, rmdir = os.unlink, os.rmdir

    def unlinked_then(path: str) -> None:
        unlink(path)
        if path.endswith("/lock") and not others:
            others.append(places.take_lock(where))
            if case == "gone":
                others[0].close()

    def not_removed_then(path: str, **more: Any) -> None:
        try:
            rmdir(path, **more)
        except OSError:
            if case == "going":
                unlink(f"{path}/lock")
            raise

    with places.take_lock(where):
        fill(where)
        with monkeypatch.context() as patched:
            patched.setattr(os, "unlink", unlinked_then)
            patched.setattr(os, "rmdir", not_removed_then)
            places.remove(where)
    assert os.path.exists(where.directory) is (case == "there")
    if case != "gone":
        assert others[0].is_in_place() is (case == "there")
        others[0].close()
    assert not os.path.exists(where.directory)


def test_a_lock_whose_directory_cannot_be_read_is_given_back(where: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: str) -> list[str]:
        raise OSError(errno.EIO, "input/output error", path)

    lock = places.take_lock(where)
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", unreadable)
        with pytest.raises(OSError, match="input/output error"):
            lock.close()
    places.take_lock(where).close()
    assert not os.path.exists(where.directory)


def test_who_removes_it_while_others_ask_for_it(where: Places, rng: random.Random) -> None:
    holders, turns, failures = [0], [0], []
    start = threading.Barrier(THREADS)
    moment = threading.Event()
    deadline = time.monotonic() + 60

    def work(seed: int) -> None:
        mine = random.Random(seed)
        mine_left = ROUNDS
        start.wait()
        while mine_left and not failures and time.monotonic() < deadline:
            try:
                with places.take_lock(where):
                    holders[0] += 1
                    if holders[0] != 1:
                        failures.append("two have the lock")
                    fill(where)
                    turns[0] += 1
                    mine_left -= 1
                    holders[0] -= 1
                    if mine.random() < 0.7:
                        places.remove(where)
            except RefusedError:
                moment.wait(0.0005)  # never set: who is refused lets the others have the processor
            except Exception as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(rng.randrange(1 << 30),)) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and turns[0] == THREADS * ROUNDS
    with places.take_lock(where):
        places.remove(where)
    assert not os.path.exists(where.directory)
