"""Disks as network block devices: the protocol (sans-IO, PURE), what may be exported, and the server."""
