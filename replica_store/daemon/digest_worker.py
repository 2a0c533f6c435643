"""The process that digests disks: `python -m replica_store.daemon.digest_worker VAULT`, started by `digest_keeper`.

It only reads the catalog and the objects. Requests are a machine's id and a COMPARE, answers a COMPARED.
"""

from __future__ import annotations

import sys

from asrfs.errors import AsrfsError
from asrfs.protocol.frames import FrameType
from asrfs.protocol.messages import Compare, decode_message, encode_message
from asrfs.storage.priority import yield_to_others
from asrfs.transport.working import work
from replica_store.points.digests import Comparer
from replica_store.vault.vault import Vault

MACHINE_ID_CHARACTERS = 32


def main(root: str) -> int:
    """The exit code; a failure is one line on stderr."""
    yield_to_others()
    try:
        with Vault.open(root) as vault:
            comparer = Comparer(vault)

            def answer(request: bytes) -> bytes:
                wanted = decode_message(FrameType.COMPARE, request[MACHINE_ID_CHARACTERS:])
                assert isinstance(wanted, Compare)
                return encode_message(comparer.answer(request[:MACHINE_ID_CHARACTERS].decode(), wanted))

            work(answer)
    except (AsrfsError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
