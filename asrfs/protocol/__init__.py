"""PURE: the replication protocol. Bytes in, events out; messages in, bytes out. No sockets, no clock."""
