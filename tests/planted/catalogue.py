"""All planted bugs, and which of them stand for the twenty-four that a release must be shown to catch."""

from __future__ import annotations

from collections.abc import Mapping

from tests.planted import (
    Plant,
    comparing,
    crash,
    failback,
    failing,
    failover,
    fuzz,
    groups,
    handing_over,
    healing,
    hydration,
    indexes,
    kernel,
    model,
    policies,
    promoting,
    quieting,
    rejoining,
    security,
    seeding,
    simulation,
)

PLANTS: tuple[Plant, ...] = (
    *crash.PLANTS,
    *healing.PLANTS,
    *hydration.PLANTS,
    *rejoining.PLANTS,
    *indexes.PLANTS,
    *failing.PLANTS,
    *failback.PLANTS,
    *failover.PLANTS,
    *fuzz.PLANTS,
    *security.PLANTS,
    *simulation.PLANTS,
    *model.PLANTS,
    *kernel.PLANTS,
    *groups.PLANTS,
    *handing_over.PLANTS,
    *promoting.PLANTS,
    *policies.PLANTS,
    *quieting.PLANTS,
    *comparing.PLANTS,
    *seeding.PLANTS,
)

NAMED: Mapping[str, tuple[str, ...]] = {
    "skip an fsync": ("skip-fsync", "sealed-not-synced", "segment-name", "object-name", "power-never-syncs"),
    "acknowledge before durable": ("early-ack", "sim: acknowledges before durable"),
    "list before index": ("row-first", "sim: lists before the object"),
    "apply out of order": ("apply-order",),
    "accept a gap": ("sim: accepts a gap",),
    "accept a duplicate": ("duplicate-not-compared", "sim: stores an lsn twice"),
    "accept an old epoch": ("sim: accepts an old epoch", "rebuild-epoch"),
    "cut mid-journal corruption": ("cut-corruption",),
    "retry an fsync": ("retry-fsync",),
    "trim before acknowledgement": ("early-trim", "sim: trims before acknowledged"),
    "free a reachable object": (),
    "barrier without drain": ("barrier-without-drain", "hold-not-of-turns", "sim-lets-go-when-ready"),
    "missing thaw": ("missing-thaw", "watchdog-ends-with-its-master", "watchdog-without-a-deadline"),
    "mark clean too early": ("mark-clean-given-up", "map-saved-late", "closing-record-kept"),
    "cap after allocation": ("cap-after-allocation", "decompression-without-cap", "control-message-of-any-length"),
    "path join": ("name-may-be-a-path", "name-checked-at-its-start"),
    # the eight that the list leaves open:
    "position before image": ("early-position", "sim: saves positions before images"),
    "ship or apply what is not durable": ("steal", "sim: ships what is not durable"),
    "point inside a gap": ("sim: lists points inside a gap",),
    "length before its checksum": ("frame-length-before-its-checksum", "object-length-before-its-checksum"),
    "frames out of order": ("frame-number-not-compared",),
    "record of another session or history": ("salt-not-compared", "previous-digest-not-compared"),
    "certificate that is good no more": (
        "any-certificate-of-the-machine",
        "revoked-certificate-is-good",
        "certificate-looked-at-once",
        "certificate-of-any-time",
    ),
    "seal that binds too little": ("nonce-used-again", "salt-not-in-the-keys", "header-not-under-the-seal"),
}
"""Empty: the feature is not there yet. Nothing deletes an object that was listed (retention)."""
