"""Tables of the catalog. What is here can be made again from the objects, except tokens, links, when points came,
and what verification found.

A catalog of an older version is brought to this one when it is opened. `UPGRADES` only ever adds, so a program that has
it open goes on reading; columns are always named, because their order depends on what a catalog was before.
"""

from __future__ import annotations

VERSION = 5
"""1 knew less of points, and no policies; 2 knew no stretches, 3 no boot settings and no failover, 4 no promotions."""

_HISTORY_TABLES = """
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
    is_stretch INTEGER NOT NULL DEFAULT 0, -- 1: of its LSNs only the last exists, the others have no state
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
    note TEXT,                      -- given by a person
    wanted TEXT,                    -- consistency that was asked for, where it is another
    failed TEXT,                    -- why it is less than was asked for
    freeze_ms REAL,                 -- how much of that freezing took
    hooks TEXT,                     -- how each hook ended, JSON as in FORMAT.md
    group_point TEXT,               -- id that the points of all members cut together share
    members TEXT,                   -- ids of the machines that belong to it, JSON
    ready INTEGER,                  -- on how many of them it was cut
    unfinished INTEGER NOT NULL,    -- 1: a later record will say how long writes were held, and whether it held
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
    boot BLOB NOT NULL DEFAULT x'', -- JSON: how the machine, not only the disk, is started from this record on
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

_POLICY_TABLES = """
CREATE TABLE policies (
    name TEXT PRIMARY KEY,
    keys TEXT NOT NULL              -- JSON object: what was set, as it was written; the rest is at its default
) STRICT, WITHOUT ROWID;

CREATE TABLE assignments (
    kind TEXT NOT NULL,             -- machine or group
    target_id TEXT NOT NULL,        -- of that machine or group
    policy TEXT NOT NULL,           -- name of the policy; `default` needs no row of its own
    PRIMARY KEY (kind, target_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE appeared (
    machine_id TEXT NOT NULL,       -- whose points
    consistency TEXT NOT NULL,
    lsn INTEGER NOT NULL,           -- of the newest one of them
    seen_ns INTEGER NOT NULL,       -- when it came, store's clock
    PRIMARY KEY (machine_id, consistency)
) STRICT, WITHOUT ROWID;

CREATE TABLE generations (
    what TEXT PRIMARY KEY,          -- configuration: what hosts are told
    number INTEGER NOT NULL         -- raised in each transaction that changes it
) STRICT, WITHOUT ROWID;
"""

_GROUP_TABLES = """
CREATE TABLE groups (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    members TEXT NOT NULL,          -- ids of machines, JSON, in the order they joined
    coordinator TEXT NOT NULL,      -- the member that cuts its points, chosen by the store
    generation INTEGER NOT NULL     -- raised with each change of members or coordinator
) STRICT, WITHOUT ROWID;

CREATE TABLE places (
    machine_id TEXT PRIMARY KEY,
    address TEXT NOT NULL,          -- where others of its groups reach it
    port INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE confirmations (
    machine_id TEXT NOT NULL REFERENCES machines (id),
    lsn INTEGER NOT NULL,           -- of the record, in that machine's history
    group_point TEXT NOT NULL,      -- what it confirms
    marker BLOB NOT NULL,           -- payload of the record
    PRIMARY KEY (machine_id, lsn)
) STRICT, WITHOUT ROWID;

CREATE INDEX confirmations_by_point ON confirmations (group_point);
CREATE INDEX points_by_group_point ON points (group_point) WHERE group_point IS NOT NULL;
"""

_FAILOVER_TABLES = """
CREATE TABLE operations (
    id TEXT PRIMARY KEY,            -- 32 hexadecimal digits
    machine_id TEXT NOT NULL,       -- what is failed over
    kind TEXT NOT NULL,             -- test, unplanned, planned or failback
    state TEXT NOT NULL,            -- preparing, serving, commit-pending, committed, returned, cancelled or cleaned
    generation INTEGER NOT NULL,    -- counts changes; of its sealed objects the one with the highest is valid
    content TEXT NOT NULL           -- JSON: all of it, see `operations.Operation`
) STRICT, WITHOUT ROWID;

CREATE INDEX operations_by_machine ON operations (machine_id);

CREATE TABLE flaws (
    machine_id TEXT NOT NULL,
    first_lsn INTEGER NOT NULL,     -- of the records that verification could not read back
    last_lsn INTEGER NOT NULL,
    what TEXT NOT NULL,             -- which file, what is wrong with it
    found_ns INTEGER NOT NULL,      -- store's clock
    PRIMARY KEY (machine_id, first_lsn, last_lsn)
) STRICT, WITHOUT ROWID;
"""

_PROMOTION_TABLES = """
CREATE TABLE promotions (
    id TEXT PRIMARY KEY,            -- 32 hexadecimal digits
    state TEXT NOT NULL,            -- preparing, writing, releasing, done or cancelled
    is_over INTEGER NOT NULL,       -- 1: no host has anything to hear of it any more
    generation INTEGER NOT NULL,    -- counts changes; of its sealed objects the one with the highest is valid
    content TEXT NOT NULL           -- JSON: all of it, see `promotions.Promotion`
) STRICT, WITHOUT ROWID;

CREATE INDEX promotions_live ON promotions (id) WHERE is_over = 0;
"""

TABLES = _HISTORY_TABLES + _POLICY_TABLES + _GROUP_TABLES + _FAILOVER_TABLES + _PROMOTION_TABLES

_MORE_OF_POINTS = """
ALTER TABLE points ADD COLUMN wanted TEXT;
ALTER TABLE points ADD COLUMN failed TEXT;
ALTER TABLE points ADD COLUMN freeze_ms REAL;
ALTER TABLE points ADD COLUMN hooks TEXT;
ALTER TABLE points ADD COLUMN group_point TEXT;
ALTER TABLE points ADD COLUMN members TEXT;
ALTER TABLE points ADD COLUMN ready INTEGER;
ALTER TABLE points ADD COLUMN unfinished INTEGER NOT NULL DEFAULT 0;
"""

_STRETCHES = """
ALTER TABLE objects ADD COLUMN is_stretch INTEGER NOT NULL DEFAULT 0;
"""

_BOOT_SETTINGS = """
ALTER TABLE disks ADD COLUMN boot BLOB NOT NULL DEFAULT x'';
"""

UPGRADES = {
    1: _MORE_OF_POINTS + _POLICY_TABLES + _GROUP_TABLES,
    2: _STRETCHES,
    3: _BOOT_SETTINGS + _FAILOVER_TABLES,
    4: _PROMOTION_TABLES,
}
"""By the version a catalog has: what makes it one of the next."""

REBUILDABLE = (
    *("machines", "objects", "points", "disks", "policies", "assignments", "groups", "confirmations"),
    *("operations", "promotions"),
)
"""Tables that are equal after a rebuild."""
