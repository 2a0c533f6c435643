"""Making a machine of a point, step by step, each measured; and bringing one back whose processes are gone.

    clear: nothing left over ─▶ state: `asrfs init --recovered` ─▶ tree: the points, which are being mounted meanwhile
        ─▶ serve: `asrfs serve` is ready, in a network of its own if it has one
        ─▶ fsck of each disk ─▶ check: the user's command ─▶ boot: the machine runs, as its history says

Until the operation is said to be ready nobody has used its disks, so who finds one half made begins anew.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from asrfs.errors import FormatError, IntegrityError
from asrfs.model.machine import MachineConfig
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import read_whole, write_atomically
from replica_store.failover import booting, filesystems, mounts, network, places, processes, undoing
from replica_store.failover.choice import Chosen, recovered_file
from replica_store.failover.filesystems import Place
from replica_store.failover.processes import Starting
from replica_store.vault.operations import Checked, Examined, Operation, Step

CHECK_S_MAX = 600.0
_OUTPUT_CHARACTERS_MAX = 4000

Told = Callable[[str], None]
"""Called with the name of each step before it begins."""


@dataclass
class Stopwatch:
    """Measures steps that follow one another."""

    told: Told
    steps: list[Step] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.told(name)
        begin = time.monotonic()
        yield
        self.steps.append(Step(name, round(time.monotonic() - begin, 4)))

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return round(sum(step.seconds for step in self.steps), 4)


def prepare(
    root: str, operation: Operation, chosen: Chosen, epoch: int, watch: Stopwatch, *, examined: bool
) -> Operation:
    """The operation with what was found; the machine serves. The caller has its lock, and makes the result durable."""
    where = operation.places
    with watch.step("clear"):
        undoing.discard(operation)
        places.empty(where.state)
        places.make(where)
    with watch.step("state"):
        tree = _start_tree(root, operation)  # meanwhile
        content = recovered_file(operation, chosen.disks, chosen.boot, places.tree_of(where), epoch)
        write_atomically(DirectoryStorage(where.directory), places.RECOVERED_FILE, content)
        _init(operation, where.state)
    with watch.step("tree"):
        tree.wait_ready()
        found = _filesystems(operation) if examined else {}
    with watch.step("serve"):
        if where.namespace is not None:
            network.make(operation.id, where.namespace)
        is_dirty = any(each.found.may_be_dirty for places_found in found.values() for each in places_found)
        copy = _start_copy(operation) if is_dirty else None  # beside it: what it is made of must not be in use yet
        _start_machine(operation).wait_ready()
    verdicts: tuple[Examined, ...] = ()
    if examined:
        with watch.step("fsck"):
            verdicts = _examine(operation, found, copy)
    checked = None
    if operation.check_command is not None:
        with watch.step("check"):
            checked = _check(operation, operation.check_command)
    booted = None
    if operation.boots and chosen.boot is not None:
        with watch.step("boot"):
            booted = booting.start(operation, chosen.boot)
    return msgspec.structs.replace(
        operation,
        steps=tuple(watch.steps),
        rto_s=None if booted is not None and booted.failure else watch.seconds,
        examined=verdicts,
        checked=checked,
        booted=booted,
    )


def _start_tree(root: str, operation: Operation) -> Starting:
    """Mounts the points for the bases of the recovered disks."""
    where = operation.places
    words = processes.program("replica_store.cli.main", "--vault", root, "mount", places.tree_of(where))
    return Starting(operation.id, "tree", words, places.log_of(where, "tree"))


def _start_machine(operation: Operation) -> Starting:
    """Serves the recovered disks, in the network of the operation."""
    where = operation.places
    words = processes.program("asrfs.cli.main", "--state", where.state, "serve", "--mount", where.mount)
    return Starting(operation.id, "machine", processes.inside(where.namespace, words), places.log_of(where, "machine"))


def _init(operation: Operation, state: str) -> None:
    """The state directory. What is only tried is not hydrated: it ends soon, and what nobody reads needs no room."""
    file = os.path.join(operation.places.directory, places.RECOVERED_FILE)
    program = processes.program("asrfs.cli.main", "--state", state)
    processes.run(operation.id, [*program, "init", operation.machine, "--recovered", file])
    if operation.kind == "test":
        processes.run(operation.id, [*program, "set", "hydration=off"])


# ---- what it is worth -----------------------------------------------------------------------------------------------


def _filesystems(operation: Operation) -> dict[str, list[Place]]:
    """Of every disk, by its name."""
    point = os.path.join(places.tree_of(operation.places), operation.machine, f"lsn:{operation.point.lsn}")
    return {
        disk: filesystems.filesystems_on(operation.id, os.path.join(point, f"{disk}.img")) for disk in operation.disks
    }


def _start_copy(operation: Operation) -> Starting:
    """A second machine of the same point, whose disks a start may write to."""
    copy = places.copy_of(operation.places)
    state, disks = (os.path.join(copy, name) for name in ("state", "disks"))
    os.makedirs(disks, mode=0o700, exist_ok=True)
    processes.run(operation.id, ["cp", "--archive", operation.places.state, state])  # seeks over the holes of images
    words = processes.program("asrfs.cli.main", "--state", state, "serve", "--mount", disks)
    inside = processes.inside(operation.places.namespace, words)
    return Starting(operation.id, "copy", inside, places.log_of(operation.places, "copy"))


def _examine(operation: Operation, found: dict[str, list[Place]], copy: Starting | None) -> tuple[Examined, ...]:
    """fsck of every disk; of filesystems whose journal may have to be replayed, on the copy."""
    everywhere = [(disk, place) for disk in operation.disks for place in found[disk]]
    verdicts = {each: _examine_at_rest(operation, *each) for each in everywhere if not each[1].found.may_be_dirty}
    if copy is not None:
        try:
            copy.wait_ready()
            verdicts |= {each: _examine_replayed(operation, *each) for each in everywhere if each not in verdicts}
        finally:
            undoing.discard_copy(operation)
    return tuple(
        filesystems.of_whole_disk(disk, [verdicts[disk, place] for place in found[disk]]) for disk in operation.disks
    )


def _examine_at_rest(operation: Operation, disk: str, place: Place) -> Examined:
    path = os.path.join(operation.places.mount, f"{disk}.img")
    if not place.partition:
        return filesystems.examine(operation.id, disk, path, place)
    device = filesystems.attach(operation.id, path, place, is_read_only=True)
    try:
        return filesystems.examine(operation.id, disk, device, place)
    finally:
        filesystems.detach(operation.id, device)


def _examine_replayed(operation: Operation, disk: str, place: Place) -> Examined:
    """The copy is taken away with what is attached to it."""
    copy = places.copy_of(operation.places)
    mounted = os.path.join(copy, "mounted")
    os.makedirs(mounted, mode=0o700, exist_ok=True)
    device = filesystems.attach(operation.id, os.path.join(copy, "disks", f"{disk}.img"), place)
    if failure := filesystems.replay(operation.id, device, place.found, mounted):
        return filesystems.verdict(disk, place, failure, replayed=True)
    return filesystems.examine(operation.id, disk, device, place, replayed=True)


def _check(operation: Operation, command: str) -> Checked:
    where = operation.places
    more = {
        "ASRFS_STATE": where.state,
        "ASRFS_MOUNT": where.mount,
        "ASRFS_MACHINE": operation.machine,
        "ASRFS_OPERATION": operation.id,
    }
    words = processes.inside(where.namespace, ["sh", "-c", command])
    code, output = processes.run(operation.id, words, accepted=(), seconds_max=CHECK_S_MAX, more=more)
    return Checked(command=command, exit_code=code, output=output[-_OUTPUT_CHARACTERS_MAX:])


# ---- again ----------------------------------------------------------------------------------------------------------


def _is_serving(operation: Operation) -> bool:
    """Whether somebody serves the recovered disks."""
    return any("serve" in each.words for each in processes.find(operation.id, "machine"))


def bring_back(root: str, operation: Operation) -> Operation:
    """Start what is missing of a machine that was ready before; how it runs then. What it wrote is kept."""
    where = operation.places
    lacks_tree = has_bases(operation) and not processes.find(operation.id, "tree")
    is_gone = not processes.find(operation.id, "machine")
    if is_gone:  # a mount that nobody serves is in the way; one whose supervisor alone died is adopted
        booting.stop(operation)
        mounts.release_loops(where.mount)
        mounts.take_away(where.mount)
    if lacks_tree:
        mounts.take_away(places.tree_of(where))
    places.make(where)
    if lacks_tree:
        _start_tree(root, operation).wait_ready()
    if is_gone and where.namespace is not None:
        network.make(operation.id, where.namespace)
    if not _is_serving(operation):
        _start_machine(operation).wait_ready()
    settings = _machine(operation).boot
    if not operation.boots or settings is None or booting.is_ready(operation):
        return operation
    return msgspec.structs.replace(operation, booted=booting.start(operation, settings))


def has_bases(operation: Operation) -> bool:
    """Whether a disk's content is not all in its own image yet. Raises IntegrityError."""
    return any(disk.base is not None for disk in _machine(operation).disks)


def _machine(operation: Operation) -> MachineConfig:
    """As its state directory says. Raises IntegrityError."""
    path = os.path.join(operation.places.state, "machine.json")
    try:
        return msgspec.json.decode(
            read_whole(DirectoryStorage(operation.places.state), "machine.json"), type=MachineConfig
        )
    except (OSError, msgspec.MsgspecError, ValueError, FormatError) as error:
        raise IntegrityError(
            f"{path} cannot be read ({error}): what failover {operation.id[:12]} wrote may be lost; "
            f"see `replica-store failover cancel` and `cleanup` ({shlex.quote(operation.id)})"
        ) from None
