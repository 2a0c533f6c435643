"""`database`: pgbench on PostgreSQL on ext4 on the loop device of each peer."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from lab import run as run_program

from asrfs.model.quantities import format_size

from .benchmark import Run
from .measuring import MIB, Load
from .packages import version_of
from .peers import Peer
from .postgres import USER, Postgres
from .results import Turn, Workload
from .workbench import Workbench

PEERS = ("raw", "passthrough", "asrfs", "asrfs-shipping")
SECONDS = 60
SCALE, SCALE_TINY = 10, 1
CLIENTS = 4
SIZE_BYTES, SIZE_BYTES_TINY = 2048 * MIB, 256 * MIB

NOTES = (
    "PostgreSQL runs with the settings it comes with; one server at a time, started for its turn, after a checkpoint. "
    "The filesystem is ext4 with its defaults.",
)


def run(bench: Workbench, name: str, command: str) -> Run:
    tiny = bench.options.tiny
    scale = SCALE_TINY if tiny else SCALE
    seconds = max(1, round(bench.seconds(SECONDS)))
    size_bytes = SIZE_BYTES_TINY if tiny else SIZE_BYTES
    settings = {
        "disk": format_size(size_bytes),
        "turns": bench.options.turns,
        "seconds a turn": seconds,
        "scale": scale,
        "clients": CLIENTS,
    }
    run = Run(bench, name, command, settings)
    run.use_fio()
    missing = bench.packages.missing(("postgresql",))
    if missing:
        raise FileNotFoundError(missing)
    run.outcome.machine["postgresql"] = version_of("postgresql")
    run.outcome.notes += NOTES
    workload = Workload("pgbench", "pgbench, transactions like TPC-B", "transactions/s", "raw")
    run.outcome.workloads.append(workload)
    sockets = bench.root / "pg"
    sockets.mkdir()
    bench.root.chmod(0o711)  # the server's user walks to its sockets
    _give(sockets)
    with run.serving(PEERS, size_bytes, filled=not tiny), bench.stack() as stack:
        servers: dict[str, Postgres] = {}
        for key, (peer, device) in list(run.served.items()):
            with run.or_gone(key):
                servers[key] = _prepare(bench, stack, device, sockets, scale)
                peer.settle()
        for turn in range(bench.options.turns):
            for key, (peer, _) in list(run.served.items()):
                with run.or_gone(key):
                    workload.add(key, _measure(run, peer, servers[key], seconds))
            bench.say(f"turn {turn + 1} of {bench.options.turns} done")
    return run


def _prepare(bench: Workbench, stack: ExitStack, device: str, sockets: Path, scale: int) -> Postgres:
    """A filesystem, a cluster and its tables on a device."""
    mount = bench.directory("ext4")
    run_program(["mkfs.ext4", "-q", "-F", device])
    run_program(["mount", device, str(mount)])
    stack.callback(bench.quietly, lambda: run_program(["umount", str(mount)]))
    server = Postgres(bench, mount / "cluster", sockets)
    server.create()
    with bench.stack() as serving:
        server.start(serving)
        server.fill(scale)
    return server


def _measure(run: Run, peer: Peer, server: Postgres, seconds: int) -> Turn:
    latencies: list[float] = []

    def step() -> Load:
        with run.bench.stack() as serving:
            server.start(serving)
            done = server.measure(CLIENTS, seconds)
        latencies.append(done.latency_ms)
        return Load(done.per_s, 0.0, 0.0, 0.0, done.operations)

    turn = run.measure(peer, step, "transactions/s")
    also = {name: value for name, value in turn.also.items() if name.endswith("cpu_ms")}
    return Turn(turn.value, {"latency_ms": latencies[0], **also})


def _give(directory: Path) -> None:
    """To the user that PostgreSQL runs as."""
    run_program(["chown", USER, str(directory)])
