"""Listener, session and ingester: payload, index, catalog row, acknowledgement, in this order."""
