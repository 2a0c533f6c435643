"""A failover command that dies: `python -m tests.t5_system.failover_program VAULT STEP VERB [WORD …]`.

It is killed just before STEP begins, and says `alive` if that step never came.
"""

from __future__ import annotations

import os
import signal
import sys

from asrfs.storage.system_clock import SystemClock
from replica_store.failover.actions import Failovers
from replica_store.failover.wanted import Wanted

if __name__ == "__main__":
    root, last, verb, *words = sys.argv[1:]

    def told(step: str) -> None:
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    failovers = Failovers(root, SystemClock(), told)
    if verb in ("test", "unplanned", "planned"):
        getattr(failovers, verb)(Wanted(machine=words[0], selector=words[1], check_command="true"))
    else:
        getattr(failovers, verb)(*words)
    print("alive")
