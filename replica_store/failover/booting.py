"""Starting the recovered machine as its boot settings say, beside its disks, and ending it.

    boot/settings.json   what its history says     boot/root/   below which a test's filesystems are mounted
    boot/ready           it ran: written once its health check held, gone before it is ended

It is done by `replica-store boot`, in the network of the failover, so that all that it starts is in there and bears the
failover's mark. The recovered disks are there whether it runs or not: what goes wrong here is noted, and takes nothing
back.
"""

from __future__ import annotations

import os
import shutil

from asrfs.errors import AsrfsError
from asrfs.model.boot import BootSettings, encode_boot
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import write_atomically
from replica_store.failover import mounts, network, places, processes
from replica_store.vault.operations import Booted, Operation

SETTINGS_FILE = "settings.json"
READY_FILE = "ready"
START_S_MAX = 1800.0
"""Beside the time that the health check may take."""
STOP_S_MAX = 900.0


def start(operation: Operation, settings: BootSettings) -> Booted:
    """Start it and wait until it runs. Blocks. Of one that was begun before, a guest is only waited for; of a start on
    mounts everything is ended first, its services too: who was never healthy may still hold its port."""
    if settings.kind == "mount":
        stop(operation)
    directory = places.boot_of(operation.places)
    root = os.path.join(directory, "root")
    is_test = operation.kind == "test"
    os.makedirs(root, mode=0o700, exist_ok=True)
    storage = DirectoryStorage(directory)
    write_atomically(storage, SETTINGS_FILE, encode_boot(settings))
    words = processes.program("replica_store.cli.main", "boot", "start", operation.machine)
    words += ["--settings", os.path.join(directory, SETTINGS_FILE), "--directory", directory]
    for name in operation.disks:
        words += ["--disk", f"{name}={operation.places.mount}/{name}.img"]
    words += ["--root", root, "--test"] if is_test else []
    health_s = settings.health.timeout_s if settings.health is not None else 0.0
    inside = processes.inside(operation.places.namespace, words)
    try:
        processes.run(operation.id, inside, seconds_max=START_S_MAX + health_s, part="boot")
    except AsrfsError as error:
        return Booted(kind=settings.kind, failure=str(error).removeprefix(f"{processes.shown(inside)}: "))
    write_atomically(storage, READY_FILE, b"")
    return Booted(kind=settings.kind)


def is_ready(operation: Operation) -> bool:
    """Whether it ran once and nobody has ended it since."""
    return os.path.exists(os.path.join(places.boot_of(operation.places), READY_FILE))


def stop(operation: Operation) -> None:
    """End it, by force if need be, and take its directory away; nothing happens if there is none.

    Raises TemporaryError for what resists.
    """
    where = operation.places
    directory = places.boot_of(where)
    if not os.path.isdir(directory):
        return
    if os.path.exists(os.path.join(directory, READY_FILE)):
        os.unlink(os.path.join(directory, READY_FILE))
    if where.namespace is not None and not network.exists(where.namespace):
        network.make(operation.id, where.namespace)  # what is told to stop must not look for it in production
    words = processes.program("replica_store.cli.main", "boot", "stop", directory, "--now")
    try:
        processes.run(operation.id, processes.inside(where.namespace, words), seconds_max=STOP_S_MAX)
    except AsrfsError:
        pass  # by force, then
    mounts.release_loops(where.mount)
    processes.end(operation.id, "boot")
    mounts.release_loops(where.mount)
    mounts.take_away(directory)
    shutil.rmtree(directory)
