"""What hosts say of themselves: kept in memory, written to the catalog every few seconds for other processes to see."""

from __future__ import annotations

from dataclasses import replace

from asrfs.model.clock import Clock
from asrfs.protocol.messages import Heartbeat, Hello
from replica_store.vault.rows import LinkRow
from replica_store.vault.vault import Vault


class Links:
    """Not for several threads, except `save`, which only takes what `changed` gave it."""

    def __init__(self, vault: Vault, clock: Clock) -> None:
        self._vault = vault
        self._clock = clock
        self._links: dict[str, LinkRow] = {}
        self._changed: set[str] = set()

    def connected(self, machine_id: str, hello: Hello) -> None:
        """A session began."""
        self._put(LinkRow(machine_id, self._clock.time_ns(), True, hello.appended_lsn, hello.durable_lsn, 0))

    def heard(self, machine_id: str, heartbeat: Heartbeat) -> None:
        """The host said where it stands."""
        self._put(
            LinkRow(
                machine_id,
                self._clock.time_ns(),
                True,
                heartbeat.appended_lsn,
                heartbeat.durable_lsn,
                heartbeat.durable_time_ns,
            )
        )

    def received(self, machine_id: str, lsn: int, time_ns: int) -> None:
        """Records up to `lsn`, made at `time_ns`, have come; that too says how far the host is."""
        link = self._links[machine_id]
        if lsn > link.durable_lsn:
            link = replace(link, appended_lsn=max(link.appended_lsn, lsn), durable_lsn=lsn, durable_time_ns=time_ns)
        self._put(replace(link, heard_ns=self._clock.time_ns()))

    def disconnected(self, machine_id: str) -> None:
        """The session ended."""
        self._put(replace(self._links[machine_id], connected=False))

    def changed(self) -> list[LinkRow]:
        """What has changed since this was last asked."""
        rows = [self._links[machine_id] for machine_id in sorted(self._changed)]
        self._changed.clear()
        return rows

    def save(self, rows: list[LinkRow]) -> None:
        """Blocks."""
        if rows:
            self._vault.catalog.put_links(rows)

    def _put(self, link: LinkRow) -> None:
        self._links[link.machine_id] = link
        self._changed.add(link.machine_id)
