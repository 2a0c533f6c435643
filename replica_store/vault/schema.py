"""Tables of the catalog. What is here can be made again from the objects, except tokens and links."""

from __future__ import annotations

VERSION = 1

TABLES = """
CREATE TABLE machines (
    id TEXT PRIMARY KEY,            -- 32 hexadecimal digits, chosen by the host at `asrfs init`
    name TEXT NOT NULL UNIQUE,      -- label people use
    epoch INTEGER NOT NULL,         -- the only epoch that may add to the history (I6)
    serial TEXT NOT NULL,           -- serial number of the one certificate that is good, hexadecimal
    revoked INTEGER NOT NULL,       -- 1: no certificate is good
    enrolled_ns INTEGER NOT NULL,   -- when the present certificate was made, store's clock
    generation INTEGER NOT NULL,    -- counts enrolments; the description object with the highest is valid
    sealed_keys BLOB NOT NULL       -- index key and payload key, sealed with the vault's master key
) STRICT, WITHOUT ROWID;

CREATE TABLE tokens (
    secret_digest BLOB PRIMARY KEY, -- SHA-256 of the token's secret; the secret itself is nowhere
    machine_name TEXT NOT NULL,     -- the only machine that may use it
    created_ns INTEGER NOT NULL,
    expires_ns INTEGER NOT NULL,
    used_ns INTEGER                 -- NULL until used; used once
) STRICT, WITHOUT ROWID;

CREATE TABLE objects (
    machine_id TEXT NOT NULL REFERENCES machines (id),
    first_lsn INTEGER NOT NULL,     -- one more than last_lsn of the object before: no gap
    last_lsn INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    first_time_ns INTEGER NOT NULL, -- of its first record, host's clock
    last_time_ns INTEGER NOT NULL,
    digest BLOB NOT NULL,           -- BLAKE3 of the object, which the next object names
    length INTEGER NOT NULL,        -- bytes
    nonce TEXT NOT NULL,            -- the part of the object's name that is not said by the columns above
    PRIMARY KEY (machine_id, first_lsn)
) STRICT, WITHOUT ROWID;

CREATE TABLE points (
    machine_id TEXT NOT NULL REFERENCES machines (id),
    lsn INTEGER NOT NULL,           -- the state after this record
    id TEXT NOT NULL,               -- 32 hexadecimal digits, chosen by the host
    epoch INTEGER NOT NULL,
    time_ns INTEGER NOT NULL,       -- of the marker, host's clock
    consistency TEXT NOT NULL,      -- crash, filesystem or application
    group_name TEXT,                -- consistency group it was cut with
    name TEXT,                      -- given by a person
    hold_ms REAL,                   -- how long writes were held for it
    note TEXT,                      -- why it is less than was asked for
    protected INTEGER NOT NULL,     -- 1: retention leaves it
    PRIMARY KEY (machine_id, lsn)
) STRICT, WITHOUT ROWID;

CREATE TABLE disks (
    machine_id TEXT NOT NULL REFERENCES machines (id),
    slot INTEGER NOT NULL,          -- number of the disk in records, never reused
    lsn INTEGER NOT NULL,           -- from this record on the row holds; repeats of the same are not kept
    id TEXT NOT NULL,               -- incarnation of the disk
    name TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    removed INTEGER NOT NULL,
    gap INTEGER NOT NULL,           -- 1: content from before the history is missing, no point can be listed (I5)
    PRIMARY KEY (machine_id, slot, lsn)
) STRICT, WITHOUT ROWID;

CREATE TABLE links (
    machine_id TEXT PRIMARY KEY REFERENCES machines (id),
    heard_ns INTEGER NOT NULL,      -- when its host last said something, store's clock
    connected INTEGER NOT NULL,     -- 1: there was a session then
    appended_lsn INTEGER NOT NULL,  -- what the host said of itself
    durable_lsn INTEGER NOT NULL,
    durable_time_ns INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""

REBUILDABLE = ("machines", "objects", "points", "disks")
"""Tables that are equal after a rebuild."""
