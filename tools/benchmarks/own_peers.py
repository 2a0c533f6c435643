"""asrfs itself as a peer: without a store, and shipping to a store on this machine."""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

from lab import Lab

import asrfs
from asrfs.daemon.control import UnreachableError, call
from asrfs.daemon.state import Role, StateDirectory

from .peers import Peer
from .recovery_site import RecoverySite

SETTLE_SECONDS_MAX = 600.0
START_SECONDS_MAX = 20.0
STORE_NICE = 19


class AsrfsPeer(Peer):
    """A machine with one disk that is enrolled nowhere."""

    key = "asrfs"
    title = "asrfs, not shipping"
    packages = ()

    lab: Lab
    state: StateDirectory
    machine = "web1"
    site: RecoverySite | None = None
    """Where the store is, if not beside the machine."""

    def serve(self, stack: ExitStack) -> str:
        self.start(stack)
        return self.lab.attach("bench")

    def start(self, stack: ExitStack) -> None:
        """Everything but the loop device."""
        self.lab = Lab(machine=self.machine, parent=self.bench.root, store_nice=STORE_NICE, site=self.site)
        stack.callback(self.lab.close)
        self.lab.asrfs("init", self.machine)
        self.lab.asrfs("disk", "add", "bench", "--size", str(self.size_bytes))
        self.state = StateDirectory(str(self.lab.state))
        self._enroll()
        self.lab.start_host()

    def settle(self) -> None:
        self.agent("apply")

    def processes(self) -> dict[str, int]:
        roles: dict[str, Role] = {"disk server": "disk_server", "agent": "agent"}
        holders = {name: self.state.lock_holder(role) for name, role in roles.items()}
        return {name: pid for name, pid in holders.items() if pid}

    def version(self) -> str:
        return f"asrfs {asrfs.__version__}{_commit()}"

    def agent(self, verb: str) -> dict[str, object]:
        """A verb of the agent, waited for; one that is just starting is waited for too."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            try:
                return call(self.state.socket_path("agent"), verb, seconds_max=SETTLE_SECONDS_MAX)
            except UnreachableError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def image(self) -> Path:
        """The raw image of the disk."""
        return Path(self.state.image_path(self.state.load_machine().disk("bench")))

    def _enroll(self) -> None:
        """Nowhere."""


class ShippingPeer(AsrfsPeer):
    """A machine whose history goes to a store on this machine, at the lowest priority."""

    key = "asrfs-shipping"
    title = "asrfs, shipping"

    host_store: Lab | None = None
    """The lab whose store is used; its own if None."""

    def settle(self) -> None:
        self.agent("drain")
        self.agent("apply")

    def processes(self) -> dict[str, int]:
        store = self.lab.store
        return super().processes() | ({"store": store.pid} if store is not None else {})

    def _enroll(self) -> None:
        if self.host_store is None:
            self.lab.start_store()
        else:
            self.lab.vault, self.lab.manage = self.host_store.vault, self.host_store.manage
        self.lab.enroll()


def _commit() -> str:
    """The commit that is checked out, if this is a checkout; `+` where files were changed since."""
    here = Path(__file__).parent
    words = ["git", "-C", str(here), "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return ""
    return f" ({done.stdout.strip()})" if done.returncode == 0 else ""
