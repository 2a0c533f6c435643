"""The process that makes a machine's map checkpoints: `python -m replica_store.daemon.map_worker VAULT MACHINE_ID`.

Started by `map_keeper`, with `kept` behind that: then it ends when its stdin does, because who started it is dead. It
only reads the catalog and the objects; somebody else who writes checkpoints just now makes it end with nothing done,
and a checkpoint that it was writing is none.
"""

from __future__ import annotations

import os
import sys
import threading

from asrfs.errors import AsrfsError, RefusedError
from asrfs.storage.priority import yield_to_others
from replica_store.points.map_maker import make_maps
from replica_store.vault.vault import Vault

KEPT = "kept"


def main(root: str, machine_id: str, kept: str = "") -> int:
    """The exit code; a failure is one line on stderr."""
    yield_to_others()
    if kept == KEPT:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        with Vault.open(root) as vault, vault.maps.lock():
            make_maps(vault, machine_id)
    except RefusedError:
        return 0
    except (AsrfsError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _end_with_stdin() -> None:
    os.read(0, 1)  # not by sys.stdin, whose lock would be asked for at the end
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
