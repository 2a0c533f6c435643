"""The host-side log: the journaled disk, writing and reading of segments, recovery, quota."""
