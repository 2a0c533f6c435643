"""`replica-store failback`: a machine comes home from where it was failed over to."""

from __future__ import annotations

import click

from replica_store.cli.failing_over import (
    CHECK,
    COMMIT,
    MOUNT,
    NO_BOOT,
    STATE,
    TIMEOUT,
    HandoverWords,
    hand_over,
)
from replica_store.cli.invocation import Invocation, pass_invocation


@click.command()
@click.argument("name", metavar="MACHINE|PLAN")
@STATE
@MOUNT
@CHECK
@NO_BOOT
@TIMEOUT
@COMMIT
@pass_invocation
def failback(
    invocation: Invocation,
    name: str,
    state: str | None,
    mount: str | None,
    check_command: str | None,
    no_boot: bool,
    timeout: str | None,
    commits: bool,
) -> None:
    """MACHINE, or all of PLAN, comes home: it runs at the other site, this store protects it, and it goes on here.

    A planned failover the other way, to this host or any other of this site: what runs there stops writing, sends what
    is left and compares all disks; nothing is lost. Until `failover commit` it can be cancelled. After that
    `replica-store reprotect` has the store that it comes from protect it again.
    """
    asked = HandoverWords(name, "latest", state, mount, check_command, no_boot, timeout, commits)
    hand_over(invocation, "failback", asked)
