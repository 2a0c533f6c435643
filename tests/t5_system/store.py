"""One replica store, driven by the `replica-store` command as a person would, and a scripted host over real TLS."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import ssl
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from asrfs.transport.enrolment import (
    ENROL_PATH,
    EnrolReply,
    EnrolRequest,
    decode_token,
    encode_base64url,
    fetch_certificate,
)
from asrfs.transport.stream import SecureStream, connect, parse_address
from asrfs.transport.tls import client_context, make_key_and_request, pinned_context
from replica_store.cli import main
from replica_store.vault.keys import MachineKeys
from replica_store.vault.vault import Vault
from tests import sweep
from tests.fakes.scripted_host import HostEnd, HostHistory
from tests.waiting import wait_until

COMMAND_S_MAX = 60.0
ORPHAN_S_MAX = 10.0


class StoreUnderTest:
    """A vault below `scratch`. `data` and `manage` are the addresses of the one serve that runs."""

    def __init__(self, scratch: Path, name: str = "vault") -> None:
        self.path = scratch / name
        self.scratch = scratch
        self.process: subprocess.Popen[str] | None = None
        self.host = "127.0.0.1"
        self.data = "127.0.0.1:0"
        self.manage = "127.0.0.1:0"

    # ---- commands -------------------------------------------------------------------------------------------------

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run `replica-store …` to its end, whatever that is."""
        return subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=COMMAND_S_MAX,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def ask(self, *arguments: str | Path) -> Any:
        """`replica-store --json …` within this process, which is faster; it must succeed. Its document."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            code = main.run(["--vault", str(self.path), "--json", *map(str, arguments)])
        assert code == 0, f"replica-store {arguments} ended with {code}: {said.getvalue()}"
        return json.loads(said.getvalue())

    def state_at(self, machine: str, lsn: int) -> int:
        """The LSN itself, or where it lies inside a folded stretch, the next one at which there is a state."""
        with Vault.open(str(self.path)) as vault:
            row = vault.catalog.object_with(vault.machine(machine).id, lsn)
        assert row is not None, f"LSN {lsn} of {machine} is not here"
        return row.last_lsn if row.is_stretch else lsn

    def token(self, machine: str, *arguments: str) -> str:
        return str(self.ask("token", machine, *arguments)["token"])

    def command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "replica_store.cli.main", "--vault", str(self.path), *map(str, arguments)]

    # ---- serving --------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Start it, on the ports it had before if it had any, and wait for `ready`."""
        ports = [address.rpartition(":")[2] for address in (self.data, self.manage)]
        with (self.scratch / "store.log").open("a") as log:
            self.process = subprocess.Popen(
                self.command("serve", "--host", self.host, "--data-port", ports[0], "--manage-port", ports[1]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert said.startswith(f"ready data={self.host}:"), f"serve said {said!r}: {self.log()}"
        self.data, self.manage = (word.partition("=")[2] for word in said.split()[1:])

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and wait; its exit code."""
        assert self.process is not None
        process, self.process = self.process, None
        process.send_signal(number)
        code = process.wait(timeout=30)
        assert process.stdout is not None
        process.stdout.close()
        return code

    def log(self) -> str:
        return (self.scratch / "store.log").read_text()

    def close(self) -> None:
        """Kill it, if it runs: what it has started notices, and ends."""
        if self.process is not None:
            self.stop(signal.SIGKILL)
        wait_until(lambda: not self._workers(), ORPHAN_S_MAX, what="the end of a killed store's map worker")

    def _workers(self) -> list[str]:
        return [line for line in sweep.find(self.path).processes if "replica_store.daemon.map_worker" in line]

    # ---- enrolling --------------------------------------------------------------------------------------------------

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Say something to the management port; status and body of the answer."""
        host, port = parse_address(self.manage, 443)
        context = pinned_context(fetch_certificate(host, port))
        connection = http.client.HTTPSConnection(host, port, context=context, timeout=20)
        try:
            connection.request("POST", path, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def enrol(self, name: str = "web1", number: int = 1) -> Enrolled:
        """A new machine, by a token and the API."""
        machine_id = f"{number:032x}"
        key, request = make_key_and_request(name, machine_id)
        secret = encode_base64url(decode_token(self.token(name)).secret)
        wanted = EnrolRequest(secret=secret, machine=name, machine_id=machine_id, csr=request.decode())
        status, body = self.post(ENROL_PATH, msgspec.json.encode(wanted))
        assert status == 200, body
        reply = msgspec.json.decode(body, type=EnrolReply)
        files = self.scratch / f"keys-{name}-{os.urandom(3).hex()}"
        files.mkdir(mode=0o700)
        (files / "machine").write_bytes(key + reply.certificate.encode())
        (files / "ca").write_text(reply.ca)
        keys = MachineKeys(base64.b64decode(reply.index_key), base64.b64decode(reply.payload_key))
        history = HostHistory(machine_id, keys, name, seed=number)
        return Enrolled(self, history, files, reply.server_name)


@dataclass
class Enrolled:
    """A machine with keys and a certificate, and its history."""

    store: StoreUnderTest
    history: HostHistory
    files: Path
    server_name: str

    def context(self) -> ssl.SSLContext:
        machine = str(self.files / "machine")
        return client_context(machine, machine, str(self.files / "ca"))

    async def connect(self, context: ssl.SSLContext | None = None) -> SecureStream:
        host, port = parse_address(self.store.data, 9443)
        return await connect(host, port, context or self.context(), self.server_name)

    async def end(self) -> HostEnd:
        return HostEnd(await self.connect())
