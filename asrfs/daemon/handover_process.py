"""Runs a machine's handover hooks: `python -m asrfs.daemon.handover_process --state DIR --failover ID --phase PHASE`.

The agent starts it: what hooks leave behind is killed among the children of a process, and the agent has others.
`handover` runs them in order and ends with the first failure, one line on its standard output; `take-back` runs all of
them in reverse order.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from asrfs.consistency.hook_run import adopt_orphans, clean_environment, failure_of, run_hook
from asrfs.consistency.hooks import HookFiles, of_handover
from asrfs.daemon.hardening import ignore_terminal, raise_file_limit
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.system_clock import SystemClock

PHASES = ("handover", "take-back")
_LOOK_S = 1.0


def run_hooks(state: StateDirectory, failover: str, phase: str) -> list[str]:
    """What failed. Raises AsrfsError where hooks may not run."""
    hooks = of_handover(HookFiles(DirectoryStorage(state.hooks), state.hooks).load())
    facts = {"MACHINE": state.load_machine().name, "FAILOVER": failover, "PHASE": phase}
    failures = []
    for hook in hooks if phase == "handover" else reversed(hooks):
        failed = failure_of(run_hook(hook, "pre", clean_environment(facts), SystemClock()))
        if failed is not None:
            failures.append(failed)
            if phase == "handover":
                break
    return failures


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="asrfs.daemon.handover_process")
    parser.add_argument("--state", required=True)
    parser.add_argument("--failover", required=True)
    parser.add_argument("--phase", required=True, choices=PHASES)
    given = parser.parse_args(arguments)
    ignore_terminal()
    raise_file_limit()
    adopt_orphans()
    try:
        state = StateDirectory.open(given.state)
        while (lock := state.take_lock("point")) is None:
            state.wait_lock_free("point", _LOOK_S)
        try:
            failures = run_hooks(state, given.failover, given.phase)
        finally:
            lock.close()
    except (AsrfsError, OSError) as error:
        failures = [str(error)]
    sys.stdout.write("; ".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
