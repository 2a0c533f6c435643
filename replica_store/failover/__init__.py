"""Bringing a machine back: test failover, failover with its ways out, and what is left to undo."""
