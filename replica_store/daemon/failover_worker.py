"""The process that does what is due for a vault's failovers: `python -m replica_store.daemon.failover_worker VAULT`.

Started by `failover_keeper`. It may end at any moment and leaves nothing that the next one does not carry on with.
"""

from __future__ import annotations

import sys

from asrfs.errors import AsrfsError
from asrfs.storage.system_clock import SystemClock
from replica_store.failover.actions import Failovers
from replica_store.failover.reprotect import Reprotecting


def main(root: str) -> int:
    """The exit code; a failure is one line on stderr, each failover of which something became another."""
    try:
        clock = SystemClock()
        for each in (*Failovers(root, clock).sweep(), *Reprotecting(root, clock).look_at_all()):
            sys.stdout.write(f"{each.id} {each.causes[-1].text}\n")
    except (AsrfsError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
